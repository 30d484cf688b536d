#include "check_weights.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

namespace sparse_transcoder {
namespace {

bool is_weight_dtype(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

void check_tensor(const at::Tensor& tensor, const char* name, at::IntArrayRef shape,
                  const std::string& who, at::Device device) {
  if (!tensor.defined()) return;
  TORCH_CHECK_TYPE(is_weight_dtype(tensor.scalar_type()) && tensor.layout() == at::kStrided, who,
                   ": ", name, " must be a dense float32, bfloat16 or float16 tensor, got ",
                   c10::getDtypeNames(tensor.scalar_type()).first, " ", tensor.layout());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, who, ": ", name, " must be ", shape, ", got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == device, who, ": ", name, " must be on ", device,
                    " like W_enc, got ", tensor.device());
  TORCH_CHECK_VALUE(is_plain(tensor), who, ": ", name,
                    " must be in memory as it is, got a freed or a lazy tensor");
  if (shape.size() == 1)
    TORCH_CHECK_VALUE(at::isfinite(tensor.detach()).all().item<bool>(), who, ": ", name,
                      " must be finite, got NaN or Inf");
}

}  // namespace

bool is_plain(const at::Tensor& tensor) {
  if (tensor.is_neg() || !tensor.has_storage()) return false;
  const size_t bytes = at::detail::computeStorageNbytes(
      tensor.sizes(), tensor.strides(), tensor.element_size(), tensor.storage_offset());
  return bytes == 0 || (tensor.storage().data() != nullptr && tensor.storage().nbytes() >= bytes);
}

std::string describe(int64_t id, const LayerWeights& declared) {
  std::string name = "layer " + std::to_string(id);
  return declared.source.empty() ? name : name + " (" + declared.source + ")";
}

void check_weights(int64_t id, const LayerWeights& declared) {
  const std::string who = describe(id, declared);
  const at::Tensor& W = declared.W_enc;
  TORCH_CHECK_VALUE(W.defined() && declared.b_enc.defined(), who,
                    ": W_enc [F, H] and b_enc [F] are needed, got no ",
                    W.defined() ? "b_enc" : "W_enc");
  TORCH_CHECK_VALUE(W.dim() == 2 && W.size(0) > 0 && W.size(1) > 0, who,
                    ": W_enc must be [F, H] and not empty, got ", W.sizes());
  TORCH_CHECK_VALUE(W.device().is_cpu() || W.device().is_cuda(), who,
                    ": W_enc must be on cpu or cuda, got ", W.device());
  const int64_t F = W.size(0), H = W.size(1);
  TORCH_CHECK_VALUE(F < (int64_t{1} << 31), who, ": W_enc must have fewer than 2^31 features, got ",
                    F);
  const auto check = [&](const at::Tensor& tensor, const char* name, at::IntArrayRef shape) {
    check_tensor(tensor, name, shape, who, W.device());
  };
  check(W, "W_enc", {F, H});
  check(declared.b_enc, "b_enc", {F});
  const int64_t layers = declared.write_layers;
  TORCH_CHECK_VALUE(layers >= 1 && layers <= 1'000'000, who,
                    ": write_layers must be at least 1 and at most 1000000, got ", layers);
  TORCH_CHECK_VALUE(layers == 1 || declared.W_dec.defined(), who,
                    ": W_dec is needed with write_layers ", layers, ", got none");
  // A decoder that writes to one layer may write to a place of another width.
  const bool wide = layers == 1 && declared.W_dec.defined() && declared.W_dec.dim() == 2;
  const int64_t width = wide ? declared.W_dec.size(0) : H;
  TORCH_CHECK_VALUE(width > 0, who, ": W_dec must be [d_out, F] and not empty, got ",
                    declared.W_dec.sizes());
  check(declared.W_dec, "W_dec", {layers * width, F});
  // The bias is that of all layers written to, or of this layer alone.
  const bool own = declared.b_dec.defined() && declared.b_dec.sizes() == at::IntArrayRef(width);
  check(declared.b_dec, "b_dec", {own ? width : layers * width});
  check(declared.threshold, "threshold", {F});
  check(declared.W_skip, "W_skip", {width, H});
  check(declared.input_bias, "input_bias", {H});
  check(declared.ln_weight, "ln_weight", {H});
  check(declared.ln_bias, "ln_bias", {H});
  TORCH_CHECK_VALUE(declared.ln_weight.defined() == declared.ln_bias.defined(), who,
                    ": LayerNorm needs both ln_weight and ln_bias, got one");
  TORCH_CHECK_VALUE(!declared.k || *declared.k > 0, who, ": k must be at least 1, got ",
                    *declared.k);
}

}  // namespace sparse_transcoder
