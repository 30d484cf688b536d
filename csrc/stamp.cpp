#include "stamp.h"

#include <ATen/ATen.h>

#include <cstring>

namespace sparse_transcoder {
namespace {

const void* memory_of(const at::Tensor& tensor) { return tensor.storage().data(); }

int64_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0 : static_cast<int64_t>(tensor._version());
}

// Element number `sample` of a few that lie evenly from the first to the last; 0 on a device.
uint64_t sample_of(const at::Tensor& tensor, int64_t sample, int64_t count) {
  if (!tensor.is_cpu() || tensor.numel() == 0 || memory_of(tensor) == nullptr) return 0;
  int64_t offset = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d)
    offset += (tensor.size(d) - 1) * sample / (count - 1) * tensor.stride(d);
  const auto bytes = tensor.element_size();
  uint64_t bits = 0;
  std::memcpy(&bits, static_cast<const char*>(memory_of(tensor)) + offset * bytes, bytes);
  return bits;
}

}  // namespace

Stamp::Stamp(const at::Tensor& tensor)
    : alias_(tensor.detach()), memory_(memory_of(tensor)), version_(version_of(tensor)) {
  for (int64_t i = 0; i < sample_count; ++i) samples_[i] = sample_of(tensor, i, sample_count);
}

bool Stamp::fits(const at::Tensor& tensor) const {
  if (memory_of(tensor) != memory_ || version_of(tensor) != version_ ||
      tensor.scalar_type() != alias_.scalar_type() || tensor.sizes() != alias_.sizes() ||
      tensor.strides() != alias_.strides() || tensor.storage_offset() != alias_.storage_offset())
    return false;
  for (int64_t i = 0; i < sample_count; ++i)
    if (sample_of(tensor, i, sample_count) != samples_[i]) return false;
  return true;
}

}  // namespace sparse_transcoder
