// Engine: checks what callers pass, allocates their outputs, borrows workspaces and hands the work
// to the device's encode path.
#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <sparse_transcoder/engine.h>

#include <algorithm>
#include <cmath>
#include <sstream>

#include "backend.h"
#include "check_weights.h"
#include "decode.h"
#include "floating_point.h"

namespace sparse_transcoder {
namespace {

void check_options(const Options& options) {
  TORCH_CHECK_VALUE(options.top_k >= 0,
                    "top_k must be at least 1, or 0 for each layer's own k, got ", options.top_k);
  TORCH_CHECK_VALUE(options.chunk_size >= 1, "chunk_size must be at least 1, got ",
                    options.chunk_size);
  TORCH_CHECK_VALUE(options.lanes >= 0, "lanes must be at least 1, or 0 to choose, got ",
                    options.lanes);
  TORCH_CHECK_VALUE(!std::isnan(options.activation_threshold),
                    "activation_threshold must be a number, got NaN");
  TORCH_CHECK_VALUE(options.device_weight_bytes >= -1,
                    "device_weight_bytes must be at least 0, got ", options.device_weight_bytes);
}

constexpr const char* no_kernels =
    ": this build of sparse_transcoder has no CUDA kernels; pip's option "
    "-Ccmake.define.SPARSE_TRANSCODER_CUDA=ON builds them or says what is missing";

// Only a build with CUDA kernels takes a tensor on CUDA.
void check_kernels(const std::string& what, at::Device device) {
  TORCH_CHECK_VALUE(!device.is_cuda() || cuda_kernels(), what, " must be on cpu, got ", device,
                    no_kernels);
}

// Where a layer is encoded: where its weights are, unless Options::device_weight_bytes brings it to
// the current CUDA device.
at::Device device_of(const LayerWeights& declared, const Options& options) {
  if (options.device_weight_bytes < 0 || !declared.W_enc.is_cpu()) return declared.W_enc.device();
  TORCH_CHECK_VALUE(c10::impl::hasDeviceGuardImpl(at::kCUDA) &&
                        c10::impl::VirtualGuardImpl(at::kCUDA).deviceCount() > 0,
                    "device_weight_bytes needs a CUDA device, torch sees none");
  TORCH_CHECK_VALUE(cuda_kernels(), "device_weight_bytes must be -1, got ",
                    options.device_weight_bytes, no_kernels);
  return c10::impl::VirtualGuardImpl(at::kCUDA).getDevice();
}

void check_hidden(const Layer& layer, const at::Tensor& hidden) {
  const std::string who = "layer " + std::to_string(layer.id);
  TORCH_CHECK_TYPE(hidden.defined(), who, ": hidden must be a tensor, got none");
  TORCH_CHECK_VALUE(!hidden.is_nested(), who, ": hidden must be dense, got a nested tensor");
  const auto dtype = hidden.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, who,
                   ": hidden must be float32, bfloat16 or float16, got ",
                   c10::getDtypeNames(dtype).first);
  TORCH_CHECK_VALUE(hidden.layout() == at::kStrided, who, ": hidden must be dense, got ",
                    hidden.layout());
  TORCH_CHECK_VALUE(hidden.dim() == 2 || hidden.dim() == 3, who,
                    ": hidden must be [B, T, H] or [T, H], got ", hidden.sizes());
  TORCH_CHECK_VALUE(hidden.size(-1) == layer.hidden_size, who, ": hidden must be [.., ",
                    layer.hidden_size, "], got ", hidden.sizes());
  check_kernels(who + ": hidden", hidden.device());
  TORCH_CHECK_VALUE(hidden.device() == layer.device, who, ": hidden must be on ", layer.device,
                    layer.device == layer.declared.W_enc.device() ? " like the weights"
                                                                  : " where the layer is encoded",
                    ", got ", hidden.device());
  TORCH_CHECK_VALUE(is_plain(hidden.is_neg() ? at::_neg_view(hidden) : hidden), who,
                    ": hidden must be in memory, got a freed or a lazy tensor");
}

// Outputs shaped like hidden, [.., K], [.., K] and [..].
Features allocate(const Layer& layer, const at::Tensor& hidden, int64_t k) {
  std::vector<int64_t> rows(hidden.sizes().begin(), hidden.sizes().end() - 1), ranks = rows;
  ranks.push_back(k);
  const auto options = hidden.options().requires_grad(false);
  try {
    return {at::empty(ranks, options.dtype(at::kFloat)), at::empty(ranks, options.dtype(at::kLong)),
            at::empty(rows, options.dtype(at::kFloat))};
  } catch (const c10::Error&) {
    const int64_t bytes = hidden.numel() / layer.hidden_size * (12 * k + 4);
    TORCH_CHECK_WITH(OutOfMemoryError, false, "layer ", layer.id,
                     ": out of memory: the result needs ", bytes,
                     " bytes; a lower top_k needs less, got top_k ", k);
  }
}

void check_format(const Layer& layer, const SparseFormat& format) {
  TORCH_CHECK_TYPE(format.features == at::kLong || format.features == at::kUInt32 ||
                       format.features == at::kUInt16,
                   "features must be int64, uint32 or uint16, got ",
                   c10::getDtypeNames(format.features).first);
  TORCH_CHECK_TYPE(format.activations == at::kFloat || format.activations == at::kHalf,
                   "activations must be float32 or float16, got ",
                   c10::getDtypeNames(format.activations).first);
  TORCH_CHECK_VALUE(format.features != at::kUInt16 || layer.features <= 65536, "layer ", layer.id,
                    ": uint16 holds at most 65536 features, got ", layer.features);
}

std::string join(const std::map<int64_t, Layer>& layers) {
  std::ostringstream names;
  for (const auto& [id, layer] : layers) names << (id == layers.begin()->first ? "" : ", ") << id;
  return names.str();
}

// An empty list. It is the calling thread's, so that its capacity stays.
std::vector<Request>& empty_requests() {
  thread_local std::vector<Request> requests;
  requests.clear();
  return requests;
}

// The hidden states in memory. What torch negates when it is read is copied, and the copy is kept.
Hidden in_memory(const at::Tensor& hidden, std::vector<at::Tensor>& kept) {
  return view_of(hidden.is_neg() ? kept.emplace_back(hidden.resolve_neg()) : hidden);
}

void check_rows(const Layer& layer, const LayerRows& rows) {
  const std::string who = "layer " + std::to_string(layer.id);
  TORCH_CHECK_VALUE(rows.row_count >= 0, who, ": row_count must be at least 0, got ",
                    rows.row_count);
  TORCH_CHECK_TYPE(
      rows.dtype == at::kFloat || rows.dtype == at::kBFloat16 || rows.dtype == at::kHalf, who,
      ": hidden must be float32, bfloat16 or float16, got ", c10::getDtypeNames(rows.dtype).first);
  TORCH_CHECK_VALUE(rows.stride >= 0, who, ": stride must be at least 0, got ", rows.stride);
  TORCH_CHECK_VALUE(
      rows.row_count == 0 || (rows.hidden && rows.activations && rows.indices && rows.sparsity),
      who, ": hidden, activations, indices and sparsity must not be null");
  TORCH_CHECK_VALUE(!rows.active || layer.device.is_cpu(), who,
                    ": active is counted on cpu alone, the layer is encoded on ", layer.device);
}

}  // namespace

// CUDA devices come first: their work runs on while the CPU's layers are encoded.
struct CudaFirst {
  bool operator()(const at::Device& a, const at::Device& b) const {
    return std::make_pair(a.is_cpu(), a.index()) < std::make_pair(b.is_cpu(), b.index());
  }
};

struct Engine::State {
  Options options;
  std::map<int64_t, Layer> layers;
  std::map<at::Device, std::unique_ptr<Backend>, CudaFirst> backends;

  const Layer& layer(int64_t id) const {
    const auto found = layers.find(id);
    TORCH_CHECK_INDEX(found != layers.end(), "layer ", id,
                      ": there is no transcoder for it, only for layers ", join(layers));
    return found->second;
  }
  // Every call that reads weights begins with this.
  const Layer& unchanged_layer(int64_t id) const {
    const Layer& found = layer(id);
    found.check_unchanged();
    return found;
  }
  const Backend& backend(const Layer& layer) const { return *backends.at(layer.device); }
  // Requests are checked and have rows.
  void encode(const std::vector<Request>& requests, Explanation* explanation) const;
};

void Engine::State::encode(const std::vector<Request>& requests, Explanation* explanation) const {
  if (explanation) {
    *explanation = {};
    explanation->instruction_set = cpu_instruction_set();
  }
  if (requests.empty()) return;
  if (backends.size() == 1) return backends.begin()->second->encode(requests, explanation);
  for (const auto& [device, backend] : backends) {
    std::vector<Request> mine;
    for (const Request& request : requests)
      if (request.layer->device == device) mine.push_back(request);
    if (!mine.empty()) backend->encode(mine, explanation);
  }
}

Engine::Engine(std::map<int64_t, LayerWeights> weights, Options options)
    : state_(std::make_unique<State>()) {
  const DefaultFloatingPoint environment;
  check_options(options);
  TORCH_CHECK_VALUE(!weights.empty(), "transcoders must hold at least one layer, got none");
  state_->options = options;
  std::map<at::Device, std::vector<const Layer*>, CudaFirst> on;
  for (auto& [id, declared] : weights) {
    if (declared.W_enc.defined())
      check_kernels(describe(id, declared) + ": W_enc", declared.W_enc.device());
    check_weights(id, declared);
    const at::Device device = device_of(declared, options);
    const auto made = state_->layers.try_emplace(id, id, std::move(declared), device,
                                                 options.activation_threshold);
    k_out(made.first->second, options);  // refuses a layer that has no k
    on[device].push_back(&made.first->second);
  }
  for (const auto& [device, layers] : on)
    state_->backends.emplace(device, device.is_cpu() ? make_cpu_backend(layers, options)
                                                     : make_cuda_backend(layers, options, device));
}

Engine::Engine(Engine&&) noexcept = default;
Engine::~Engine() = default;

Features Engine::encode(int64_t layer, const at::Tensor& hidden) const {
  return encode({{layer, hidden}}).at(layer);
}

std::map<int64_t, Features> Engine::encode(
    const std::map<int64_t, at::Tensor>& hidden_states) const {
  for (const auto& [id, hidden] : hidden_states) check_hidden(state_->unchanged_layer(id), hidden);
  std::map<int64_t, Features> results;
  std::vector<Request>& requests = empty_requests();
  std::vector<at::Tensor> kept;
  for (const auto& [id, hidden] : hidden_states) {
    const Layer& layer = state_->layer(id);
    const int64_t k = k_out(layer, state_->options);
    const Features& out = results[id] = allocate(layer, hidden, k);
    if (hidden.numel() > 0) requests.push_back({&layer, in_memory(hidden, kept), k, view_of(out)});
  }
  state_->encode(requests, nullptr);
  return results;
}

void Engine::encode(std::span<const LayerRows> layers, Explanation* explanation) const {
  std::vector<Request>& requests = empty_requests();
  for (const LayerRows& rows : layers) {
    const Layer& layer = state_->unchanged_layer(rows.layer);
    check_rows(layer, rows);
    const int64_t stride = rows.stride > 0 ? rows.stride : layer.hidden_size;
    if (rows.row_count > 0)
      requests.push_back({&layer,
                          {rows.hidden, rows.dtype, 1, rows.row_count, {0, stride, 1}},
                          ranks(rows.layer),
                          {rows.activations, rows.indices, rows.sparsity, rows.active}});
  }
  state_->encode(requests, explanation);
}

int64_t Engine::ranks(int64_t layer) const { return k_out(state_->layer(layer), state_->options); }

SparseFeatures Engine::encode_sparse(int64_t layer, const at::Tensor& hidden) const {
  return encode_sparse({{layer, hidden}}).at(layer);
}

std::map<int64_t, SparseFeatures> Engine::encode_sparse(
    const std::map<int64_t, at::Tensor>& hidden_states) const {
  for (const auto& [id, hidden] : hidden_states) check_hidden(state_->unchanged_layer(id), hidden);
  std::map<int64_t, SparseFeatures> results;
  std::map<at::Device, std::vector<Request>, CudaFirst> on;
  std::vector<at::Tensor> kept;
  for (const auto& [id, hidden] : hidden_states) {
    const Layer& layer = state_->layer(id);
    const auto options = hidden.options().requires_grad(false).dtype(at::kLong);
    if (hidden.numel() == 0)
      results[id] = {at::zeros({1}, options), at::empty({0}, options),
                     at::empty({0}, options.dtype(at::kFloat))};
    else
      on[layer.device].push_back({&layer, in_memory(hidden, kept)});
  }
  for (const auto& [device, requests] : on) {
    const auto found = state_->backends.at(device)->encode_sparse(requests);
    for (size_t i = 0; i < requests.size(); ++i) results[requests[i].layer->id] = found[i];
  }
  return results;
}

void Engine::encode_sparse(const std::map<int64_t, at::Tensor>& hidden_states,
                           const SparseSink& sink, const SparseFormat& format) const {
  std::map<at::Device, std::vector<Request>, CudaFirst> on;
  std::vector<at::Tensor> kept;
  for (const auto& [id, hidden] : hidden_states) {
    const Layer& layer = state_->unchanged_layer(id);
    check_hidden(layer, hidden);
    check_format(layer, format);
    const int64_t k = format.only_top_k ? k_out(layer, state_->options) : layer.features;
    if (hidden.numel() > 0) on[layer.device].push_back({&layer, in_memory(hidden, kept), k});
  }
  for (const auto& [device, requests] : on)
    state_->backends.at(device)->encode_into(requests, format, sink);
}

void Engine::check_unchanged(int64_t layer) const { state_->unchanged_layer(layer); }

at::Tensor Engine::decode(int64_t id, const SparseFeatures& features,
                          const at::Tensor& hidden) const {
  const Layer& layer = state_->unchanged_layer(id);
  const std::string who = "layer " + std::to_string(id);
  const auto check = [&](const at::Tensor& tensor, const char* name, at::ScalarType type) {
    TORCH_CHECK_TYPE(tensor.defined() && tensor.scalar_type() == type, who, ": ", name, " must be ",
                     c10::getDtypeNames(type).first, ", got ",
                     tensor.defined() ? c10::getDtypeNames(tensor.scalar_type()).first : "none");
    TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.device() == layer.device, who, ": ", name,
                      " must be 1-dimensional on ", layer.device, ", got ", tensor.sizes(), " on ",
                      tensor.device());
  };
  check(features.row_begin, "row_begin", at::kLong);
  check(features.features, "features", at::kLong);
  check(features.activations, "activations", at::kFloat);
  const int64_t entries = features.features.numel();
  const at::Tensor begin = features.row_begin;
  TORCH_CHECK_VALUE(
      begin.numel() > 0 && begin[0].item<int64_t>() == 0 && begin[-1].item<int64_t>() == entries &&
          (begin.diff() >= 0).all().item<bool>() && features.activations.numel() == entries,
      who, ": row_begin must ascend from 0 to the number of features and activations, ", entries);
  if (entries > 0) {
    const auto [least, most] = features.features.aminmax();
    TORCH_CHECK_VALUE(least.item<int64_t>() >= 0 && most.item<int64_t>() < layer.features, who,
                      ": features must be in [0, ", layer.features, "), got ",
                      least.item<int64_t>(), " to ", most.item<int64_t>());
  }
  at::Tensor x;
  if (hidden.defined()) {
    check_hidden(layer, hidden);
    x = hidden.detach().reshape({-1, layer.hidden_size});
    TORCH_CHECK_VALUE(x.size(0) == begin.numel() - 1, who, ": hidden must have the features' ",
                      begin.numel() - 1, " rows, got ", hidden.sizes());
  }
  // A decoder stays where the caller put it.
  const at::Device there =
      layer.declared.W_dec.defined() ? layer.declared.W_dec.device() : layer.device;
  const SparseFeatures moved = {begin.to(there), features.features.to(there),
                                features.activations.to(there)};
  return decode_rows(layer, moved, x.defined() ? x.to(there) : x).to(layer.device);
}

at::Tensor Engine::decode(int64_t id, const at::Tensor& activations, const at::Tensor& indices,
                          const at::Tensor& hidden) const {
  TORCH_CHECK_TYPE(activations.defined() && indices.defined(), "layer ", id,
                   ": activations and indices must be tensors, got none");
  TORCH_CHECK_VALUE(activations.dim() > 0 && activations.sizes() == indices.sizes(), "layer ", id,
                    ": activations and indices must have one shape [.., K], got ",
                    activations.sizes(), " and ", indices.sizes());
  const int64_t k = activations.size(-1), rows = k > 0 ? activations.numel() / k : 0;
  const at::Tensor begin =
      at::arange(0, rows * k + 1, std::max<int64_t>(k, 1), indices.options().dtype(at::kLong));
  std::vector<int64_t> shape(activations.sizes().begin(), activations.sizes().end() - 1);
  const at::Tensor y = decode(
      id, SparseFeatures{begin, indices.reshape(-1), activations.detach().reshape(-1)}, hidden);
  shape.push_back(y.size(1));
  return y.view(shape);
}

Explanation Engine::explain(int64_t id, const at::Tensor& hidden) const {
  const Layer& layer = state_->unchanged_layer(id);
  check_hidden(layer, hidden);
  const int64_t k = k_out(layer, state_->options);
  const Features out = allocate(layer, hidden, k);
  std::vector<Request> requests;
  std::vector<at::Tensor> kept;
  if (hidden.numel() > 0) requests.push_back({&layer, in_memory(hidden, kept), k, view_of(out)});
  Explanation explanation;
  state_->encode(requests, &explanation);
  explanation.features = layer.features;
  return explanation;
}

std::vector<float> Engine::decoder_direction(int64_t id, int64_t feature) const {
  const Layer& layer = state_->unchanged_layer(id);
  const at::Tensor& W_dec = layer.declared.W_dec;
  TORCH_CHECK_VALUE(W_dec.defined(), layer.name(),
                    ": decoder_direction needs W_dec, which the checkpoint does not have");
  TORCH_CHECK_VALUE(feature >= 0 && feature < layer.features, "layer ", id,
                    ": feature must be in [0, ", layer.features, "), got ", feature);
  const at::Tensor column = W_dec.detach().select(1, feature).to(at::kCPU, at::kFloat).contiguous();
  const float* values = column.const_data_ptr<float>();
  return {values, values + column.numel()};
}

std::vector<int64_t> Engine::layers() const {
  std::vector<int64_t> ids;
  for (const auto& [id, layer] : state_->layers) ids.push_back(id);
  return ids;
}

const LayerWeights& Engine::weights(int64_t layer) const { return state_->layer(layer).declared; }

const Options& Engine::options() const { return state_->options; }

Memory Engine::memory() const {
  Memory memory = {};
  for (const auto& [id, layer] : state_->layers) memory.weight_bytes += layer.declared_bytes();
  for (const auto& [device, backend] : state_->backends) {
    const Memory held = backend->memory();
    memory.weight_bytes += held.weight_bytes;
    memory.gate_bytes += held.gate_bytes;
    memory.screening_bytes += held.screening_bytes;
    memory.workspace_bytes += held.workspace_bytes;
  }
  return memory;
}

}  // namespace sparse_transcoder
