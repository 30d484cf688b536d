#include "cuda/weight_copy.h"

#include <ATen/ATen.h>

#include "bounds.h"
#include "cuda/products.h"

namespace sparse_transcoder::cuda {
namespace {

// Of a bfloat16 number in its normal range: half a unit in the last of its 8 bits, relative.
constexpr double max_bf16_error = 0x1p-9;

// Calls block(first, count) for blocks of rows, so that no float64 copy of the matrix exists.
template <typename Block>
void by_blocks(const at::Tensor& W_enc, const Block& block) {
  const int64_t features = W_enc.size(0);
  const int64_t size = std::max<int64_t>(1, (int64_t{1} << 20) / W_enc.size(1));
  for (int64_t first = 0; first < features; first += size)
    block(first, std::min(size, features - first));
}

// ||w|| of every feature, [F] float64.
at::Tensor row_norms(const at::Tensor& W_enc) {
  at::Tensor norm = at::empty({W_enc.size(0)}, W_enc.options().dtype(at::kDouble));
  by_blocks(W_enc, [&](int64_t first, int64_t count) {
    const at::Tensor rows = W_enc.narrow(0, first, count).to(at::kDouble);
    norm.narrow(0, first, count).copy_(at::linalg_vector_norm(rows, 2, {1}));
  });
  return norm;
}

// W_enc on the device, or in pinned host memory.
at::Tensor place(const Layer& layer, const Options& options, bool streamed) {
  const at::Tensor W_enc = layer.declared.W_enc.detach().contiguous();
  const auto refuse = [&](const std::string& where, const char* less) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, layer.name(), ": out of memory: the encoder needs ",
                     W_enc.nbytes(), " bytes ", where, "; ", less,
                     " device_weight_bytes needs less, got ", options.device_weight_bytes);
  };
  if (streamed) {
    try {
      return pinned(W_enc);
    } catch (const c10::Error&) {
      refuse("of pinned host memory", "a higher");
    }
  } else {
    try {
      return W_enc.to(layer.device);
    } catch (const c10::OutOfMemoryError&) {
      refuse("on " + layer.device.str(), "a lower");
    }
  }
  return W_enc;
}

}  // namespace

int64_t resident_bytes(const Layer& layer, const Options& options) {
  const at::Tensor& W_enc = layer.declared.W_enc;
  const bool copied = options.screening != Screening::off && layer.dtype != Dtype::bfloat16;
  return W_enc.numel() * (W_enc.element_size() + (copied ? 2 : 0));
}

PreparedLayer prepare_layer(const Layer& layer, const Options& options, bool streamed) {
  const at::Tensor W_enc = place(layer, options, streamed);
  PreparedLayer prepared = {layer, W_enc, streamed,
                            LayerBounds(layer, row_norms(W_enc).to(layer.device))};
  if (options.screening != Screening::off) {
    prepared.bf16_screen = layer.dtype == Dtype::bfloat16 || !streamed;
    if (prepared.bf16_screen && layer.dtype != Dtype::bfloat16) add_bf16_copy(prepared);
  }
  return prepared;
}

void add_bf16_copy(PreparedLayer& layer) {
  const at::Tensor& W_enc = layer.W_enc;
  try {
    layer.bf16 = at::empty(W_enc.sizes(), W_enc.options().dtype(at::kBFloat16));
  } catch (const c10::OutOfMemoryError&) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, layer.name(),
                     ": out of memory: the screening copy needs ", 2 * W_enc.numel(), " bytes on ",
                     W_enc.device(),
                     "; screening \"off\" makes none, and a lower device_weight_bytes needs less");
  }
  at::Tensor error = at::empty({W_enc.size(0)}, W_enc.options().dtype(at::kDouble));
  by_blocks(W_enc, [&](int64_t first, int64_t count) {
    const at::Tensor rows = W_enc.narrow(0, first, count);
    at::Tensor copy = layer.bf16.narrow(0, first, count);
    copy.copy_(rows);
    error.narrow(0, first, count)
        .copy_(at::linalg_vector_norm(rows.to(at::kDouble) - copy.to(at::kDouble), 2, {1}));
  });
  error.mul_(round_up);
  at::Tensor& norm = layer.bounds.norm;
  const double share =
      std::clamp((error / norm.to(at::kDouble)).max().item<double>(), 0x1p-30, max_bf16_error);
  layer.bf16_error = static_cast<float>(share * round_up);
  norm = at::maximum(norm, (error / share).to(at::kFloat));
}

}  // namespace sparse_transcoder::cuda
