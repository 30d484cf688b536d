#include "cuda/streams.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <optional>

#include "cuda/products.h"

namespace sparse_transcoder {
namespace {

constexpr size_t max_graphs = 128;     // further shapes run as they are
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

}  // namespace

void check_cuda(int status) {
  TORCH_CHECK(status == 0, "a CUDA call failed: ", cuda::error_name(status), ": ",
              cuda::error_text(status));
}

int64_t CudaBuffers::bytes(const CudaPlan& plan) {
  const int64_t list = 8 * (2 * plan.capacity + plan.k) + 3 * 4 + 8;
  return 4 * plan.rows * (plan.hidden_size + 3) + 2 * plan.rounded +
         4 * (plan.scores + plan.widened) + plan.lists * list + 8 * plan.rows * plan.sorted +
         plan.int8_rows;
}

CudaBuffers::CudaBuffers(const CudaPlan& plan, at::Device device) {
  const c10::InferenceMode normal(false);  // calls outside inference mode write to them too
  const auto take = [&](int64_t count, at::ScalarType type) {
    return at::empty({count}, at::TensorOptions(type).device(device));
  };
  hidden = take(plan.rows * plan.hidden_size, at::kFloat);
  rounded = take(plan.rounded, at::kBFloat16);
  int8_rows = take(plan.int8_rows, at::kChar);
  margins = take(plan.rows, at::kLong);
  scores = take(plan.scores, at::kFloat);
  widened = take(plan.widened, at::kFloat);
  deferred = take(plan.lists * plan.capacity, at::kLong);
  exact = take(plan.lists * (plan.k + plan.capacity), at::kLong);
  sorted = take(plan.rows * plan.sorted, at::kLong);
  deferred_count = take(plan.lists, at::kInt);
  exact_count = take(plan.lists, at::kInt);
  active_count = take(plan.lists, at::kInt);
  kth_best = take(plan.lists, at::kLong);
  computed_count = take(plan.rows, at::kInt);
}

cuda::CandidateLists CudaBuffers::lists(int64_t groups, int64_t capacity, int64_t k) const {
  const auto keys = [](const at::Tensor& tensor) {
    return static_cast<uint64_t*>(tensor.mutable_data_ptr());
  };
  const auto counts = [](const at::Tensor& tensor) { return tensor.mutable_data_ptr<int>(); };
  return {keys(deferred),
          keys(exact),
          keys(sorted),
          counts(deferred_count),
          counts(exact_count),
          counts(active_count),
          keys(kth_best),
          counts(computed_count),
          static_cast<int>(groups),
          static_cast<int>(capacity),
          static_cast<int>(k)};
}

WeightStream::WeightStream(int64_t staging_bytes, at::Device device)
    : copies_(new_stream(device)), filled_{c10::Event(device.type()), c10::Event(device.type())} {
  const c10::StreamGuard guard(copies_);
  const c10::InferenceMode normal(false);  // as in CudaBuffers
  try {
    for (at::Tensor& staging : staging_)
      staging = at::empty({staging_bytes}, at::TensorOptions(at::kByte).device(device));
  } catch (const c10::OutOfMemoryError&) {
    TORCH_CHECK_WITH(OutOfMemoryError, false,
                     "out of memory: two buffers for streamed weights need ", 2 * staging_bytes,
                     " bytes on ", device, "; a lower device_weight_bytes leaves more for them");
  }
}

WeightStream::~WeightStream() {
  try {
    copies_.synchronize();       // the host memory that is read may be freed next
  } catch (const c10::Error&) {  // the device is gone
  }
}

at::Tensor WeightStream::load(const at::Tensor& pinned, const std::vector<c10::Stream>& streams) {
  for (const c10::Event& emptied : emptied_[turn_]) emptied.block(copies_);
  const at::Tensor staging =
      staging_[turn_].narrow(0, 0, pinned.nbytes()).view(pinned.scalar_type()).view(pinned.sizes());
  {
    const c10::StreamGuard guard(copies_);
    copy_to(staging, pinned);
  }
  filled_[turn_].record(copies_);
  for (const c10::Stream& stream : streams) filled_[turn_].block(stream);
  return staging;
}

void WeightStream::release(const std::vector<c10::Stream>& streams) {
  while (emptied_[turn_].size() < streams.size())
    emptied_[turn_].emplace_back(copies_.device_type());
  for (size_t i = 0; i < streams.size(); ++i) emptied_[turn_][i].record(streams[i]);
  turn_ = 1 - turn_;
}

CudaStreams::CudaStreams(const CudaPlan& plan, at::Device device)
    : bytes(plan.streams * CudaBuffers::bytes(plan) +
            plan.layers * static_cast<int64_t>(sizeof(cuda::LayerPointers))),
      plan_(plan),
      device_(device),
      fork_(device.type()),
      start_(device.type()),
      step_(device.type()) {
  for (int64_t i = 0; i < plan.streams; ++i) streams_.push_back(new_stream(device));
  take_buffers();
}

CudaStreams::CudaStreams(const CudaPlan& plan, const CudaStreams& others)
    : bytes(0),
      plan_(plan),
      device_(others.device_),
      streams_(others.streams_.begin(), others.streams_.begin() + plan.streams),
      fork_(device_.type()),
      start_(device_.type()),
      step_(device_.type()) {
  take_buffers();
}

void CudaStreams::take_buffers() {
  const int64_t pointer_bytes = plan_.layers * static_cast<int64_t>(sizeof(cuda::LayerPointers));
  try {
    for (const c10::Stream& stream : streams_) {
      done_.emplace_back(device_.type());
      const c10::StreamGuard guard(stream);
      buffers_.emplace_back(plan_, device_);
    }
    const c10::StreamGuard guard(streams_.front());
    pointers_ = at::empty({pointer_bytes}, at::TensorOptions(at::kByte).device(device_));
  } catch (const c10::OutOfMemoryError&) {
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "out of memory: the workspace needs ",
        plan_.streams * CudaBuffers::bytes(plan_) + pointer_bytes, " bytes on ", device_,
        "; a lower chunk_size or device_weight_bytes needs less, got chunk_size ", plan_.chunk);
  }
}

CudaStreams::~CudaStreams() {
  try {
    streams_.front().synchronize();  // a graph may be running
  } catch (const c10::Error&) {      // the device is gone, and its memory with it
    return;
  }
  for (const auto& [shape, graph] : graphs_)
    if (graph.executable) cuda::destroy_graph(graph.executable);
}

cuda::LayerPointers* CudaStreams::pointers(size_t request) const {
  return static_cast<cuda::LayerPointers*>(pointers_.mutable_data_ptr()) + request;
}

void CudaStreams::encode(const std::vector<CudaRequest>& requests, WeightStream* weights,
                         bool use_graphs) {
  const c10::Stream caller = guard_of(device_).getStream(device_), &first = streams_.front();
  fork_.record(caller);
  fork_.block(first);
  const c10::StreamGuard guard(first);
  std::vector<cuda::LayerPointers> values;
  Shape shape;
  bool own = true;  // whether the call needs own kernels alone, which a graph can hold
  for (const CudaRequest& request : requests) {
    const Hidden& h = request.hidden;
    values.push_back({h.data,
                      h.tokens,
                      {h.strides[0], h.strides[1], h.strides[2]},
                      request.out.activations,
                      request.out.indices,
                      request.out.sparsity});
    shape.insert(shape.end(),
                 {request.layer->id, request.row_count(), static_cast<int64_t>(h.dtype),
                  static_cast<int64_t>(request.product)});
    own &= !request.prepared->streamed && request.product != cuda::Product::library;
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
    const bool may_repeat = use_graphs && own;
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

void CudaStreams::remember(const Shape& shape) {
  if (graphs_.size() >= max_graphs)
    std::erase_if(graphs_, [](const auto& known) { return !known.second.executable; });
  if (graphs_.size() < max_graphs) graphs_.try_emplace(shape);
}

void* CudaStreams::graph_of(const Shape& shape, const std::vector<CudaRequest>& requests) {
  const auto known = graphs_.find(shape);
  if (known == graphs_.end()) return nullptr;
  Graph& graph = known->second;
  if (!graph.executable && graph.failures < max_failures) {
    graph.executable = make_graph(requests);
    if (!graph.executable) ++graph.failures;
  }
  return graph.executable;
}

void CudaStreams::enqueue(const std::vector<CudaRequest>& requests, WeightStream* weights) {
  int64_t chunks = 0, most_rows = 0;
  for (const CudaRequest& request : requests) {
    const int64_t rows = chunk_rows(request, plan_);
    chunks += (request.row_count() + rows - 1) / rows;
    most_rows = std::max(most_rows, rows);
  }
  // Where a product fills the device a second stream is all that helps: one selects while the other
  // multiplies. More tiles of scores would not stay in L2. A chunk alone has both for its tiles.
  const bool alone = chunks == 1 && requests.front().product == cuda::Product::library &&
                     has_many_tiles(requests.front(), plan_);
  const int64_t useful = alone                       ? 2
                         : most_rows >= filling_rows ? std::min<int64_t>(chunks, 2)
                                                     : chunks,
                stream_count = std::min(static_cast<int64_t>(streams_.size()), useful);
  const std::vector<c10::Stream> streams(streams_.begin(), streams_.begin() + stream_count);
  std::unique_lock<std::mutex> turn;
  if (weights) turn = std::unique_lock(weights->mutex);
  start_.record(streams_.front());
  for (int64_t i = 1; i < stream_count; ++i) start_.block(streams[i]);
  const auto join = [&] {
    for (int64_t i = 1; i < stream_count; ++i) {
      done_[i].record(streams[i]);
      done_[i].block(streams_.front());
    }
  };
  std::optional<SecondStream> second;
  if (alone && stream_count == 2)
    second.emplace(
        SecondStream{streams[0], streams[1], cuda::Queue{native(streams[1])}, buffers_[1], step_});
  try {
    int64_t next = 0;
    for (size_t i = 0; i < requests.size(); ++i) {
      const cuda::PreparedLayer& layer = *requests[i].prepared;
      const at::Tensor W_enc = layer.streamed ? weights->load(layer.W_enc, streams) : layer.W_enc;
      const int64_t rows = requests[i].row_count(), chunk = chunk_rows(requests[i], plan_);
      for (int64_t first = 0; first < rows; first += chunk, next = (next + 1) % stream_count) {
        const c10::StreamGuard guard(streams[next]);
        cuda::Queue queue = {native(streams[next])};
        encode_rows(requests[i], first, std::min(chunk, rows - first), W_enc, pointers(i),
                    buffers_[next], plan_, queue, second ? &*second : nullptr);
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

void* CudaStreams::make_graph(const std::vector<CudaRequest>& requests) const {
  void *graph = nullptr, *executable = nullptr;
  if (cuda::make_graph(&graph) != 0) return nullptr;
  // One branch per set of buffers.
  std::vector<cuda::Queue> branches(std::min(buffers_.size(), requests.size()));
  for (cuda::Queue& branch : branches) branch.graph = graph;
  try {
    for (size_t i = 0; i < requests.size(); ++i) {
      const size_t branch = i % branches.size();
      const int64_t rows = requests[i].row_count(), chunk = chunk_rows(requests[i], plan_);
      for (int64_t first = 0; first < rows; first += chunk)
        encode_rows(requests[i], first, std::min(chunk, rows - first), requests[i].prepared->W_enc,
                    pointers(i), buffers_[branch], plan_, branches[branch]);
    }
  } catch (const c10::Error&) {
    cuda::finish_graph(graph, &executable);
    if (executable) cuda::destroy_graph(executable);
    return nullptr;
  }
  return cuda::finish_graph(graph, &executable) == 0 ? executable : nullptr;
}

}  // namespace sparse_transcoder
