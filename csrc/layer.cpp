#include "layer.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

#include "cpu/thread_pool.h"

namespace sparse_transcoder {
namespace {

// Half an ulp of float32, relative.
constexpr double unit_roundoff = 0x1p-24;

bool is_weight_dtype(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

at::Tensor as_float(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.detach().to(at::kFloat).contiguous() : tensor;
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

// ||w_f||, block by block so that no float64 copy of the matrix exists. [F] float64
at::Tensor row_norms(const at::Tensor& W_enc) {
  const int64_t features = W_enc.size(0);
  const int64_t block =
      std::max<int64_t>(1, (int64_t{1} << 20) / std::max<int64_t>(1, W_enc.size(1)));
  at::Tensor norm = at::empty({features}, W_enc.options().dtype(at::kDouble));
  for (int64_t first = 0; first < features; first += block) {
    const int64_t count = std::min(block, features - first);
    norm.narrow(0, first, count)
        .copy_(at::linalg_vector_norm(W_enc.narrow(0, first, count).to(at::kDouble), 2, {1}));
  }
  return norm;
}

}  // namespace

Dtype kernel_dtype(at::ScalarType type) {
  return type == at::kFloat      ? Dtype::float32
         : type == at::kBFloat16 ? Dtype::bfloat16
                                 : Dtype::float16;
}

std::string describe(int64_t id, const LayerWeights& weights) {
  std::string name = "layer " + std::to_string(id);
  return weights.source.empty() ? name : name + " (" + weights.source + ")";
}

void check_weights(int64_t id, const LayerWeights& weights) {
  const std::string who = describe(id, weights);
  const at::Tensor& W = weights.W_enc;
  TORCH_CHECK_VALUE(W.defined() && weights.b_enc.defined(), who,
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
  check(weights.b_enc, "b_enc", {F});
  // A decoder that writes to n layers has their rows one after the other.
  const int64_t written =
      weights.W_dec.defined() && weights.W_dec.dim() == 2 ? weights.W_dec.size(0) : H;
  TORCH_CHECK_VALUE(written > 0 && written % H == 0, who,
                    ": W_dec must be [H, F] or [n * H, F] with H ", H, ", got ",
                    weights.W_dec.sizes());
  check(weights.W_dec, "W_dec", {written, F});
  // Its bias is that of all their rows, or of the layer itself alone.
  check(weights.b_dec, "b_dec",
        {weights.b_dec.defined() && weights.b_dec.sizes() == at::IntArrayRef(H) ? H : written});
  check(weights.threshold, "threshold", {F});
  check(weights.W_skip, "W_skip", {H, H});
  check(weights.input_bias, "input_bias", {H});
  check(weights.ln_weight, "ln_weight", {H});
  check(weights.ln_bias, "ln_bias", {H});
  TORCH_CHECK_VALUE(weights.ln_weight.defined() == weights.ln_bias.defined(), who,
                    ": LayerNorm needs both ln_weight and ln_bias, got one");
  TORCH_CHECK_VALUE(!weights.k || *weights.k > 0, who, ": k must be at least 1, got ", *weights.k);
}

Layer::Layer(int64_t id, LayerWeights declared, const Options& options, Placement placement)
    : id(id), weights(std::move(declared)), device(placement.device), streamed(placement.streamed) {
  const DefaultFloatingPoint environment;
  const std::string who = describe(id, weights);
  check_weights(id, weights);
  features = weights.W_enc.size(0);
  hidden_size = weights.W_enc.size(1);
  TORCH_CHECK_VALUE(options.top_k != Options::layer_k || weights.k, who,
                    ": top_k=None takes k from the checkpoint, which declares none");

  most_active = weights.k ? std::min(*weights.k, features) : features;
  top_k = std::min(options.top_k == Options::layer_k ? *weights.k : options.top_k, features);
  selected = std::min(top_k, most_active);
  dtype = kernel_dtype(weights.W_enc.scalar_type());
  W_enc = weights.W_enc.detach().contiguous();
  const auto refuse = [&](const std::string& where, const char* less) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, who, ": out of memory: the encoder needs ",
                     W_enc.nbytes(), " bytes ", where, "; ", less,
                     " device_weight_bytes needs less, got ", options.device_weight_bytes);
  };
  if (streamed) {
    try {
      W_enc = W_enc.pin_memory();
    } catch (const c10::Error&) {
      refuse("of pinned host memory", "a higher");
    }
  } else {
    try {
      W_enc = W_enc.to(device);
    } catch (const c10::OutOfMemoryError&) {
      refuse("on " + device.str(), "a lower");
    }
  }
  const auto place = [this](const at::Tensor& tensor) {
    return tensor.defined() ? as_float(tensor).to(device) : tensor;
  };
  bias = place(weights.b_enc);
  input_bias = place(weights.input_bias);
  ln_weight = place(weights.ln_weight);
  ln_bias = place(weights.ln_bias);
  const at::Tensor threshold = place(weights.threshold);

  at::Tensor exact_norm;
  if (device.is_cpu())
    copies = make_copies(W_enc, options.screening, who, exact_norm);
  else
    exact_norm = row_norms(W_enc).to(device);
  const at::Tensor broken = at::isfinite(exact_norm).logical_not_();
  TORCH_CHECK_VALUE(!broken.any().item<bool>(), who,
                    ": W_enc must be finite, got NaN or Inf in feature ",
                    broken.nonzero()[0][0].item<int64_t>());
  // Rounded up, and not under what numbers of the normal range give: below it a product may lose
  // more, relatively.
  norm = (exact_norm * (1 + 0x1p-20))
             .to(at::kFloat)
             .clamp_min_(std::numeric_limits<float>::min() *
                         std::sqrt(static_cast<double>(hidden_size)));
  largest_norm = norm.max().item<float>();
  if (device.is_cuda() && options.screening != Screening::off) {
    bf16_screen = dtype == Dtype::bfloat16 || !streamed;
    if (bf16_screen && dtype != Dtype::bfloat16) add_bf16_copy(copies, W_enc, who, norm);
  }

  // A feature is active when its activation reaches tau (inclusive), is positive, and is strictly
  // above its own threshold: one inclusive gate per feature.
  const float least =
      std::max(options.activation_threshold, std::numeric_limits<float>::denorm_min());
  gate = at::full({features}, least, bias.options());
  if (threshold.defined())
    gate = at::maximum(
        gate,
        at::nextafter(threshold, at::full_like(threshold, std::numeric_limits<float>::infinity())));

  // Proof of the slack: near the gate every float32 operation of the screen (score +- margin, the
  // rounding of the exact value to float32) works on numbers no larger than |gate| + |bias|, each
  // with a relative error of at most unit_roundoff; there are fewer than eight.
  const at::Tensor wide_gate = gate.to(at::kDouble), wide_bias = bias.to(at::kDouble);
  const at::Tensor slack =
      (wide_gate.abs() + wide_bias.abs()) * (8 * unit_roundoff) + underflow(hidden_size);
  constexpr int64_t panel = cpu::panel_features;
  low = at::full({(features + panel - 1) / panel * panel}, std::numeric_limits<float>::infinity(),
                 bias.options());
  low.narrow(0, 0, features).copy_(wide_gate - wide_bias - slack);
  high = (wide_gate - wide_bias + slack).to(at::kFloat);
  largest_bias = bias.abs().max().item<float>();
}

int64_t Layer::weight_bytes() const {
  int64_t bytes = 0;
  for (const at::Tensor* t :
       {&weights.W_enc, &weights.b_enc, &weights.W_dec, &weights.b_dec, &weights.threshold,
        &weights.W_skip, &weights.input_bias, &weights.ln_weight, &weights.ln_bias})
    if (t->defined()) bytes += t->nbytes();
  return bytes + (W_enc.is_alias_of(weights.W_enc) ? 0 : W_enc.nbytes());
}

int64_t Layer::gate_bytes() const {
  return norm.nbytes() + bias.nbytes() + gate.nbytes() + low.nbytes() + high.nbytes();
}

FeatureBounds Layer::gate_at(int64_t feature) const {
  const auto at = [feature](const at::Tensor& t) { return t.const_data_ptr<float>() + feature; };
  return {at(norm), at(bias), at(gate), at(low), at(high)};
}

}  // namespace sparse_transcoder
