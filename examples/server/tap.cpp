#include "tap.h"

#include <ggml-backend.h>

#include <algorithm>
#include <stdexcept>

namespace feature_server {
namespace {

// What llama.cpp's graphs call the places, read in its src/models. No name: the graph does not show
// the place.
struct Names {
  const char *architecture, *mlp_in, *resid_mid;
  // Whether the MLP's output goes to the residual stream as it is, so that adding to one is adding
  // to the other. Elsewhere a norm comes between.
  bool plain_mlp_out;
};

constexpr Names graphs[] = {
    {"llama", "ffn_norm", "ffn_inp", true},   {"mistral3", "ffn_norm", "ffn_inp", true},
    {"qwen2", "ffn_norm", "ffn_inp", true},   {"qwen3", "ffn_norm", "ffn_inp", true},
    {"smollm3", "ffn_norm", "ffn_inp", true}, {"gpt2", "ffn_norm", "ffn_inp", true},
    {"phi3", "ffn_norm", nullptr, true},      {"gemma", "ffn_norm", "sa_out", true},
    {"gemma2", "ffn_norm", "sa_out", false},  {"gemma3", "ffn_norm", "sa_out", false},
};
constexpr const char* resid_post = "l_out";

std::string without_block(const std::string& hook, int64_t layer) {
  const std::string block = "blocks." + std::to_string(layer) + ".";
  return hook.rfind(block, 0) == 0 ? hook.substr(block.size()) : hook;
}

}  // namespace

Place find_place(const std::string& architecture, int64_t layer, const std::string& hook_in,
                 const std::string& hook_out) {
  const auto* const names =
      std::find_if(std::begin(graphs), std::end(graphs),
                   [&](const Names& one) { return architecture == one.architecture; });
  if (names == std::end(graphs)) {
    std::string known;
    for (const Names& one : graphs)
      known += std::string(known.empty() ? "" : ", ") + one.architecture;
    throw std::invalid_argument("the model's architecture must be one of " + known + ", got " +
                                architecture);
  }
  const std::string in = without_block(hook_in, layer), out = without_block(hook_out, layer),
                    number = "-" + std::to_string(layer);
  const char* read = in == "mlp.hook_in"       ? names->mlp_in
                     : in == "hook_resid_mid"  ? names->resid_mid
                     : in == "hook_resid_post" ? resid_post
                                               : nullptr;
  if (!read)
    throw std::invalid_argument("layer " + std::to_string(layer) +
                                ": the transcoder's hook must be mlp.hook_in" +
                                (names->resid_mid ? ", hook_resid_mid" : "") +
                                " or hook_resid_post in a model of architecture " + architecture +
                                ", got " + (in.empty() ? "none" : in));
  const bool writes = out == "hook_resid_post" || (out == "mlp.hook_out" && names->plain_mlp_out);
  return {read + number, writes ? resid_post + number : ""};
}

Tap::Tap(const std::map<int64_t, Place>& places, int64_t width, int64_t max_rows)
    : width_(width), row_(width) {
  for (const auto& [layer, place] : places) {
    layers_[layer].rows.resize(max_rows * width);
    names_[place.read] = {layer, true, place.read == place.write};
    if (!place.write.empty() && place.write != place.read)
      names_[place.write] = {layer, false, true};
  }
}

void Tap::begin(std::vector<bool> has_output) {
  for (auto& [id, layer] : layers_) layer.wanted = layer.seen = false;
  changes_.clear();
  fault_.clear();
  output_rows_.clear();
  int64_t outputs = 0;
  for (const bool output : has_output) output_rows_.push_back(output ? outputs++ : -1);
}

const float* Tap::rows(int64_t layer) const {
  const Layer& read = layers_.at(layer);
  if (!fault_.empty()) throw std::runtime_error(fault_);
  if (!read.seen)
    throw std::runtime_error("the model's graph does not show what layer " + std::to_string(layer) +
                             " reads");
  return read.rows.data();
}

bool Tap::wants(const Here& here) const {
  if (here.reads && layers_.at(here.layer).wanted) return true;
  return here.writes && std::any_of(changes_.begin(), changes_.end(),
                                    [&](const Change& one) { return one.layer == here.layer; });
}

int64_t Tap::row_of(const ggml_tensor* tensor, int64_t row) const {
  return tensor->ne[1] == static_cast<int64_t>(output_rows_.size()) ? row : output_rows_[row];
}

// The memory of a tensor is used again by later nodes, so rows are copied here.
void Tap::take(ggml_tensor* tensor, const Here& here) {
  const auto row_count = static_cast<int64_t>(output_rows_.size());
  const int64_t outputs =
      std::count_if(output_rows_.begin(), output_rows_.end(), [](int64_t row) { return row >= 0; });
  if (tensor->type != GGML_TYPE_F32 || tensor->ne[0] != width_ ||
      (tensor->ne[1] != row_count && tensor->ne[1] != outputs) || tensor->ne[2] != 1) {
    fault_ = std::string("the graph's ") + tensor->name + " must be float32 [" +
             std::to_string(row_count) + ", " + std::to_string(width_) + "], got " +
             ggml_type_name(tensor->type) + " [" + std::to_string(tensor->ne[1]) + ", " +
             std::to_string(tensor->ne[0]) + "]";
    return;
  }
  const size_t bytes = width_ * sizeof(float);
  Layer& layer = layers_.at(here.layer);
  if (here.reads && layer.wanted) {
    layer.seen = true;
    for (int64_t row = 0; row < row_count; ++row)
      if (const int64_t from = row_of(tensor, row); from >= 0)
        ggml_backend_tensor_get(tensor, layer.rows.data() + row * width_, from * tensor->nb[1],
                                bytes);
  }
  if (!here.writes) return;
  for (const Change& one : changes_) {
    if (one.layer != here.layer) continue;
    for (int64_t row = one.first; row < one.first + one.count; ++row) {
      const int64_t at = row_of(tensor, row);
      if (at < 0) continue;
      ggml_backend_tensor_get(tensor, row_.data(), at * tensor->nb[1], bytes);
      for (int64_t i = 0; i < width_; ++i) row_[i] += one.delta[i];
      ggml_backend_tensor_set(tensor, row_.data(), at * tensor->nb[1], bytes);
    }
  }
}

bool Tap::on_tensor(ggml_tensor* tensor, bool asks, void* self) {
  Tap& tap = *static_cast<Tap*>(self);
  const auto found = tap.names_.find(tensor->name);
  if (found == tap.names_.end()) return !asks;
  if (asks) return tap.wants(found->second);
  tap.take(tensor, found->second);
  return true;
}

}  // namespace feature_server
