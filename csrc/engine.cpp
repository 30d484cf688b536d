// Engine: checks what callers pass, allocates their outputs, borrows workspaces and hands the work
// to the device's encode path.
#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <sparse_transcoder/engine.h>

#include <algorithm>
#include <cmath>
#include <sstream>

#include "backend.h"
#include "cuda/streams.h"
#include "decode.h"

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

// Where each layer is encoded, see Options::device_weight_bytes.
std::map<int64_t, Placement> place(const std::map<int64_t, LayerWeights>& weights,
                                   const Options& options) {
  std::map<int64_t, Placement> placements;
  int64_t left = options.device_weight_bytes;
  const bool to_cuda = left >= 0;
  if (to_cuda)
    TORCH_CHECK_VALUE(c10::impl::hasDeviceGuardImpl(at::kCUDA) &&
                          c10::impl::VirtualGuardImpl(at::kCUDA).deviceCount() > 0,
                      "device_weight_bytes needs a CUDA device, torch sees none");
  for (const auto& [id, layer] : weights) {
    check_weights(id, layer);
    Placement placement = {layer.W_enc.device(), false};
    if (to_cuda && layer.W_enc.is_cpu()) {
      const bool copied =
          options.screening != Screening::off && layer.W_enc.scalar_type() != at::kBFloat16;
      const int64_t bytes = layer.W_enc.numel() * (layer.W_enc.element_size() + (copied ? 2 : 0));
      placement = {c10::impl::VirtualGuardImpl(at::kCUDA).getDevice(), bytes > left};
      if (!placement.streamed) left -= bytes;
    }
    placements.insert({id, placement});
  }
  return placements;
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
  TORCH_CHECK_VALUE(hidden.device() == layer.device, who, ": hidden must be on ", layer.device,
                    layer.device == layer.weights.W_enc.device() ? " like the weights"
                                                                 : " where the layer is encoded",
                    ", got ", hidden.device());
}

// Outputs shaped like hidden, [.., K], [.., K] and [..].
Features allocate(const Layer& layer, const at::Tensor& hidden) {
  std::vector<int64_t> rows(hidden.sizes().begin(), hidden.sizes().end() - 1), slots = rows;
  slots.push_back(layer.top_k);
  const auto options = hidden.options().requires_grad(false);
  try {
    return {at::empty(slots, options.dtype(at::kFloat)), at::empty(slots, options.dtype(at::kLong)),
            at::empty(rows, options.dtype(at::kFloat))};
  } catch (const c10::Error&) {
    const int64_t bytes = hidden.numel() / layer.hidden_size * (12 * layer.top_k + 4);
    TORCH_CHECK_WITH(OutOfMemoryError, false, "layer ", layer.id,
                     ": out of memory: the result needs ", bytes,
                     " bytes; a lower top_k needs less, got top_k ", layer.top_k);
  }
}

[[noreturn]] void refuse_sparse(const Layer& layer, int64_t rows) {
  TORCH_CHECK_WITH(OutOfMemoryError, false, "layer ", layer.id,
                   ": out of memory: the result needs ", 8 * (rows + 1),
                   " bytes and 12 for each active feature; fewer rows at a time need less, got ",
                   rows);
}

std::string join(const std::map<int64_t, Layer>& layers) {
  std::ostringstream names;
  for (const auto& [id, layer] : layers) names << (id == layers.begin()->first ? "" : ", ") << id;
  return names.str();
}

at::Tensor as_batch(const at::Tensor& hidden) {
  return hidden.dim() == 2 ? hidden.detach().unsqueeze(0) : hidden.detach();
}

}  // namespace

struct Engine::State {
  std::map<int64_t, Layer> layers;
  Options options;
  std::unique_ptr<Pool<Workspace>> cpu_pool;  // these two only where a layer is on the CPU
  std::unique_ptr<Lanes> cpu_lanes;
  std::map<at::DeviceIndex, CudaDevice> cuda;

  const Layer& layer(int64_t id) const {
    const auto found = layers.find(id);
    TORCH_CHECK_INDEX(found != layers.end(), "layer ", id,
                      ": there is no transcoder for it, only for layers ", join(layers));
    return found->second;
  }
};

Engine::Engine(std::map<int64_t, LayerWeights> weights, Options options)
    : state_(std::make_unique<State>()) {
  check_options(options);
  TORCH_CHECK_VALUE(!weights.empty(), "transcoders must hold at least one layer, got none");
  state_->options = options;
  std::vector<const Layer*> on_cpu;
  std::map<at::DeviceIndex, std::vector<const Layer*>> on_cuda;
  const auto placements = place(weights, options);
  for (auto& [id, declared] : weights) {
    const Layer& layer =
        state_->layers.try_emplace(id, id, std::move(declared), options, placements.at(id))
            .first->second;
    (layer.device.is_cpu() ? on_cpu : on_cuda[layer.device.index()]).push_back(&layer);
  }
  if (!on_cpu.empty()) {
    const Plan plan = plan_cpu(on_cpu, options);
    state_->cpu_pool =
        std::make_unique<Pool<Workspace>>([plan] { return std::make_unique<Workspace>(plan); });
    state_->cpu_lanes = std::make_unique<Lanes>(plan.lanes - 1);
  }
  for (const auto& [index, layers] : on_cuda)
    state_->cuda.try_emplace(index, layers, options, at::Device(at::kCUDA, index));
}

Engine::Engine(Engine&&) noexcept = default;
Engine::~Engine() = default;

Features Engine::encode(int64_t layer, const at::Tensor& hidden) const {
  return encode({{layer, hidden}}).at(layer);
}

std::map<int64_t, Features> Engine::encode(const std::map<int64_t, at::Tensor>& hidden) const {
  for (const auto& [id, rows] : hidden) check_hidden(state_->layer(id), rows);
  std::map<int64_t, Features> results;
  std::vector<Request> requests;
  for (const auto& [id, rows] : hidden) {
    const Layer& layer = state_->layer(id);
    const Features& out = results[id] = allocate(layer, rows);
    if (rows.numel() > 0) requests.push_back({&layer, as_batch(rows), out});
  }
  // Largest first, so that no lane is left alone with a large layer at the end; streamed layers in
  // their order, so that the next one's weights come in while one is encoded.
  std::stable_sort(requests.begin(), requests.end(), [](const Request& a, const Request& b) {
    const auto size = [](const Layer& layer) { return layer.streamed ? 0 : layer.W_enc.numel(); };
    return size(*a.layer) > size(*b.layer);
  });
  std::vector<Request> on_cpu;
  std::map<at::DeviceIndex, std::vector<Request>> on_cuda;
  for (const Request& request : requests)
    (request.hidden.is_cpu() ? on_cpu : on_cuda[request.hidden.get_device()]).push_back(request);
  // CUDA first: it runs on while the CPU's layers are encoded.
  for (const auto& [index, on_device] : on_cuda) state_->cuda.at(index).encode(on_device);
  if (!on_cpu.empty()) encode_cpu(on_cpu, *state_->cpu_pool->borrow(), *state_->cpu_lanes);
  return results;
}

SparseFeatures Engine::encode_sparse(int64_t id, const at::Tensor& hidden) const {
  const Layer& layer = state_->layer(id);
  check_hidden(layer, hidden);
  const auto options = hidden.options().requires_grad(false).dtype(at::kLong);
  if (hidden.numel() == 0)
    return {at::zeros({1}, options), at::empty({0}, options),
            at::empty({0}, options.dtype(at::kFloat))};
  const Request request = {&layer, as_batch(hidden), {}};
  if (hidden.is_cuda())
    return encode_sparse_cuda(request, state_->options, state_->cuda.at(hidden.get_device()));
  try {
    return encode_sparse_cpu(request, *state_->cpu_pool->borrow(), *state_->cpu_lanes);
  } catch (const c10::OutOfMemoryError&) {
    throw;                       // the workspace's, which says what it needs
  } catch (const c10::Error&) {  // of at::empty
    refuse_sparse(layer, request.rows());
  } catch (const std::bad_alloc&) {
    refuse_sparse(layer, request.rows());
  }
}

at::Tensor Engine::decode(int64_t id, const SparseFeatures& features,
                          const at::Tensor& hidden) const {
  const Layer& layer = state_->layer(id);
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
      layer.weights.W_dec.defined() ? layer.weights.W_dec.device() : layer.device;
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
  const Layer& layer = state_->layer(id);
  check_hidden(layer, hidden);
  TORCH_CHECK_VALUE(hidden.is_cpu(), "layer ", id, ": explain needs hidden on cpu, got ",
                    hidden.device());
  Explanation explanation = {};
  explanation.features = layer.features;
  if (hidden.numel() == 0) return explanation;
  const Request request = {&layer, as_batch(hidden), allocate(layer, hidden)};
  explanation.rows = request.rows();
  explain_cpu(request, *state_->cpu_pool->borrow(), *state_->cpu_lanes, explanation);
  return explanation;
}

std::vector<int64_t> Engine::layers() const {
  std::vector<int64_t> ids;
  for (const auto& [id, layer] : state_->layers) ids.push_back(id);
  return ids;
}

const LayerWeights& Engine::weights(int64_t layer) const { return state_->layer(layer).weights; }

const Options& Engine::options() const { return state_->options; }

Memory Engine::memory() const {
  Memory memory = {};
  for (const auto& [id, layer] : state_->layers) {
    memory.weight_bytes += layer.weight_bytes();
    memory.gate_bytes += layer.gate_bytes();
    memory.screening_bytes += layer.copies.bytes();
  }
  if (state_->cpu_pool) memory.workspace_bytes += state_->cpu_pool->bytes();
  for (const auto& [index, device] : state_->cuda) memory.workspace_bytes += device.bytes();
  return memory;
}

}  // namespace sparse_transcoder
