// Whether a tensor is still what it was.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

namespace sparse_transcoder {

// Taken of a tensor, tells later whether it was changed. It sees every in-place operation of torch,
// which a tensor counts; other memory, shape or type, which `.data =` gives it; and on the CPU a
// change of most of its memory by anyone else (`.data`, NumPy, inference mode, whose tensors count
// nothing), because it compares a few of its elements. A check takes some nanoseconds.
class Stamp {
 public:
  explicit Stamp(const at::Tensor& tensor);

  bool fits(const at::Tensor& tensor) const;

 private:
  static constexpr int64_t sample_count = 4;

  at::Tensor alias_;  // of the same memory, which lives as long as this
  const void* memory_;
  int64_t version_;
  std::array<uint64_t, sample_count> samples_;
};

}  // namespace sparse_transcoder
