// The seam between the engine and its devices: what a call asks of a backend, and what a backend
// does. Neither side knows the other's types.
#pragma once

#include <ATen/ops/from_blob.h>
#include <sparse_transcoder/features.h>
#include <sparse_transcoder/options.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "layer.h"

namespace sparse_transcoder {

// Hidden states [B, T, H] in memory that the caller keeps.
struct Hidden {
  const void* data;
  at::ScalarType dtype;
  int64_t batch, tokens;
  int64_t strides[3];  // in elements, any

  // Input i of one of the batch * tokens rows.
  const void* at(int64_t row, int64_t i = 0) const {
    const int64_t element = row / tokens * strides[0] + row % tokens * strides[1] + i * strides[2];
    return static_cast<const char*>(data) + element * static_cast<int64_t>(c10::elementSize(dtype));
  }
};

inline at::Tensor tensor_of(const Hidden& hidden, int64_t size, at::Device device) {
  return at::from_blob(const_cast<void*>(hidden.data), {hidden.batch, hidden.tokens, size},
                       at::IntArrayRef(hidden.strides), at::device(device).dtype(hidden.dtype));
}

// Where results go: contiguous over the B * T rows.
struct Output {
  float* activations;  // [B * T, k_out]
  int64_t* indices;    // [B * T, k_out]
  float* sparsity;     // [B * T]
  int64_t* active;     // [B * T] or null; -1 where a row is not finite. On the CPU alone
};

// One layer's rows and where their results go.
struct Request {
  const Layer* layer;
  Hidden hidden;
  int64_t k_out = 0;           // ranks per row in the output
  Output out = {};             // null where none is asked for
  SparseFeatures sparse = {};  // of encode_sparse, whose backend makes it

  int64_t row_count() const { return hidden.batch * hidden.tokens; }
  // Ranks that features may fill.
  int64_t k_filled() const { return std::min(k_out, layer->max_active); }
};

// hidden: [B, T, H] or [T, H].
inline Hidden view_of(const at::Tensor& hidden) {
  const bool batched = hidden.dim() == 3;
  return {hidden.const_data_ptr(),
          hidden.scalar_type(),
          batched ? hidden.size(0) : 1,
          hidden.size(-2),
          {batched ? hidden.stride(0) : 0, hidden.stride(-2), hidden.stride(-1)}};
}

inline Output view_of(const Features& features) {
  return {features.activations.mutable_data_ptr<float>(),
          features.indices.mutable_data_ptr<int64_t>(), features.sparsity.mutable_data_ptr<float>(),
          nullptr};
}

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
  // waits for the results and the host does not. explanation: null, or what the call did; on the
  // CPU alone.
  virtual void encode(const std::vector<Request>& requests,
                      Explanation* explanation = nullptr) const = 0;
  // Every active feature of each request, concurrently; k_out and out are not used. Where hidden
  // states are changed meanwhile, it throws or gives the features of what it read.
  virtual std::vector<SparseFeatures> encode_sparse(std::vector<Request> requests) const = 0;
  // The k_filled strongest features of each row, in ascending order, chunk by chunk; out is not
  // used.
  virtual void encode_into(const std::vector<Request>& requests, const SparseFormat& format,
                           const SparseSink& sink) const = 0;
  // Bytes that the backend itself holds. weight_bytes: its copies of encoders.
  virtual Memory memory() const = 0;
};

// The layers outlive the backend.
std::unique_ptr<Backend> make_cpu_backend(const std::vector<const Layer*>& layers,
                                          const Options& options);
std::unique_ptr<Backend> make_cuda_backend(const std::vector<const Layer*>& layers,
                                           const Options& options, at::Device device);

}  // namespace sparse_transcoder
