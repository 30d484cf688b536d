// The CUDA encode path: each layer on a lane, a stream with buffers of its own. The caller's stream is forked by an event and
// joined again; nothing waits on the host. Chunk by chunk a layer's rows are prepared, screened panel by panel with a float32
// product, gated and rescored exactly, and written. c10's device-generic streams keep CUDA headers out of here.
#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <bit>

#include "encode.h"
#include "kernels/cuda.h"

namespace sparse_transcoder {
namespace {

constexpr int64_t panel_bytes = 32 << 20;  // of scores, and of widened weights
constexpr int64_t list_bytes = 64 << 20;
constexpr int64_t busy_blocks = 128;  // fewer rows than this share each row among several blocks

void check(int status) { TORCH_CHECK(status == 0, "a CUDA kernel could not be launched: error ", status); }

float* floats(const at::Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr<float>() : nullptr; }

// Bound on |product - exact| per unit of ||x|| ||w||. TF32, where the user allows it, truncates both operands to 10 bits, and
// tensor cores may truncate sums: one bound that holds with and without.
float product_roundoff(int64_t size) {
  const double accumulation = (size + 8) * 0x1p-22;
  return static_cast<float>(accumulation < 0.25 ? accumulation / (1 - accumulation) + 0x1p-9 + 0x1p-20 : 1);
}

void encode_layer(const Request& request, const CudaLane& lane, void* stream) {
  const Layer& layer = *request.layer;
  const CudaPlan& plan = lane.plan;
  const int64_t rows = request.rows(), size = layer.hidden_size;
  const at::Tensor activations = request.out.activations.view({rows, layer.top_k});
  const at::Tensor indices = request.out.indices.view({rows, layer.top_k}), sparsity = request.out.sparsity.view({rows});
  for (int64_t first = 0; first < rows; first += plan.rows) {
    const int64_t count = std::min(plan.rows, rows - first);
    const at::Tensor x = lane.hidden.narrow(0, 0, count * size).view({count, size});
    const kernels::cuda::Lists lists = {static_cast<uint64_t*>(lane.keys.mutable_data_ptr()),
                                        lane.size.mutable_data_ptr<int>(),
                                        static_cast<uint64_t*>(lane.least.mutable_data_ptr()),
                                        lane.certain.mutable_data_ptr<int>(),
                                        static_cast<int>(std::clamp<int64_t>(busy_blocks / count, 1, plan.groups)),
                                        static_cast<int>(plan.capacity),
                                        static_cast<int>(layer.selected)};
    const at::Tensor& h = request.hidden;
    check(kernels::cuda::prepare({h.const_data_ptr(),
                                  kernel_dtype(h.scalar_type()),
                                  first,
                                  count,
                                  h.size(1),
                                  {h.stride(0), h.stride(1), h.stride(2)},
                                  size,
                                  floats(layer.input_bias),
                                  floats(layer.ln_weight),
                                  floats(layer.ln_bias)},
                                 product_roundoff(size), layer.largest_norm, floats(x), floats(lane.margin), lists, stream));
    const int64_t panel = std::min(plan.scores / count, plan.widened > 0 ? plan.widened / size : layer.features);
    for (int64_t feature = 0; feature < layer.features; feature += panel) {
      const int64_t width = std::min(panel, layer.features - feature);
      const at::Tensor stored = layer.W_enc.narrow(0, feature, width);
      at::Tensor weights = stored;
      if (layer.dtype != kernels::Dtype::float32)
        weights = lane.widened.narrow(0, 0, width * size).view({width, size}).copy_(stored);
      at::Tensor scores = lane.scores.narrow(0, 0, count * width).view({count, width});
      at::mm_out(scores, x, weights.t());
      check(kernels::cuda::select(
          floats(scores), floats(x), floats(lane.margin), count,
          {stored.const_data_ptr(), layer.dtype, feature, width, size, layer.gate_at(feature), layer.largest_bias}, lists,
          stream));
    }
    check(kernels::cuda::finish(lists, floats(lane.margin), count, layer.features, layer.most_active, layer.top_k,
                                floats(activations[first]), indices[first].mutable_data_ptr<int64_t>(), floats(sparsity) + first,
                                stream));
  }
}

}  // namespace

CudaPlan plan_cuda(const std::vector<const Layer*>& layers, const Options& options) {
  CudaPlan plan = {};
  int64_t k = 1, features = 1;
  bool widened = false;
  for (const Layer* layer : layers) {
    plan.hidden_size = std::max(plan.hidden_size, layer->hidden_size);
    k = std::max(k, layer->selected);
    features = std::max(features, layer->features);
    widened |= layer->dtype != kernels::Dtype::float32;
  }
  plan.lanes = options.lanes > 0 ? options.lanes : 4;
  plan.groups = 16;
  plan.capacity = std::bit_ceil(static_cast<uint64_t>(std::max(2 * k, k + kernels::cuda::segment)));
  plan.rows = std::clamp<int64_t>(list_bytes / (plan.capacity * 8), 1, options.chunk_size);
  plan.lists = std::max(plan.rows, std::min(plan.rows * plan.groups, busy_blocks));
  plan.scores = std::max(panel_bytes / 4, plan.rows);
  plan.widened = widened ? std::max(panel_bytes / 4, plan.hidden_size) : 0;
  return plan;
}

CudaLane::CudaLane(const CudaPlan& plan, at::Device device)
    : plan(plan), stream(c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device)) {
  const c10::StreamGuard guard(stream);
  const auto take = [&](int64_t count, at::ScalarType type) {
    bytes += count * c10::elementSize(type);
    return at::empty({count}, at::TensorOptions(type).device(device));
  };
  hidden = take(plan.rows * plan.hidden_size, at::kFloat);
  margin = take(plan.rows, at::kFloat);
  scores = take(plan.scores, at::kFloat);
  widened = take(plan.widened, at::kFloat);
  keys = take(plan.lists * plan.capacity, at::kLong);
  size = take(plan.lists, at::kInt);
  least = take(plan.lists, at::kLong);
  certain = take(plan.lists, at::kInt);
}

void encode_cuda(const std::vector<Request>& requests, int64_t most_lanes, Pool<CudaLane>& pool) {
  const at::Device device = requests.front().hidden.device();
  const c10::impl::VirtualGuardImpl guard(device.type());
  const c10::Stream caller = guard.getStream(device);
  c10::Event fork(device.type());
  fork.record(caller);
  std::vector<Pool<CudaLane>::Handle> lanes;
  for (size_t i = 0; i < requests.size(); ++i) {
    if (lanes.size() < static_cast<size_t>(most_lanes)) {
      lanes.push_back(pool.borrow());
      fork.block(lanes.back()->stream);
    }
    const CudaLane& lane = *lanes[i % lanes.size()];
    const c10::StreamGuard on_lane(lane.stream);
    for (const at::Tensor& tensor :
         {requests[i].hidden, requests[i].out.activations, requests[i].out.indices, requests[i].out.sparsity})
      tensor.record_stream(lane.stream);
    encode_layer(requests[i], lane, guard.getStreamNativeHandle(lane.stream));
  }
  for (const auto& lane : lanes) {
    c10::Event join(device.type());
    join.record(lane->stream);
    join.block(caller);
  }
}

SparseFeatures encode_sparse_cuda(const Request& request, const Options& options) {
  const at::Tensor& hidden = request.hidden;
  const int64_t rows = request.rows();
  Options one_lane = options;
  one_lane.lanes = 1;
  // Encodes some rows with room for k features each.
  const auto encode = [&](const at::Tensor& some, int64_t k) {
    Layer layer = *request.layer;
    layer.top_k = layer.selected = k;
    const CudaPlan plan = plan_cuda({&layer}, one_lane);
    Pool<CudaLane> pool([&] { return std::make_unique<CudaLane>(plan, hidden.device()); });
    const auto slots = some.options().dtype(at::kFloat);
    Features out = {at::empty({some.size(1), k}, slots), at::empty({some.size(1), k}, slots.dtype(at::kLong)),
                    at::empty({some.size(1)}, slots)};
    encode_cuda({{&layer, some, out}}, 1, pool);
    return out;
  };
  const at::Tensor flat = hidden.reshape({1, rows, hidden.size(2)});
  const int64_t features = request.layer->features;
  std::vector<at::Tensor> counts, indices, activations;
  for (int64_t first = 0; first < rows; first += options.chunk_size) {
    const at::Tensor some = flat.narrow(1, first, std::min(options.chunk_size, rows - first));
    // Count, then write: the largest count, rounded up past the float32 rounding of the fraction.
    const double fraction = encode(some, 1).sparsity.nan_to_num(0).max().item<double>();
    const auto k = static_cast<int64_t>(fraction * features * (1 + 0x1p-20)) + 1;
    const Features top = encode(some, std::min(k, request.layer->most_active));
    const at::Tensor broken = at::isnan(top.activations.narrow(1, 0, 1)), kept = top.activations > 0;
    kept.narrow(1, 0, 1).logical_or_(broken);
    const auto [ascending, order] = at::where(kept, top.indices, features).sort(-1);
    counts.push_back(kept.sum(1));
    indices.push_back(ascending.masked_select(ascending < features));
    activations.push_back(top.activations.gather(1, order).masked_select(ascending < features));
  }
  return {at::cat({at::zeros({1}, flat.options().dtype(at::kLong)), at::cat(counts).cumsum(0)}), at::cat(indices),
          at::cat(activations)};
}

}  // namespace sparse_transcoder
