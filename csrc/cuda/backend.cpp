// The CUDA backend: its prepared layers, and the streams that calls borrow.
#include "backend.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <sparse_transcoder/engine.h>

#include <optional>

#include "bounds.h"
#include "cuda/streams.h"
#include "cuda/weight_copy.h"
#include "pool.h"

namespace sparse_transcoder {
namespace {

int64_t multiprocessors_of(at::Device device) {
  const c10::DeviceGuard guard(device);
  int count = 0;
  check_cuda(cuda::multiprocessors(&count));
  return count;
}

class CudaBackend : public Backend {
 public:
  CudaBackend(const std::vector<const Layer*>& layers, const Options& options, at::Device device);

  void encode(const std::vector<Request>& requests, Explanation* explanation) const override;
  std::vector<SparseFeatures> encode_sparse(std::vector<Request> requests) const override;
  void encode_into(const std::vector<Request>& requests, const SparseFormat& format,
                   const SparseSink& sink) const override;
  Memory memory() const override;

 private:
  void refuse_capture() const;
  CudaRequest prepared(const Request& request) const {
    const cuda::PreparedLayer& layer = layers_.at(request.layer->id);
    return {request, &layer, cuda::choose_product(layer, request)};
  }

  SparseFeatures encode_sparse(const Request& request) const;
  // Encodes rows [1, rows, H] of one layer with room for k features each.
  Features encode_some(CudaStreams& streams, const cuda::PreparedLayer& layer,
                       const at::Tensor& some, int64_t k) const;

  const Options options_;
  const at::Device device_;
  int64_t multiprocessors_, max_k_ = 1;
  std::map<int64_t, cuda::PreparedLayer> layers_;
  std::unique_ptr<WeightStream> weights_;  // null where every layer's weights are on the device
  std::unique_ptr<Pool<CudaStreams>> pool_;
};

CudaBackend::CudaBackend(const std::vector<const Layer*>& layers, const Options& options,
                         at::Device device)
    : options_(options), device_(device), multiprocessors_(multiprocessors_of(device)) {
  int64_t left = options.device_weight_bytes, staging_bytes = 0;
  std::vector<const cuda::PreparedLayer*> all;
  for (const Layer* layer : layers) {
    const int64_t bytes = cuda::resident_bytes(*layer, options);
    const bool streamed = layer->declared.W_enc.is_cpu() && bytes > left;
    if (layer->declared.W_enc.is_cpu() && !streamed) left -= bytes;
    const auto made = layers_.emplace(layer->id, cuda::prepare_layer(*layer, options, streamed));
    all.push_back(&made.first->second);
    max_k_ = std::max(max_k_, std::min(k_out(*layer, options), layer->max_active));
    if (streamed) staging_bytes = std::max<int64_t>(staging_bytes, all.back()->W_enc.nbytes());
  }
  // Calls may come from other streams than the one that makes the copies and bounds.
  c10::impl::VirtualGuardImpl(device.type()).getStream(device).synchronize();
  const CudaPlan plan = plan_cuda(all, options, max_k_, multiprocessors_);
  if (staging_bytes > 0) weights_ = std::make_unique<WeightStream>(staging_bytes, device);
  pool_ = std::make_unique<Pool<CudaStreams>>(
      [plan, device] { return std::make_unique<CudaStreams>(plan, device); });
}

void CudaBackend::refuse_capture() const {
  const c10::impl::VirtualGuardImpl guard(device_.type());
  TORCH_CHECK_VALUE(!cuda::is_capturing(guard.getStreamNativeHandle(guard.getStream(device_))),
                    "encode cannot be captured in a CUDA graph: later calls share its workspace; "
                    "use_compile replays graphs of its own");
}

void CudaBackend::encode(const std::vector<Request>& requests, Explanation* explanation) const {
  TORCH_CHECK_VALUE(!explanation, "layer ", requests.front().layer->id,
                    ": explain needs hidden on cpu, got ", device_);
  refuse_capture();
  std::vector<CudaRequest> mine;
  for (const Request& request : requests) mine.push_back(prepared(request));
  // Largest first, so that no stream is left alone with a large layer at the end; streamed layers
  // last and in their order, so that the next one's weights come in while one is encoded.
  std::stable_sort(mine.begin(), mine.end(), [](const CudaRequest& a, const CudaRequest& b) {
    const auto size = [](const cuda::PreparedLayer& layer) {
      return layer.streamed ? 0 : layer.W_enc.numel();
    };
    return size(*a.prepared) > size(*b.prepared);
  });
  pool_->borrow()->encode(mine, weights_.get(), options_.use_graphs);
}

Features CudaBackend::encode_some(CudaStreams& streams, const cuda::PreparedLayer& layer,
                                  const at::Tensor& some, int64_t k) const {
  const auto ranks = some.options().dtype(at::kFloat);
  const Features out = {at::empty({some.size(1), k}, ranks),
                        at::empty({some.size(1), k}, ranks.dtype(at::kLong)),
                        at::empty({some.size(1)}, ranks)};
  streams.encode({prepared({&layer, view_of(some), k, view_of(out)})}, weights_.get(), false);
  return out;
}

std::vector<SparseFeatures> CudaBackend::encode_sparse(std::vector<Request> requests) const {
  std::vector<SparseFeatures> found;
  for (const Request& request : requests) found.push_back(encode_sparse(request));
  return found;
}

// The active features of ranks, in ascending order; a row that is not finite has NaN at feature 0.
SparseFeatures kept_of(const Features& top, int64_t features) {
  const at::Tensor broken = at::isnan(top.activations.narrow(1, 0, 1)), kept = top.activations > 0;
  kept.narrow(1, 0, 1).logical_or_(broken);
  const auto [ascending, order] = at::where(kept, top.indices, features).sort(-1);
  const at::Tensor none = at::zeros({1}, top.indices.options());
  return {at::cat({none, kept.sum(1).cumsum(0)}), ascending.masked_select(ascending < features),
          top.activations.gather(1, order).masked_select(ascending < features)};
}

// Two passes: all rows are counted, then written chunk by chunk. Waits for the counts.
SparseFeatures CudaBackend::encode_sparse(const Request& request) const {
  refuse_capture();
  const cuda::PreparedLayer& layer = layers_.at(request.layer->id);
  const int64_t rows = request.row_count(), features = layer.features;
  const at::Tensor hidden = tensor_of(request.hidden, layer.hidden_size, layer.device)
                                .reshape({1, rows, layer.hidden_size});
  const auto streams = pool_->borrow();
  const at::Tensor sparsity = encode_some(*streams, layer, hidden, 1).sparsity.nan_to_num(0),
                   fractions = sparsity.to(at::kCPU);
  // Room for the largest count of rows, rounded up past the float32 rounding of the fraction.
  const auto room = [&](const at::Tensor& some) {
    const double fraction = some.max().item<double>();
    return std::min(static_cast<int64_t>(fraction * features * round_up) + 1, layer.max_active);
  };
  // Larger lists than those of the top-k path exist only as long as this call.
  const int64_t max_room = room(fractions);
  std::optional<CudaStreams> larger;
  if (max_room > max_k_) {
    Options one_stream = options_;
    one_stream.lanes = 1;
    larger.emplace(plan_cuda({&layer}, one_stream, max_room, multiprocessors_), *streams);
  }
  CudaStreams& writers = larger ? *larger : *streams;
  std::vector<at::Tensor> counts, indices, activations;
  for (int64_t first = 0; first < rows; first += options_.chunk_size) {
    const int64_t count = std::min(options_.chunk_size, rows - first);
    const Features top = encode_some(writers, layer, hidden.narrow(1, first, count),
                                     room(fractions.narrow(0, first, count)));
    TORCH_CHECK_VALUE(at::equal(top.sparsity.nan_to_num(0), sparsity.narrow(0, first, count)),
                      layer.changed());
    const SparseFeatures found = kept_of(top, features);
    counts.push_back(found.row_begin.diff());
    indices.push_back(found.features);
    activations.push_back(found.activations);
  }
  return {at::cat({at::zeros({1}, hidden.options().dtype(at::kLong)), at::cat(counts).cumsum(0)}),
          at::cat(indices), at::cat(activations)};
}

// float16 as SparseFormat says.
at::Tensor to_half(const at::Tensor& activations) {
  const at::Tensor half = activations.clamp_max(65504).to(at::kHalf);
  return half.masked_fill(half == 0, 0x1p-24);
}

void CudaBackend::encode_into(const std::vector<Request>& requests, const SparseFormat& format,
                              const SparseSink& sink) const {
  refuse_capture();
  const bool half = format.activations == at::kHalf;
  for (const Request& request : requests) {
    const cuda::PreparedLayer& layer = layers_.at(request.layer->id);
    const int64_t rows = request.row_count();
    const at::Tensor hidden = tensor_of(request.hidden, layer.hidden_size, layer.device)
                                  .reshape({1, rows, layer.hidden_size});
    for (int64_t first = 0; first < rows; first += options_.chunk_size) {
      const at::Tensor some = hidden.narrow(1, first, std::min(options_.chunk_size, rows - first));
      const SparseFeatures found =
          request.k_out == layer.features
              ? encode_sparse(Request{request.layer, view_of(some)})
              : kept_of(encode_some(*pool_->borrow(), layer, some, request.k_filled()),
                        layer.features);
      const at::Tensor& values = found.activations;
      sink({layer.id,
            first,
            {found.row_begin, found.features.to(format.features), half ? to_half(values) : values},
            half ? (values > 65504).sum().item<int64_t>() : 0});
    }
  }
}

Memory CudaBackend::memory() const {
  Memory memory = {};
  for (const auto& [id, layer] : layers_) {
    if (!layer.W_enc.is_alias_of(layer.declared.W_enc)) memory.weight_bytes += layer.W_enc.nbytes();
    memory.gate_bytes += layer.bounds.bytes(layer);
    memory.screening_bytes += layer.screening_bytes();
  }
  memory.workspace_bytes = pool_->bytes() + (weights_ ? weights_->bytes() : 0);
  return memory;
}

}  // namespace

bool cuda_kernels() { return cuda::built(); }

std::unique_ptr<Backend> make_cuda_backend(const std::vector<const Layer*>& layers,
                                           const Options& options, at::Device device) {
  return std::make_unique<CudaBackend>(layers, options, device);
}

}  // namespace sparse_transcoder
