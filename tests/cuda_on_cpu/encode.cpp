// The CUDA backend on CPU tensors, with kernels whose threads are CPU threads. Products are as far
// off as their margin allows, or nearly: towards one side for even features, the other for odd
// ones.
#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include <deque>
#include <thread>

#include "backend.h"
#include "cuda/products.h"
#include "cuda/streams.h"
#include "cuda_runtime.h"
#include "streams.h"

namespace sparse_transcoder {

int64_t products_left = -1;  // until one fails; negative: none does

void multiply(at::Tensor out, const at::Tensor& left, const at::Tensor& right) {
  TORCH_CHECK(products_left-- != 0, "this product fails");
  enqueue(current_stream(), [=] {
    at::Tensor x = left.to(at::kDouble), w = right.to(at::kDouble);
    if (left.scalar_type() == at::kFloat) {  // as TF32 does
      const auto cut = [](const at::Tensor& t) {
        return t.to(at::kFloat).view(at::kInt).bitwise_and(~0x1fff).view(at::kFloat);
      };
      x = cut(x).to(at::kDouble);
      w = cut(w).to(at::kDouble);
    }
    const at::Tensor off =
        at::matmul(x.abs(), w.abs().t()) * (0.9 * 1.25 * (left.size(1) + 16) * 0x1p-22);
    const at::Tensor sign = at::arange(w.size(0)).remainder(2) * 2 - 1;
    out.copy_(at::matmul(x, w.t()) + off * sign);
  });
}

void copy_to(at::Tensor to, const at::Tensor& from) {
  enqueue(current_stream(), [=] { to.copy_(from); });
}

at::Tensor pinned(const at::Tensor& from) { return from.clone(); }

namespace {

using OptionalTensor = std::optional<at::Tensor>;

Layer make_layer(int64_t id, const LayerWeights& weights, const Options& options) {
  return Layer(id, weights, at::kCPU, options.activation_threshold);
}

CudaRequest chosen(const Request& request, const cuda::PreparedLayer& layer) {
  return {request, &layer, cuda::choose_product(layer, request)};
}

// A request with the tensors that it points to.
struct Call {
  Call(const Layer& layer, const at::Tensor& hidden, const Options& options)
      : hidden(hidden), request{&layer, view_of(hidden), k_out(layer, options)} {
    const int64_t rows = request.row_count(), k = request.k_out;
    out = {at::full({rows, k}, -1.0f), at::full({rows, k}, -1, at::kLong), at::full({rows}, -1.0f)};
    request.out = view_of(out);
  }
  at::Tensor hidden;
  Features out;
  Request request;
};

// One layer, chunk by chunk, with a tile of `scores` floats and lists with `room` beyond the
// features that are gated at a time.
std::tuple<at::Tensor, at::Tensor, at::Tensor> encode(
    const at::Tensor& hidden, const at::Tensor& W_enc, const at::Tensor& b_enc,
    const OptionalTensor& threshold, std::optional<int64_t> k, const OptionalTensor& input_bias,
    const OptionalTensor& ln_weight, const OptionalTensor& ln_bias, int64_t top_k, double tau,
    int64_t screening, int64_t chunk, int64_t scores, int64_t room, int64_t lists) {
  const at::Tensor none;
  Options options;
  options.top_k = top_k;
  options.activation_threshold = static_cast<float>(tau);
  options.chunk_size = chunk;
  LayerWeights weights;
  weights.W_enc = W_enc;
  weights.b_enc = b_enc;
  weights.threshold = threshold.value_or(none);
  weights.k = k;
  weights.input_bias = input_bias.value_or(none);
  weights.ln_weight = ln_weight.value_or(none);
  weights.ln_bias = ln_bias.value_or(none);
  options.screening = static_cast<Screening>(screening);
  const cuda::PreparedLayer layer =
      cuda::prepare_layer(make_layer(0, weights, options), options, false);
  CudaPlan plan = plan_cuda({&layer}, options, k_out(layer, options), 3);
  plan.scores = std::max(scores, plan.rows);
  plan.widened = plan.widened > 0 ? std::max(scores, plan.hidden_size) : 0;
  plan.capacity = cuda::list_room + room;
  plan.lists = std::max(lists, plan.rows);
  const CudaBuffers buffers(plan, at::kCPU);
  const Call call(layer, hidden, options);
  const CudaRequest request = chosen(call.request, layer);
  const cuda::LayerPointers pointers = {hidden.const_data_ptr(),
                                        hidden.size(1),
                                        {hidden.stride(0), hidden.stride(1), hidden.stride(2)},
                                        request.out.activations,
                                        request.out.indices,
                                        request.out.sparsity};
  cuda::Queue at_once;
  const int64_t rows = request.row_count(), step = chunk_rows(request, plan);
  for (int64_t first = 0; first < rows; first += step)
    encode_rows(request, first, std::min(step, rows - first), layer.W_enc, &pointers, buffers, plan,
                at_once);
  return {call.out.activations, call.out.indices, call.out.sparsity};
}

// What the int8 screen makes of at most 64 rows: scores [rows, F], by tensor cores or else by the
// product of few rows, and the margins of features that it compares with.
std::tuple<at::Tensor, at::Tensor> int8_scores(const at::Tensor& hidden, const at::Tensor& W_enc,
                                               bool tensor_cores) {
  Options options;
  options.screening = Screening::int8;
  LayerWeights weights;
  weights.W_enc = W_enc;
  weights.b_enc = at::zeros({W_enc.size(0)});
  const cuda::PreparedLayer layer =
      cuda::prepare_layer(make_layer(0, weights, options), options, false);
  const int64_t rows = hidden.size(0), size = layer.hidden_size, inputs = layer.int8.size(1);
  const CudaBuffers buffers(plan_cuda({&layer}, options, 1, 3), at::kCPU);
  const cuda::LayerPointers pointers = {hidden.const_data_ptr(), rows, {0, hidden.stride(0), 1}};
  const cuda::Int8Rows int8 = {buffers.int8_rows.mutable_data_ptr<int8_t>(),
                               static_cast<int>(inputs), layer.int8_norm};
  auto* margins = static_cast<Margin*>(buffers.margins.mutable_data_ptr());
  const at::Tensor scores = at::empty({rows, layer.features}),
                   margin = at::empty({rows, 1}, at::kDouble);
  cuda::Queue at_once;
  cuda::prepare({&pointers, dtype_of(hidden.scalar_type()), 0, rows, size},
                {cuda::int8_rounding, 0, layer.bounds.max_norm, cuda::int8_share},
                buffers.hidden.mutable_data_ptr<float>(), nullptr, int8, margins,
                buffers.lists(1, 1, 1), at_once);
  const auto multiply_int8 = tensor_cores ? cuda::product_tensor_int8 : cuda::product_int8;
  multiply_int8(int8.rows, rows, layer.int8.const_data_ptr<int8_t>(),
                layer.int8_scale.const_data_ptr<float>(), 0, layer.features, inputs,
                scores.mutable_data_ptr<float>(), at_once);
  for (int64_t r = 0; r < rows; ++r) margin[r][0] = static_cast<double>(margins[r].per_norm);
  return {scores, margin * layer.int8_error};
}

// What multiplies for calls of so many rows of a layer, which are like `hidden`.
std::vector<int64_t> products(const at::Tensor& W_enc, const OptionalTensor& input_bias,
                              int64_t screening, bool tensor_cores, const at::Tensor& hidden,
                              const std::vector<int64_t>& rows) {
  Options options;
  options.screening = static_cast<Screening>(screening);
  const at::Tensor b_enc = at::zeros({W_enc.size(0)});
  LayerWeights weights = {W_enc, b_enc};
  if (input_bias) weights.input_bias = *input_bias;
  const Layer layer = make_layer(0, weights, options);
  ::tensor_cores = tensor_cores;
  const cuda::PreparedLayer prepared = cuda::prepare_layer(layer, options, false);
  ::tensor_cores = true;
  std::vector<int64_t> result;
  for (const int64_t count : rows)
    result.push_back(static_cast<int64_t>(
        cuda::choose_product(prepared, {&layer, view_of(hidden.expand({count, -1}))})));
  return result;
}

// A copy that ends where memory ends: reading beyond it stops the process.
at::Tensor guarded(const at::Tensor& from) {
  const size_t page = getpagesize(), bytes = (from.nbytes() + page - 1) / page * page;
  void* memory =
      mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(memory != MAP_FAILED);
  mprotect(static_cast<char*>(memory) + bytes, page, PROT_NONE);
  const at::Tensor copy = at::from_blob(
      static_cast<char*>(memory) + bytes - from.nbytes(), from.sizes(),
      [memory, bytes, page](void*) { munmap(memory, bytes + page); }, from.options());
  return copy.copy_(from);
}

// The int8 screen's product of rows 256 high + low [rows, inputs] and p [F, inputs], on tensor
// cores or else by the product of few rows: scores of features from `first` on, in a tensor that
// has one number more.
at::Tensor int8_product(const at::Tensor& high, const at::Tensor& low, const at::Tensor& row_scale,
                        const at::Tensor& p, const at::Tensor& scale, int64_t first,
                        bool tensor_cores) {
  const int64_t row_count = high.size(0), inputs = high.size(1), count = p.size(0) - first;
  const at::Tensor rows = at::full(
      {tensor_cores ? row_count : cuda::few_rows, int64_t{cuda::int8_row_bytes}}, 77, at::kChar);
  for (int64_t r = 0; r < row_count; ++r) {
    auto* row = rows[r].mutable_data_ptr<int8_t>();
    std::copy_n(high[r].const_data_ptr<int8_t>(), inputs, row);
    std::copy_n(low[r].const_data_ptr<int8_t>(), inputs, row + cuda::int8_plane_bytes);
    *reinterpret_cast<float*>(row + 2 * cuda::int8_plane_bytes) = row_scale[r].item<float>();
  }
  const at::Tensor scores = at::full({row_count * count + 1}, -1.0f);
  const auto multiply_int8 = tensor_cores ? cuda::product_tensor_int8 : cuda::product_int8;
  const at::Tensor left = guarded(rows), right = guarded(p), scales = guarded(scale);
  cuda::Queue at_once;
  multiply_int8(left.const_data_ptr<int8_t>(), row_count, right.const_data_ptr<int8_t>(),
                scales.const_data_ptr<float>(), first, count, inputs,
                scores.mutable_data_ptr<float>(), at_once);
  return scores;
}

// The same of x [rows, H] and W_enc [F, H], both bfloat16.
at::Tensor bf16_product(const at::Tensor& x, const at::Tensor& W_enc, int64_t first) {
  const int64_t rows = x.size(0), count = W_enc.size(0) - first;
  const at::Tensor scores = at::full({rows * count + 1}, -1.0f);
  const at::Tensor left = guarded(x), right = guarded(W_enc);
  cuda::Queue at_once;
  cuda::product_tensor_bf16(left.const_data_ptr(), rows, right.const_data_ptr(), first, count,
                            x.size(1), scores.mutable_data_ptr<float>(), at_once);
  return scores;
}
// While it lives, memory comes from it; a request fails after so many, or none where it is
// negative.
class FailingAllocator final : public at::Allocator {
 public:
  explicit FailingAllocator(int64_t failing) : failing_(failing) { c10::SetCPUAllocator(this); }
  ~FailingAllocator() override { c10::SetCPUAllocator(before_); }

  at::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK_WITH(OutOfMemoryError, failing_-- != 0, "no memory\nis left");
    return before_->allocate(bytes);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    before_->copy_data(to, from, bytes);
  }

 private:
  at::Allocator* const before_ = c10::GetCPUAllocator();
  int64_t failing_;
};

// Bytes of the screening copies of a layer that is on the device, or may take so much of it.
int64_t screening_bytes(const at::Tensor& W_enc, int64_t screening, int64_t device_weight_bytes,
                        int64_t failing) {
  Options options;
  options.screening = static_cast<Screening>(screening);
  options.device_weight_bytes = device_weight_bytes;
  LayerWeights weights;
  weights.W_enc = W_enc;
  weights.b_enc = at::zeros({W_enc.size(0)});
  const Layer layer = make_layer(0, weights, options);
  const bool streamed =
      device_weight_bytes >= 0 && cuda::resident_bytes(layer, options) > device_weight_bytes;
  const FailingAllocator allocator(failing);
  return cuda::prepare_layer(layer, options, streamed).screening_bytes();
}

// Every kept feature of one layer, as Engine::encode_sparse gives it.
std::tuple<at::Tensor, at::Tensor, at::Tensor> encode_sparse(const at::Tensor& hidden,
                                                             const at::Tensor& W_enc,
                                                             const at::Tensor& b_enc,
                                                             std::optional<int64_t> k, double tau,
                                                             int64_t chunk, bool streamed) {
  products_left = -1;
  Options options;
  options.activation_threshold = static_cast<float>(tau);
  options.chunk_size = chunk;
  LayerWeights weights;
  weights.W_enc = W_enc;
  weights.b_enc = b_enc;
  weights.k = k;
  options.device_weight_bytes = streamed ? 0 : int64_t{1} << 40;
  const Layer layer = make_layer(0, weights, options);
  const Streams at_once({});
  const SparseFeatures found = make_cuda_backend({&layer}, options, at::kCPU)
                                   ->encode_sparse({{&layer, view_of(hidden)}})
                                   .front();
  return {found.row_begin, found.features, found.activations};
}

// What encode_into gives a sink of one layer, put together: the k strongest features of each row.
std::tuple<at::Tensor, at::Tensor, at::Tensor> encode_into(const at::Tensor& hidden,
                                                           const at::Tensor& W_enc,
                                                           const at::Tensor& b_enc,
                                                           std::optional<int64_t> k, double tau,
                                                           int64_t chunk, int64_t top_k) {
  products_left = -1;
  Options options;
  options.activation_threshold = static_cast<float>(tau);
  options.chunk_size = chunk;
  LayerWeights weights;
  weights.W_enc = W_enc;
  weights.b_enc = b_enc;
  weights.k = k;
  const Layer layer = make_layer(0, weights, options);
  const Streams at_once({});
  std::vector<at::Tensor> counts = {at::zeros({1}, at::kLong)}, features, activations;
  make_cuda_backend({&layer}, options, at::kCPU)
      ->encode_into({{&layer, view_of(hidden), std::min(top_k, layer.features)}},
                    {at::kUInt16, at::kHalf}, [&](const SparseRows& rows) {
                      counts.push_back(rows.features.row_begin.diff());
                      features.push_back(rows.features.features);
                      activations.push_back(rows.features.activations);
                    });
  return {at::cat(counts).cumsum(0), at::cat(features), at::cat(activations)};
}

// Calls of many layers, one after the other and none waited for; call c encodes hidden[c][i] with
// layer i, on stream callers[c]. Hidden states are written by work on that stream just before, and
// they and the results are overwritten just after. `alive` must live until all work is done.
template <typename Encode>
std::vector<at::Tensor> run_calls(const std::deque<Layer>& layers, const Options& options,
                                  const std::vector<std::vector<at::Tensor>>& hidden,
                                  const std::vector<int64_t>& callers, const Streams& streams,
                                  std::vector<at::Tensor>& alive, const Encode& encode) {
  std::vector<at::Tensor> results;
  for (size_t call = 0; call < hidden.size(); ++call) {
    streams.set_current(streams.stream(callers[call]));
    std::vector<Call> made;
    std::vector<Request> requests;
    for (size_t i = 0; i < layers.size(); ++i) {
      const at::Tensor& rows = hidden[call][i];
      const at::Tensor h = at::full_like(rows, std::numeric_limits<float>::quiet_NaN());
      copy_to(h, rows);
      made.emplace_back(layers[i], h, options);
      requests.push_back(made.back().request);
    }
    try {
      encode(requests);
    } catch (const c10::Error&) {  // its results are whatever they are; those of the others must
                                   // not be
      TORCH_CHECK(products_left < 0);
    }
    for (const Call& one : made)
      for (const at::Tensor& out : {one.out.activations, one.out.indices, one.out.sparsity}) {
        alive.push_back(out);
        results.push_back(at::full_like(out, -2));
        copy_to(results.back(), out);
        copy_to(out, at::full_like(out, -3));
      }
    for (const Call& one : made) {
      copy_to(one.hidden, at::full_like(one.hidden, 1e9));
      alive.push_back(one.hidden);
    }
  }
  return results;
}

Layer layer_of(int64_t id, const at::Tensor& W_enc, const Options& options) {
  LayerWeights weights;
  weights.W_enc = W_enc;
  weights.b_enc = at::zeros({W_enc.size(0)}, W_enc.options());
  return make_layer(id, weights, options);
}

std::vector<at::Tensor> encode_calls(const std::vector<at::Tensor>& W_enc,
                                     const std::vector<int64_t>& streamed,
                                     const std::vector<std::vector<at::Tensor>>& hidden,
                                     const std::vector<int64_t>& callers, int64_t top_k,
                                     int64_t chunk, bool use_graphs, int64_t seed, int64_t failing,
                                     int64_t screening) {
  Options options;
  options.top_k = top_k;
  options.activation_threshold = 0;
  options.chunk_size = chunk;
  options.use_graphs = use_graphs;
  options.screening = static_cast<Screening>(screening);
  options.device_weight_bytes = 0;
  std::deque<Layer> layers;
  std::vector<const Layer*> pointers;
  for (size_t i = 0; i < W_enc.size(); ++i) {
    layers.push_back(layer_of(i, W_enc[i], options));
    pointers.push_back(&layers.back());
    if (!streamed[i]) options.device_weight_bytes += cuda::resident_bytes(layers.back(), options);
  }
  std::vector<at::Tensor> alive, results;
  products_left = failing;
  const Streams streams(static_cast<uint64_t>(seed));
  {
    const std::unique_ptr<Backend> device = make_cuda_backend(pointers, options, at::kCPU);
    results = run_calls(layers, options, hidden, callers, streams, alive,
                        [&](const std::vector<Request>& requests) { device->encode(requests); });
    streams.run_all();
  }
  return results;
}

// The same of one layer, whose rows are one chunk and whose tiles have `scores` floats.
std::vector<at::Tensor> encode_tiles(const at::Tensor& W_enc, bool streamed,
                                     const std::vector<at::Tensor>& hidden,
                                     const std::vector<int64_t>& callers, int64_t top_k,
                                     int64_t scores, int64_t seed, int64_t failing,
                                     int64_t screening) {
  Options options;
  options.top_k = top_k;
  options.activation_threshold = 0;
  options.chunk_size = 16;
  options.screening = static_cast<Screening>(screening);
  const std::deque<Layer> layers = {layer_of(0, W_enc, options)};
  const cuda::PreparedLayer prepared = cuda::prepare_layer(layers[0], options, streamed);
  CudaPlan plan = plan_cuda({&prepared}, options, top_k, 3);
  plan.scores = std::max(scores, plan.rows);
  plan.widened = plan.widened > 0 ? std::max(scores, plan.hidden_size) : 0;
  plan.lists = plan.rows;
  std::vector<std::vector<at::Tensor>> calls;
  for (const at::Tensor& rows : hidden) calls.push_back({rows});
  std::vector<at::Tensor> alive, results;
  products_left = failing;
  const Streams streams(static_cast<uint64_t>(seed));
  {
    CudaStreams device(plan, at::kCPU);
    WeightStream weights(prepared.W_enc.nbytes(), at::kCPU);
    results = run_calls(
        layers, options, calls, callers, streams, alive, [&](const std::vector<Request>& requests) {
          device.encode({chosen(requests[0], prepared)}, streamed ? &weights : nullptr, true);
        });
    streams.run_all();
  }
  return results;
}

// Calls of layers with int8 copies, each done before the next one is chosen for. period: of an
// Int8Trial; 0 for none. room: that of lists beyond k. Beside results: for each call and layer its
// first chunk's int8 inputs, or 0 where it was screened otherwise, and then the candidates that its
// rows are said to have.
std::tuple<std::vector<at::Tensor>, at::Tensor> encode_on_trial(
    const std::vector<at::Tensor>& W_enc, const std::vector<std::vector<at::Tensor>>& hidden,
    int64_t top_k, double tau, int64_t chunk, bool use_graphs, int64_t seed, int64_t period,
    int64_t room, int64_t lists) {
  Options options;
  options.top_k = top_k;
  options.activation_threshold = static_cast<float>(tau);
  options.chunk_size = chunk;
  options.screening = Screening::int8;
  std::deque<Layer> layers;
  std::deque<cuda::PreparedLayer> prepared;
  std::vector<const cuda::PreparedLayer*> pointers;
  for (size_t i = 0; i < W_enc.size(); ++i) {
    layers.push_back(layer_of(i, W_enc[i], options));
    prepared.push_back(cuda::prepare_layer(layers.back(), options, false));
    if (period > 0)
      prepared.back().int8_trial =
          std::make_unique<cuda::Int8Trial>(prepared.back().features, period);
    pointers.push_back(&prepared.back());
  }
  CudaPlan plan = plan_cuda(pointers, options, top_k, 3);
  plan.capacity = top_k + cuda::list_room + room;
  plan.lists = std::max(lists, plan.rows);
  const at::Tensor seen =
      at::zeros({static_cast<int64_t>(hidden.size()), static_cast<int64_t>(layers.size()),
                 1 + cuda::Int8Trial::rows},
                at::kInt);
  std::vector<at::Tensor> alive, results;
  products_left = -1;
  const Streams streams(static_cast<uint64_t>(seed));
  {
    CudaStreams device(plan, at::kCPU);
    int64_t call = 0;
    const std::vector<int64_t> callers(hidden.size(), 1);
    results = run_calls(layers, options, hidden, callers, streams, alive,
                        [&](const std::vector<Request>& requests) {
                          std::vector<CudaRequest> all;
                          for (size_t i = 0; i < requests.size(); ++i)
                            all.push_back(chosen(requests[i], prepared[i]));
                          int8_chunks.clear();
                          device.encode(all, nullptr, use_graphs);
                          streams.run_all();
                          for (size_t i = 0; i < requests.size(); ++i) {
                            int* numbers = seen[call][i].mutable_data_ptr<int>();
                            const int64_t inputs = prepared[i].int8.size(1);
                            if (std::ranges::count(int8_chunks, inputs))
                              numbers[0] = static_cast<int>(inputs);
                            if (prepared[i].int8_trial)
                              std::copy_n(prepared[i].int8_trial->candidates(),
                                          cuda::Int8Trial::rows, numbers + 1);
                          }
                          ++call;
                        });
    streams.run_all();
  }
  return {results, seen};
}

// Whether a layer's int8 screen is on trial.
bool on_trial(const at::Tensor& W_enc, int64_t screening) {
  Options options;
  options.screening = static_cast<Screening>(screening);
  return !!cuda::prepare_layer(layer_of(0, W_enc, options), options, false).int8_trial;
}

// Calls that a trial lets be screened in int8. Call c has candidates[c] in each of rows[c] rows.
// All calls are made by each of so many threads.
std::vector<int64_t> int8_calls(int64_t features, const std::vector<int64_t>& rows,
                                const std::vector<int64_t>& candidates, int64_t threads) {
  cuda::Int8Trial trial(features);
  std::vector<std::vector<int64_t>> found(threads);
  const auto work = [&](std::vector<int64_t>& mine) {
    for (size_t call = 0; call < rows.size(); ++call) {
      if (!trial.next()) continue;
      mine.push_back(static_cast<int64_t>(call));
      for (int64_t row = 0; row < rows[call]; ++row)
        std::atomic_ref(trial.candidates()[row]).store(static_cast<int>(candidates[call]));
    }
  };
  std::vector<std::thread> running;
  for (int64_t t = 1; t < threads; ++t) running.emplace_back([&, t] { work(found[t]); });
  work(found[0]);
  for (std::thread& one : running) one.join();
  std::vector<int64_t> all;
  for (const auto& mine : found) all.insert(all.end(), mine.begin(), mine.end());
  return all;
}

}  // namespace
}  // namespace sparse_transcoder

// Hidden states of `layers` layers per call.
static std::vector<std::vector<at::Tensor>> by_call(const std::vector<at::Tensor>& hidden,
                                                    size_t layers) {
  std::vector<std::vector<at::Tensor>> calls;
  for (size_t i = 0; i < hidden.size(); i += layers)
    calls.emplace_back(hidden.begin() + i, hidden.begin() + i + layers);
  return calls;
}

TORCH_LIBRARY(cuda_on_cpu, library) {
  library.def(
      "encode(Tensor hidden, Tensor W_enc, Tensor b_enc, Tensor? threshold, int? k, Tensor? "
      "input_bias, Tensor? ln_weight, "
      "Tensor? ln_bias, int top_k, float tau, int screening, int chunk, int scores, int room, int "
      "lists) -> (Tensor, Tensor, "
      "Tensor)",
      &sparse_transcoder::encode);
  library.def("int8_scores(Tensor hidden, Tensor W_enc, bool tensor_cores) -> (Tensor, Tensor)",
              &sparse_transcoder::int8_scores);
  library.def(
      "int8_product(Tensor high, Tensor low, Tensor row_scale, Tensor p, Tensor scale, int first, "
      "bool tensor_cores) -> Tensor",
      &sparse_transcoder::int8_product);
  library.def("bf16_product(Tensor x, Tensor W_enc, int first) -> Tensor",
              &sparse_transcoder::bf16_product);
  library.def(
      "products(Tensor W_enc, Tensor? input_bias, int screening, bool tensor_cores, Tensor hidden, "
      "int[] rows) -> int[]",
      &sparse_transcoder::products);
  library.def(
      "screening_bytes(Tensor W_enc, int screening, int device_weight_bytes, int failing=-1) -> "
      "int",
      &sparse_transcoder::screening_bytes);
  library.def(
      "encode_sparse(Tensor hidden, Tensor W_enc, Tensor b_enc, int? k, float tau, int chunk, bool "
      "streamed) "
      "-> (Tensor, Tensor, Tensor)",
      &sparse_transcoder::encode_sparse);
  library.def(
      "encode_into(Tensor hidden, Tensor W_enc, Tensor b_enc, int? k, float tau, int chunk, int "
      "top_k) -> (Tensor, Tensor, Tensor)",
      &sparse_transcoder::encode_into);
  library.def(
      "encode_calls(Tensor[] W_enc, int[] streamed, Tensor[] hidden, int[] callers, int top_k, int "
      "chunk, bool use_graphs, "
      "int seed, int failing, int screening) -> Tensor[]",
      [](const std::vector<at::Tensor>& W_enc, const std::vector<int64_t>& streamed,
         const std::vector<at::Tensor>& hidden, const std::vector<int64_t>& callers, int64_t top_k,
         int64_t chunk, bool use_graphs, int64_t seed, int64_t failing, int64_t screening) {
        return sparse_transcoder::encode_calls(W_enc, streamed, by_call(hidden, W_enc.size()),
                                               callers, top_k, chunk, use_graphs, seed, failing,
                                               screening);
      });
  library.def(
      "encode_tiles(Tensor W_enc, bool streamed, Tensor[] hidden, int[] callers, int top_k, int "
      "scores, int seed, int failing, int screening) -> Tensor[]",
      &sparse_transcoder::encode_tiles);
  library.def(
      "encode_on_trial(Tensor[] W_enc, Tensor[] hidden, int top_k, float tau, int chunk, bool "
      "use_graphs, int seed, int period, int room=9999, int lists=256) -> (Tensor[], Tensor)",
      [](const std::vector<at::Tensor>& W_enc, const std::vector<at::Tensor>& hidden, int64_t top_k,
         double tau, int64_t chunk, bool use_graphs, int64_t seed, int64_t period, int64_t room,
         int64_t lists) {
        return sparse_transcoder::encode_on_trial(W_enc, by_call(hidden, W_enc.size()), top_k, tau,
                                                  chunk, use_graphs, seed, period, room, lists);
      });
  library.def("on_trial(Tensor W_enc, int screening) -> bool", &sparse_transcoder::on_trial);
  library.def("int8_calls(int features, int[] rows, int[] candidates, int threads=1) -> int[]",
              &sparse_transcoder::int8_calls);
  library.def("fail_graphs(int count) -> ()", [](int64_t count) {
    failing_graphs = count;
    launched_graphs = 0;
  });
  library.def("set_tensor_cores(bool have) -> ()", [](bool have) { tensor_cores = have; });
  library.def("launched_graphs() -> int", [] { return launched_graphs; });
}
