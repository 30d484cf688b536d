// The seam between the engine and its devices: what a call asks of a backend, and what a backend
// does. Neither side knows the other's types.
#pragma once

#include <sparse_transcoder/features.h>
#include <sparse_transcoder/options.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "layer.h"

namespace sparse_transcoder {

// One layer's rows and where their results go.
struct Request {
  const Layer* layer;
  at::Tensor hidden;           // [B, T, H], any strides
  int64_t k_out = 0;           // ranks per row in the output
  Features out = {};           // contiguous over the B * T rows; undefined where none is asked for
  SparseFeatures sparse = {};  // of encode_sparse, whose backend makes it

  int64_t row_count() const { return hidden.size(0) * hidden.size(1); }
  // Ranks that features may fill.
  int64_t k_filled() const { return std::min(k_out, layer->max_active); }
};

// Ranks per row that the options ask for.
inline int64_t k_out(const Layer& layer, const Options& options) {
  if (options.top_k != Options::layer_k) return std::min(options.top_k, layer.features);
  TORCH_CHECK_VALUE(layer.declared.k, layer.name(),
                    ": top_k=None takes k from the checkpoint, which declares none");
  return std::min(*layer.declared.k, layer.features);
}

// The layers of an engine on one device. Methods may be called from many threads at once.
class Backend {
 public:
  virtual ~Backend() = default;

  // Layers run concurrently, and each is one of this backend's. On CUDA the caller's current stream
  // waits for the results and the host does not.
  virtual void encode(const std::vector<Request>& requests) const = 0;
  // Every active feature of each request, concurrently; k_out and out are not used. Where hidden
  // states are changed meanwhile, it throws or gives the features of what it read.
  virtual std::vector<SparseFeatures> encode_sparse(std::vector<Request> requests) const = 0;
  // The k_filled strongest features of each row, in ascending order, chunk by chunk; out is not
  // used.
  virtual void encode_into(const std::vector<Request>& requests, const SparseFormat& format,
                           const SparseSink& sink) const = 0;
  // Encodes and tells how.
  virtual Explanation explain(const Request& request) const = 0;
  // Bytes that the backend itself holds. weight_bytes: its copies of encoders.
  virtual Memory memory() const = 0;
};

// The layers outlive the backend.
std::unique_ptr<Backend> make_cpu_backend(const std::vector<const Layer*>& layers,
                                          const Options& options);
std::unique_ptr<Backend> make_cuda_backend(const std::vector<const Layer*>& layers,
                                           const Options& options, at::Device device);

}  // namespace sparse_transcoder
