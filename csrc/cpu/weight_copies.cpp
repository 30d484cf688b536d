#include "cpu/weight_copies.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <sys/mman.h>

#include "floating_point.h"

namespace sparse_transcoder::cpu {
namespace {

// Memory in huge pages where the system gives them: rows are read from all over it.
at::Tensor allocate(at::IntArrayRef shape, at::ScalarType type, const std::string& who) {
  int64_t bytes = c10::elementSize(type);
  for (const int64_t size : shape) bytes *= size;
  at::Tensor memory;
  try {
    memory = at::empty(shape, type);
  } catch (const c10::Error&) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, who, ": out of memory: the screening copy needs ",
                     bytes, " bytes; screening \"off\" makes none");
  }
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return memory;
}

}  // namespace

int64_t WeightCopies::bytes() const {
  int64_t bytes = 0;
  for (const at::Tensor* t : {&int8, &int16, &int16_scale, &int16_error})
    if (t->defined()) bytes += t->nbytes();
  return bytes;
}

WeightCopies make_copies(const at::Tensor& W_enc, Screening screening, const std::string& who,
                         at::Tensor& norms) {
  const CpuKernels& kernel = cpu_kernels();
  const int64_t F = W_enc.size(0), H = W_enc.size(1), stride = int16_stride(H);
  const Dtype dtype = dtype_of(W_enc.scalar_type());
  const Int8Layout layout(H);
  constexpr int64_t panel = panel_features;
  const int64_t panels = (F + panel - 1) / panel;
  // Weights of two bytes are their own sharper screen: an int16 copy would save nothing.
  const bool want_int8 = (screening == Screening::int8 || screening == Screening::automatic) &&
                         H <= Int8Layout::most_inputs;
  const bool want_int16 =
      screening == Screening::int16 ||
      (screening == Screening::automatic && kernel.fast_int16 && dtype == Dtype::float32);
  const int64_t parts = (H + int16_depth(H) - 1) / int16_depth(H);
  const auto int16_roundoff = static_cast<float>((8 + 2 * parts) * 0x1p-24);
  WeightCopies copies;
  if (want_int8) copies.int8 = allocate({panels, layout.panel_bytes()}, at::kByte, who);
  if (want_int16) {
    copies.int16 = allocate({F, stride}, at::kShort, who);
    copies.int16_scale = at::empty({F}, at::kFloat);
    copies.int16_error = at::empty({F}, at::kFloat);
  }
  norms = at::empty({F}, at::kDouble);
  const auto* weights = static_cast<const char*>(W_enc.const_data_ptr());
  double* norm = norms.mutable_data_ptr<double>();
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    const DefaultFloatingPoint environment;
    std::vector<float> wide(panel * H);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * panel, count = std::min(panel, F - first);
      kernel.widen[static_cast<int>(dtype)](weights + first * H * W_enc.element_size(), wide.data(),
                                            count * H);
      for (int64_t i = 0; i < count; ++i) {
        const float* w = wide.data() + i * H;
        kernel.dot[0](&w, 1, w, H, norm + first + i);
        norm[first + i] = std::sqrt(norm[first + i]);
        if (!want_int16) continue;
        const auto scale = kernel.quantise_int16(
            w, H, copies.int16.mutable_data_ptr<int16_t>() + (first + i) * stride);
        copies.int16_scale.mutable_data_ptr<float>()[first + i] = scale.scale;
        // The score is rounded four times, and once more in each part, of a product of norms.
        copies.int16_error.mutable_data_ptr<float>()[first + i] =
            scale.residual + scale.norm * int16_roundoff;
      }
      if (want_int8)
        kernel.quantise_panel(layout, wide.data(), count,
                              copies.int8.mutable_data_ptr<uint8_t>() + p * layout.panel_bytes());
    }
  });
  return copies;
}

PreparedLayer prepare_layer(const Layer& layer, Screening screening) {
  const at::Tensor W_enc = layer.declared.W_enc.detach().contiguous();
  at::Tensor norms;
  const WeightCopies copies = make_copies(W_enc, screening, layer.name(), norms);
  return {layer, W_enc, copies, LayerBounds(layer, norms)};
}

}  // namespace sparse_transcoder::cpu
