#include "check_weights.h"

#include <ATen/ATen.h>

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
  if (shape.size() == 1)
    TORCH_CHECK_VALUE(at::isfinite(tensor.detach()).all().item<bool>(), who, ": ", name,
                      " must be finite, got NaN or Inf");
}

}  // namespace

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
  // A decoder that writes to n layers has their rows one after the other.
  const int64_t written =
      declared.W_dec.defined() && declared.W_dec.dim() == 2 ? declared.W_dec.size(0) : H;
  TORCH_CHECK_VALUE(written > 0 && written % H == 0, who,
                    ": W_dec must be [H, F] or [n * H, F] with H ", H, ", got ",
                    declared.W_dec.sizes());
  check(declared.W_dec, "W_dec", {written, F});
  // Its bias is that of all their rows, or of the layer itself alone.
  check(declared.b_dec, "b_dec",
        {declared.b_dec.defined() && declared.b_dec.sizes() == at::IntArrayRef(H) ? H : written});
  check(declared.threshold, "threshold", {F});
  check(declared.W_skip, "W_skip", {H, H});
  check(declared.input_bias, "input_bias", {H});
  check(declared.ln_weight, "ln_weight", {H});
  check(declared.ln_bias, "ln_bias", {H});
  TORCH_CHECK_VALUE(declared.ln_weight.defined() == declared.ln_bias.defined(), who,
                    ": LayerNorm needs both ln_weight and ln_bias, got one");
  TORCH_CHECK_VALUE(!declared.k || *declared.k > 0, who, ": k must be at least 1, got ",
                    *declared.k);
}

}  // namespace sparse_transcoder
