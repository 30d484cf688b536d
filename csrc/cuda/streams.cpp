#include "cuda/streams.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

namespace sparse_transcoder {
namespace {

constexpr size_t max_graphs = 64;      // further shapes run as they are
constexpr int max_failures = 3;        // of making a shape's graph
constexpr int64_t filling_rows = 256;  // from which on a product fills the device

c10::impl::VirtualGuardImpl guard_of(at::Device device) {
  return c10::impl::VirtualGuardImpl(device.type());
}

c10::Stream new_stream(at::Device device) {
  return guard_of(device).getStreamFromGlobalPool(device);
}

void* native(const c10::Stream& stream) {
  return guard_of(stream.device()).getStreamNativeHandle(stream);
}

int64_t multiprocessors_of(at::Device device) {
  const c10::DeviceGuard guard(device);
  int count = 0;
  check_cuda(cuda::multiprocessors(&count));
  return count;
}

}  // namespace

void check_cuda(int status) {
  TORCH_CHECK(status == 0, "a CUDA call failed: ", cuda::error_name(status), ": ",
              cuda::error_text(status));
}

int64_t CudaBuffers::bytes(const CudaPlan& plan) {
  const int64_t list = 8 * (2 * plan.capacity + plan.k) + 3 * 4 + 8;
  return 4 * plan.rows * (plan.hidden_size + 1) + 2 * plan.rounded +
         4 * (plan.scores + plan.widened) + plan.lists * list + 8 * plan.rows * plan.sorted;
}

CudaBuffers::CudaBuffers(const CudaPlan& plan, at::Device device) {
  const c10::InferenceMode normal(false);  // calls outside inference mode write to them too
  const auto take = [&](int64_t count, at::ScalarType type) {
    return at::empty({count}, at::TensorOptions(type).device(device));
  };
  hidden = take(plan.rows * plan.hidden_size, at::kFloat);
  rounded = take(plan.rounded, at::kBFloat16);
  margin = take(plan.rows, at::kFloat);
  scores = take(plan.scores, at::kFloat);
  widened = take(plan.widened, at::kFloat);
  deferred = take(plan.lists * plan.capacity, at::kLong);
  exact = take(plan.lists * (plan.k + plan.capacity), at::kLong);
  sorted = take(plan.rows * plan.sorted, at::kLong);
  deferred_count = take(plan.lists, at::kInt);
  exact_count = take(plan.lists, at::kInt);
  active_count = take(plan.lists, at::kInt);
  kth_best = take(plan.lists, at::kLong);
}

WeightStream::WeightStream(int64_t slot_bytes, at::Device device)
    : copies_(new_stream(device)), filled_{c10::Event(device.type()), c10::Event(device.type())} {
  const c10::StreamGuard guard(copies_);
  const c10::InferenceMode normal(false);  // as in CudaBuffers
  try {
    for (at::Tensor& slot : slots_)
      slot = at::empty({slot_bytes}, at::TensorOptions(at::kByte).device(device));
  } catch (const c10::OutOfMemoryError&) {
    TORCH_CHECK_WITH(OutOfMemoryError, false,
                     "out of memory: two buffers for streamed weights need ", 2 * slot_bytes,
                     " bytes on ", device, "; a lower device_weight_bytes leaves more for them");
  }
}

at::Tensor WeightStream::load(const at::Tensor& pinned, const std::vector<c10::Stream>& streams) {
  for (const c10::Event& emptied : emptied_[turn_]) emptied.block(copies_);
  const at::Tensor slot =
      slots_[turn_].narrow(0, 0, pinned.nbytes()).view(pinned.scalar_type()).view(pinned.sizes());
  {
    const c10::StreamGuard guard(copies_);
    copy_to(slot, pinned);
  }
  filled_[turn_].record(copies_);
  for (const c10::Stream& stream : streams) filled_[turn_].block(stream);
  return slot;
}

void WeightStream::release(const std::vector<c10::Stream>& streams) {
  while (emptied_[turn_].size() < streams.size())
    emptied_[turn_].emplace_back(copies_.device_type());
  for (size_t i = 0; i < streams.size(); ++i) emptied_[turn_][i].record(streams[i]);
  turn_ = 1 - turn_;
}

CudaLanes::CudaLanes(const CudaPlan& plan, at::Device device)
    : bytes(plan.lanes * CudaBuffers::bytes(plan) +
            plan.layers * static_cast<int64_t>(sizeof(cuda::LayerPointers))),
      plan_(plan),
      device_(device),
      fork_(device.type()),
      start_(device.type()) {
  try {
    for (int64_t i = 0; i < plan.lanes; ++i) {
      streams_.push_back(new_stream(device));
      done_.emplace_back(device.type());
      const c10::StreamGuard guard(streams_.back());
      buffers_.emplace_back(plan, device);
    }
    const c10::StreamGuard guard(streams_.front());
    pointers_ = at::empty({plan.layers * static_cast<int64_t>(sizeof(cuda::LayerPointers))},
                    at::TensorOptions(at::kByte).device(device));
  } catch (const c10::OutOfMemoryError&) {
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "out of memory: the workspace needs ", bytes, " bytes on ", device,
        "; a lower chunk_size or device_weight_bytes needs less, got chunk_size ", plan.chunk);
  }
}

CudaLanes::~CudaLanes() {
  try {
    streams_.front().synchronize();  // a graph may be running
  } catch (const c10::Error&) {      // the device is gone, and its memory with it
    return;
  }
  for (const auto& [shape, graph] : graphs_)
    if (graph.executable) cuda::destroy_graph(graph.executable);
}

cuda::LayerPointers* CudaLanes::pointers(size_t request) const {
  return static_cast<cuda::LayerPointers*>(pointers_.mutable_data_ptr()) + request;
}

void CudaLanes::encode(const std::vector<Request>& requests, WeightStream* weights,
                       bool use_graphs) {
  const c10::Stream caller = guard_of(device_).getStream(device_), &first = streams_.front();
  fork_.record(caller);
  fork_.block(first);
  const c10::StreamGuard guard(first);
  std::vector<cuda::LayerPointers> values;
  Shape shape;
  bool small = true;
  for (const Request& request : requests) {
    const at::Tensor& h = request.hidden;
    h.record_stream(
        first);  // every lane joins it; the outputs are the caller's stream's, which waits for it
    values.push_back({h.const_data_ptr(),
                  h.size(1),
                  {h.stride(0), h.stride(1), h.stride(2)},
                  request.out.activations.mutable_data_ptr<float>(),
                  request.out.indices.mutable_data_ptr<int64_t>(),
                  request.out.sparsity.mutable_data_ptr<float>()});
    shape.insert(shape.end(),
                 {request.layer->id, request.rows(), static_cast<int64_t>(h.scalar_type())});
    small &= request.rows() <= cuda::few_rows && !request.layer->streamed;
  }
  cuda::Queue queue = {native(first)};
  for (size_t i = 0; i < values.size(); i += cuda::max_layer_pointers)
    check_cuda(cuda::set_layer_pointers(
        values.data() + i, std::min<int64_t>(values.size() - i, cuda::max_layer_pointers),
        pointers(i), queue));
  const auto join = [&] {
    done_.front().record(first);
    done_.front().block(caller);
  };
  try {
    // Own kernels alone can be put into a graph, and few rows need no others.
    const bool may_repeat = use_graphs && small;
    void* graph = may_repeat ? graph_of(shape, requests) : nullptr;
    if (graph) {
      check_cuda(cuda::launch_graph(graph, queue.stream));
    } else {
      enqueue(requests, weights);
      if (may_repeat) remember(shape);
    }
  } catch (...) {
    join();
    throw;
  }
  join();
}

void CudaLanes::remember(const Shape& shape) {
  if (graphs_.size() >= max_graphs)
    std::erase_if(graphs_, [](const auto& known) { return !known.second.executable; });
  if (graphs_.size() < max_graphs) graphs_.try_emplace(shape);
}

void* CudaLanes::graph_of(const Shape& shape, const std::vector<Request>& requests) {
  const auto known = graphs_.find(shape);
  if (known == graphs_.end()) return nullptr;
  Graph& graph = known->second;
  if (!graph.executable && graph.failures < max_failures) {
    graph.executable = make_graph(requests);
    if (!graph.executable) ++graph.failures;
  }
  return graph.executable;
}

void CudaLanes::enqueue(const std::vector<Request>& requests, WeightStream* weights) {
  int64_t chunks = 0, most_rows = 0;
  for (const Request& request : requests) {
    const int64_t rows = chunk_rows(request, plan_);
    chunks += (request.rows() + rows - 1) / rows;
    most_rows = std::max(most_rows, rows);
  }
  // Where a product fills the device a second stream is all that helps: one selects while the other
  // multiplies. More tiles of scores would not stay in L2.
  const int64_t lanes = std::min<int64_t>(
      {static_cast<int64_t>(streams_.size()), chunks, most_rows >= filling_rows ? 2 : chunks});
  const std::vector<c10::Stream> streams(streams_.begin(), streams_.begin() + lanes);
  std::unique_lock<std::mutex> turn;
  if (weights) turn = std::unique_lock(weights->mutex);
  start_.record(streams_.front());
  for (int64_t lane = 1; lane < lanes; ++lane) start_.block(streams[lane]);
  const auto join = [&] {
    for (int64_t lane = 1; lane < lanes; ++lane) {
      done_[lane].record(streams[lane]);
      done_[lane].block(streams_.front());
    }
  };
  try {
    int64_t lane = 0;
    for (size_t i = 0; i < requests.size(); ++i) {
      const Layer& layer = *requests[i].layer;
      const at::Tensor W_enc = layer.streamed ? weights->load(layer.W_enc, streams) : layer.W_enc;
      const int64_t rows = requests[i].rows(), chunk = chunk_rows(requests[i], plan_);
      for (int64_t first = 0; first < rows; first += chunk, lane = (lane + 1) % lanes) {
        const c10::StreamGuard guard(streams[lane]);
        cuda::Queue queue = {native(streams[lane])};
        encode_rows(requests[i], first, std::min(chunk, rows - first), W_enc, pointers(i),
                    buffers_[lane], plan_, queue);
      }
      if (layer.streamed) weights->release(streams);
    }
  } catch (...) {  // what is under way still uses the buffers
    if (weights) weights->release(streams);
    join();
    throw;
  }
  join();
}

void* CudaLanes::make_graph(const std::vector<Request>& requests) const {
  void *graph = nullptr, *executable = nullptr;
  if (cuda::make_graph(&graph) != 0) return nullptr;
  // One branch per set of buffers.
  std::vector<cuda::Queue> branches(std::min(buffers_.size(), requests.size()));
  for (cuda::Queue& branch : branches) branch.graph = graph;
  try {
    for (size_t i = 0; i < requests.size(); ++i) {
      const size_t branch = i % branches.size();
      const int64_t rows = requests[i].rows(), chunk = chunk_rows(requests[i], plan_);
      for (int64_t first = 0; first < rows; first += chunk)
        encode_rows(requests[i], first, std::min(chunk, rows - first), requests[i].layer->W_enc,
                    pointers(i), buffers_[branch], plan_, branches[branch]);
    }
  } catch (const c10::Error&) {
    cuda::finish_graph(graph, &executable);
    if (executable) cuda::destroy_graph(executable);
    return nullptr;
  }
  return cuda::finish_graph(graph, &executable) == 0 ? executable : nullptr;
}

CudaDevice::CudaDevice(const std::vector<const Layer*>& layers, const Options& options,
                       at::Device device)
    : use_graphs(options.use_graphs) {
  const CudaPlan plan = plan_cuda(layers, options, multiprocessors_of(device));
  int64_t slot_bytes = 0;
  for (const Layer* layer : layers)
    if (layer->streamed) slot_bytes = std::max<int64_t>(slot_bytes, layer->W_enc.nbytes());
  if (slot_bytes > 0) weights = std::make_unique<WeightStream>(slot_bytes, device);
  pool = std::make_unique<Pool<CudaLanes>>(
      [plan, device] { return std::make_unique<CudaLanes>(plan, device); });
}

void CudaDevice::encode(const std::vector<Request>& requests) const {
  const at::Device device = requests.front().layer->device;
  TORCH_CHECK_VALUE(!cuda::is_capturing(native(guard_of(device).getStream(device))),
                    "encode cannot be captured in a CUDA graph: later calls share its workspace; "
                    "use_compile replays graphs of its own");
  pool->borrow()->encode(requests, weights.get(), use_graphs);
}

int64_t CudaDevice::bytes() const { return pool->bytes() + (weights ? weights->bytes() : 0); }

SparseFeatures encode_sparse_cuda(const Request& request, const Options& options,
                                  const CudaDevice& device) {
  const at::Tensor& hidden = request.hidden;
  const int64_t rows = request.rows();
  Options one_lane = options;
  one_lane.lanes = 1;
  // Encodes some rows with room for k features each.
  const auto encode = [&](const at::Tensor& some, int64_t k) {
    Layer layer = *request.layer;
    layer.top_k = layer.selected = k;
    CudaLanes lanes(plan_cuda({&layer}, one_lane, multiprocessors_of(hidden.device())),
                    hidden.device());
    const auto slots = some.options().dtype(at::kFloat);
    Features out = {at::empty({some.size(1), k}, slots),
                    at::empty({some.size(1), k}, slots.dtype(at::kLong)),
                    at::empty({some.size(1)}, slots)};
    lanes.encode({{&layer, some, out}}, device.weights.get(), false);
    return out;
  };
  const at::Tensor flat = hidden.reshape({1, rows, hidden.size(2)});
  const int64_t features = request.layer->features;
  std::vector<at::Tensor> counts, indices, activations;
  // Count, then write: with room for the largest count of a chunk, rounded up past the float32
  // rounding of the fraction.
  const at::Tensor fractions = encode(flat, 1).sparsity.nan_to_num(0);
  for (int64_t first = 0; first < rows; first += options.chunk_size) {
    const int64_t count = std::min(options.chunk_size, rows - first);
    const at::Tensor some = flat.narrow(1, first, count);
    const double fraction = fractions.narrow(0, first, count).max().item<double>();
    const auto k = static_cast<int64_t>(fraction * features * (1 + 0x1p-20)) + 1;
    const Features top = encode(some, std::min(k, request.layer->most_active));
    const at::Tensor broken = at::isnan(top.activations.narrow(1, 0, 1)),
                     kept = top.activations > 0;
    kept.narrow(1, 0, 1).logical_or_(broken);
    const auto [ascending, order] = at::where(kept, top.indices, features).sort(-1);
    counts.push_back(kept.sum(1));
    indices.push_back(ascending.masked_select(ascending < features));
    activations.push_back(top.activations.gather(1, order).masked_select(ascending < features));
  }
  return {at::cat({at::zeros({1}, flat.options().dtype(at::kLong)), at::cat(counts).cumsum(0)}),
          at::cat(indices), at::cat(activations)};
}

}  // namespace sparse_transcoder
