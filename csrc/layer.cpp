#include "layer.h"

#include <ATen/ATen.h>

#include <array>
#include <cmath>
#include <limits>

#include "bounds.h"
#include "check_weights.h"

namespace sparse_transcoder {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

ActivationKind kind_of(const LayerWeights& declared) {
  if (declared.k) return ActivationKind::topk;
  return declared.threshold.defined() ? ActivationKind::jumprelu : ActivationKind::relu;
}

using Named = std::pair<const char*, const at::Tensor*>;

std::array<Named, 9> tensors_of(const LayerWeights& w) {
  return {Named{"W_enc", &w.W_enc},      {"b_enc", &w.b_enc},         {"W_dec", &w.W_dec},
          {"b_dec", &w.b_dec},           {"threshold", &w.threshold}, {"W_skip", &w.W_skip},
          {"input_bias", &w.input_bias}, {"ln_weight", &w.ln_weight}, {"ln_bias", &w.ln_bias}};
}

// The smallest active value of each feature. A feature is active when its activation reaches tau
// (inclusive), is positive, and is strictly above its own threshold.
at::Tensor smallest_active(const Layer& layer, const at::Tensor& threshold, float tau) {
  const float least = std::max(tau, std::numeric_limits<float>::denorm_min());
  const at::Tensor all = at::full({layer.features}, least, layer.bias.options());
  if (!threshold.defined()) return all;
  return at::maximum(all, at::nextafter(threshold, at::full_like(threshold, infinity)));
}

}  // namespace

Dtype dtype_of(at::ScalarType type) {
  if (type == at::kFloat) return Dtype::float32;
  return type == at::kBFloat16 ? Dtype::bfloat16 : Dtype::float16;
}

Layer::Layer(int64_t id, LayerWeights weights, at::Device device, float activation_threshold)
    : id(id), declared(std::move(weights)), device(device) {
  for (const auto& [name, tensor] : tensors_of(declared))
    if (tensor->defined()) stamps.emplace_back(*tensor);
  kind = kind_of(declared);
  features = declared.W_enc.size(0);
  hidden_size = declared.W_enc.size(1);
  max_active = kind == ActivationKind::topk ? std::min(*declared.k, features) : features;
  dtype = dtype_of(declared.W_enc.scalar_type());
  const auto place = [device](const at::Tensor& vector) {
    return vector.defined() ? vector.detach().to(at::kFloat).contiguous().to(device) : vector;
  };
  bias = place(declared.b_enc);
  input_bias = place(declared.input_bias);
  ln_weight = place(declared.ln_weight);
  ln_bias = place(declared.ln_bias);
  min_active = smallest_active(*this, place(declared.threshold), activation_threshold);
  max_bias = bias.abs().max().item<float>();
}

std::string Layer::name() const { return describe(id, declared); }

int64_t Layer::declared_bytes() const {
  int64_t bytes = 0;
  for (const auto& [name, tensor] : tensors_of(declared))
    if (tensor->defined()) bytes += tensor->nbytes();
  return bytes;
}

std::string Layer::changed() const {
  return name() +
         ": weights must stay as they were when the encoder was built, and hidden states while "
         "they "
         "are encoded, but some were changed; after a change of weights build a new encoder";
}

void Layer::check_unchanged() const {
  auto stamp = stamps.begin();
  for (const auto& [name, tensor] : tensors_of(declared))
    if (tensor->defined())
      TORCH_CHECK_VALUE((stamp++)->fits(*tensor), this->name(), ": ", name,
                        " must stay as it was when the encoder was built, it was changed since; "
                        "build a new encoder");
}

LayerBounds::LayerBounds(const Layer& layer, const at::Tensor& exact_norm) {
  const at::Tensor broken = at::isfinite(exact_norm).logical_not_();
  TORCH_CHECK_VALUE(!broken.any().item<bool>(), layer.name(),
                    ": W_enc must be finite, got NaN or Inf in feature ",
                    broken.nonzero()[0][0].item<int64_t>());
  const double root = std::sqrt(static_cast<double>(layer.hidden_size));
  norm = (exact_norm * round_up).to(at::kFloat).clamp_min_(min_norm_per_root * root);
  max_norm = norm.max().item<float>();

  const at::Tensor gate = layer.min_active.to(at::kDouble), bias = layer.bias.to(at::kDouble);
  const at::Tensor width = (gate.abs() + bias.abs()) * gate_rounding + underflow(layer.hidden_size);
  const int64_t panels = (layer.features + panel_features - 1) / panel_features;
  surely_out_below = at::full({panels * panel_features}, infinity, layer.bias.options());
  surely_out_below.narrow(0, 0, layer.features).copy_(gate - bias - width);
  surely_in_from = (gate - bias + width).to(at::kFloat);
}

FeatureBounds LayerBounds::from(const Layer& layer, int64_t feature) const {
  const auto at = [feature](const at::Tensor& vector) {
    return vector.const_data_ptr<float>() + feature;
  };
  return {at(norm), at(layer.bias), at(layer.min_active), at(surely_out_below), at(surely_in_from)};
}

int64_t LayerBounds::bytes(const Layer& layer) const {
  int64_t bytes = 0;
  for (const at::Tensor* vector :
       {&norm, &layer.bias, &layer.min_active, &surely_out_below, &surely_in_from})
    bytes += vector->nbytes();
  return bytes;
}

}  // namespace sparse_transcoder
