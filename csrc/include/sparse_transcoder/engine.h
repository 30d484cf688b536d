// Streaming transcoder encoder: hidden states in, the top-k active features out. The dense [rows,
// features] matrix is never formed.
//
//   Engine engine(load_weights("transcoders/"), {.top_k = 50});
//   Features f = engine.encode(12, hidden);   // hidden [B, T, H] or [T, H]
//
// An Engine is immutable: every method is const and may be called from many threads at once.
// Weights are shared between callers; workspaces are borrowed from a pool for the length of a call.
// Results are exact (float64 accumulation of the stored weights) and the same bit for bit whatever
// the chunk size, the batch, the layers beside it, or the number of threads. A user's mistake
// throws c10::ValueError, c10::TypeError, c10::IndexError (unknown layer) or FileNotFound.
#pragma once

#include <sparse_transcoder/weights.h>

#include <memory>

namespace sparse_transcoder {

// Which approximate arithmetic finds the candidates; it never changes a result.
enum class Screening {
  automatic,  // the fastest. CPU: int8 and, for float32 weights, int16 copies: 1 + 2 bytes a
              // weight. CUDA: bfloat16, a copy of 2 bytes a weight where the weights are not stored
              // so
  off,    // float32 product of the stored weights: no copy of them is made
  int16,  // an int16 copy alone: 2 bytes a weight; CUDA: as automatic
  int8,   // an int8 copy alone: 1 byte a weight; CUDA: as automatic
};

struct Options {
  static constexpr int64_t layer_k = 0;  // as top_k: each layer's own k, from its checkpoint
  int64_t top_k = 20;                    // features returned per row
  float activation_threshold =
      1.0f;  // tau: a feature is kept when its activation is positive and at least this
  int64_t chunk_size = 512;  // rows worked on at a time: bounds the workspace, not the result
  int64_t lanes = 0;  // CPU: workers of one call; CUDA: streams. 0: torch's thread count; 4 streams
  Screening screening = Screening::automatic;
  bool use_graphs = true;  // CUDA: replay captured work for shapes of at most 8 rows a layer that
                           // were seen before
  // Encode layers whose weights are on the CPU on the current CUDA device: those whose encoders fit
  // in this many bytes, in the order of the layers, are copied there; the others stay in pinned
  // host memory and stream through two device buffers. -1: every layer is encoded where its weights
  // are.
  int64_t device_weight_bytes = -1;
};

// The result for hidden [B, T, H]; without B for hidden [T, H]. K = min(top_k, F).
struct Features {
  at::Tensor activations;  // [B, T, K] float32, descending; 0 in slots that no feature fills
  at::Tensor indices;      // [B, T, K] int64, distinct; ties: lower index first
  at::Tensor sparsity;     // [B, T] float32, fraction of the F features that are active
};

// Every active feature of N = B * T rows, in the compressed sparse row layout; M features in all.
struct SparseFeatures {
  at::Tensor row_begin;    // [N + 1] int64: row n has entries row_begin[n] to row_begin[n + 1]
  at::Tensor features;     // [M] int64, ascending in a row
  at::Tensor activations;  // [M] float32; a row that is not finite has one entry, NaN at feature 0
};

// Bytes held by an Engine, beside the weights its caller gave it.
struct Memory {
  int64_t weight_bytes;  // the weights, shared with the caller; and copies of encoders: rows that
                         // are not contiguous, Options::device_weight_bytes
  int64_t gate_bytes;       // per-feature vectors: norms, gates
  int64_t screening_bytes;  // low-precision copies; 0 with Screening::off
  int64_t workspace_bytes;  // all pooled workspaces, which grow only when calls overlap, and
                            // buffers for streamed weights (on CUDA torch keeps workspaces for
                            // cuBLAS besides: one a calling thread and stream)
};

// What a call did, summed over its chunks: how many (row, feature) pairs each stage let through,
// and its time, summed over workers.
struct Explanation {
  int64_t rows, features;
  int64_t fallback_rows;  // too large to screen: every feature of theirs is computed
  int64_t pairs_int8, pairs_int16, pairs_float32;  // screened in each arithmetic
  int64_t survivors;                               // of the int8 screen
  int64_t ambiguous;                               // too near their gate to be counted unseen
  int64_t rescored;                                // computed exactly
  double prepare_ms, screen_ms, refine_ms, rescore_ms, finish_ms;
};

class Engine {
 public:
  explicit Engine(std::map<int64_t, LayerWeights> weights, Options options = {});
  Engine(Engine&&) noexcept;
  ~Engine();

  // One layer. hidden [B, T, H] or [T, H]: float32, bfloat16 or float16, any strides, on the device
  // that the layer is encoded on.
  Features encode(int64_t layer, const at::Tensor& hidden) const;
  // Many layers at once, concurrently. Every key must be one of layers().
  std::map<int64_t, Features> encode(const std::map<int64_t, at::Tensor>& hidden) const;

  // Every active feature, however many: no top_k. Memory beyond the result does not grow with the
  // number of rows.
  SparseFeatures encode_sparse(int64_t layer, const at::Tensor& hidden) const;

  // Reconstruction [.., H] float32 (the rows of every write layer one after the other, where the
  // decoder has more than one): y = b_dec + sum over features of activation * W_dec[:, feature],
  // plus x @ W_skip.T where the layer has a skip connection, which needs the hidden states.
  at::Tensor decode(int64_t layer, const at::Tensor& activations, const at::Tensor& indices,
                    const at::Tensor& hidden = {}) const;
  at::Tensor decode(int64_t layer, const SparseFeatures& features,
                    const at::Tensor& hidden = {}) const;

  // Encodes on the CPU and tells how; the result is dropped.
  Explanation explain(int64_t layer, const at::Tensor& hidden) const;

  std::vector<int64_t> layers() const;
  const LayerWeights& weights(int64_t layer) const;
  const Options& options() const;
  Memory memory() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sparse_transcoder
