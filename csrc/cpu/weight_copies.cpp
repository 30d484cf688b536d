#include "cpu/weight_copies.h"

#include <ATen/ATen.h>
#include <sys/mman.h>

#include <cmath>
#include <vector>

#include "bounds.h"

namespace sparse_transcoder::cpu {
namespace {

// Memory in huge pages where the system gives them, because rows are read from all over it.
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

Int8Panels WeightCopies::int8_panels(int64_t hidden_size) const {
  return {Int8Layout(hidden_size), int8.defined() ? int8.const_data_ptr<uint8_t>() : nullptr};
}

Int16Rows WeightCopies::int16_rows() const {
  if (!int16.defined()) return {};
  return {int16.const_data_ptr<int16_t>(), int16_scale.const_data_ptr<float>(),
          int16_error.const_data_ptr<float>(), int16.stride(0)};
}

namespace {

// Tensors for the copies that `screening` asks for, not filled yet.
WeightCopies allocate_copies(const at::Tensor& W_enc, Screening screening, const std::string& who) {
  const int64_t features = W_enc.size(0), size = W_enc.size(1);
  const int64_t panels = (features + panel_features - 1) / panel_features;
  const bool automatic = screening == Screening::automatic;
  WeightCopies copies;
  if ((screening == Screening::int8 || automatic) && size <= Int8Layout::max_inputs)
    copies.int8 = allocate({panels, Int8Layout(size).panel_bytes()}, at::kByte, who);
  // Weights of two bytes are their own sharper screen: an int16 copy would save nothing.
  if (screening == Screening::int16 ||
      (automatic && active_kernels().crossovers.fast_int16 && W_enc.scalar_type() == at::kFloat)) {
    copies.int16 = allocate({features, int16_stride(size)}, at::kShort, who);
    copies.int16_scale = at::empty({features}, at::kFloat);
    copies.int16_error = at::empty({features}, at::kFloat);
  }
  return copies;
}

// Fills the int16 copy of one feature from its weights w [size] in float32.
void copy_as_int16(const WeightCopies& copies, const float* w, int64_t size, int64_t feature) {
  int16_t* row = copies.int16.mutable_data_ptr<int16_t>() + feature * int16_stride(size);
  const Int16Scale scale = active_kernels().quantise_int16(w, size, row);
  copies.int16_scale.mutable_data_ptr<float>()[feature] = scale.scale;
  copies.int16_error.mutable_data_ptr<float>()[feature] =
      scale.error + scale.norm * static_cast<float>(int16_score_rounding(int16_part_count(size)));
}

// Fills the copies, and norms [F]: those of the rows of W_enc, NaN or Inf where one is not finite.
void make_copies(const at::Tensor& W_enc, const WeightCopies& copies, double* norms,
                 int64_t workers, ThreadPool& threads) {
  const KernelTable& kernels = active_kernels();
  const int64_t features = W_enc.size(0), size = W_enc.size(1);
  const Int8Layout layout(size);
  const auto widen = kernels.widen[static_cast<int>(dtype_of(W_enc.scalar_type()))];
  const auto* weights = static_cast<const char*>(W_enc.const_data_ptr());
  const int64_t row_bytes = size * W_enc.element_size();
  const int64_t panels = (features + panel_features - 1) / panel_features;
  std::vector<std::vector<float>> wide_panels(workers, std::vector<float>(panel_features * size));
  threads.run(workers, panels, [&](int64_t worker, int64_t panel) {
    float* wide = wide_panels[worker].data();
    const int64_t first = panel * panel_features;
    const int64_t count = std::min(panel_features, features - first);
    widen(weights + first * row_bytes, wide, count * size);
    for (int64_t i = 0; i < count; ++i) {
      const float* w = wide + i * size;
      double squares;
      kernels.dot[static_cast<int>(Dtype::float32)](&w, 1, w, size, &squares);
      norms[first + i] = std::sqrt(squares);
      if (copies.int16.defined()) copy_as_int16(copies, w, size, first + i);
    }
    if (copies.int8.defined())
      kernels.quantise_panel(
          layout, wide, count,
          copies.int8.mutable_data_ptr<uint8_t>() + panel * layout.panel_bytes());
  });
}

}  // namespace

PreparedLayer prepare_layer(const Layer& layer, Screening screening, int64_t workers,
                            ThreadPool& threads) {
  const at::Tensor W_enc = layer.declared.W_enc.detach().contiguous();
  const WeightCopies copies = allocate_copies(W_enc, screening, layer.name());
  const at::Tensor norms = at::empty({layer.features}, at::kDouble);
  make_copies(W_enc, copies, norms.mutable_data_ptr<double>(), workers, threads);
  return {layer, W_enc, copies, LayerBounds(layer, norms)};
}

}  // namespace sparse_transcoder::cpu
