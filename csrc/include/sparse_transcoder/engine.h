// Streaming transcoder encoder: hidden states in, the top-k active features out. The dense [rows,
// features] matrix is never formed.
//
//   Engine engine(load_weights("transcoders/"), {.top_k = 50});
//   Features f = engine.encode(12, hidden);   // hidden [B, T, H] or [T, H]
//
// An Engine is immutable: every method is const and may be called from many threads at once.
// Weights are shared between callers; workspaces are borrowed from a pool for the length of a call.
// Weights must stay as they are: after a change of them every call of their layer is refused.
// Results are exact (float64 accumulation of the stored weights) and the same bit for bit whatever
// the chunk size, the batch, the layers beside it, or the number of threads. A user's mistake
// throws c10::ValueError, c10::TypeError, c10::IndexError (unknown layer) or FileNotFound: all are
// c10::Error, whose what_without_backtrace() is the one line to show. No call may be running when
// an Engine is destroyed; results outlive it.
#pragma once

#include <sparse_transcoder/features.h>
#include <sparse_transcoder/options.h>
#include <sparse_transcoder/rows.h>
#include <sparse_transcoder/weights.h>

#include <memory>
#include <span>
#include <string_view>
#include <vector>

namespace sparse_transcoder {

// The instruction set that encodes on the CPU: the best of this machine, or the one that the
// environment variable SPARSE_TRANSCODER_CPU names. Throws c10::ValueError, with the names that
// this machine can run, where it names another.
SPARSE_TRANSCODER_API std::string_view cpu_instruction_set();

class SPARSE_TRANSCODER_API Engine {
 public:
  explicit Engine(std::map<int64_t, LayerWeights> weights, Options options = {});
  Engine(Engine&&) noexcept;
  ~Engine();

  // One layer. hidden [B, T, H] or [T, H]: float32, bfloat16 or float16, any strides, on the device
  // that the layer is encoded on.
  Features encode(int64_t layer, const at::Tensor& hidden) const;
  // Many layers at once, concurrently. Every key must be one of layers(). Layers may have different
  // B and T.
  std::map<int64_t, Features> encode(const std::map<int64_t, at::Tensor>& hidden_states) const;
  // The same from and to the caller's memory, for servers: after the first call of a thread nothing
  // is allocated where all layers are on the CPU. A layer may come more than once. explanation:
  // what the call did, all layers together; on the CPU alone, and it costs looks at the clock.
  void encode(std::span<const LayerRows> layers, Explanation* explanation = nullptr) const;
  // K: the columns of a layer's results, min(top_k, F).
  int64_t ranks(int64_t layer) const;

  // Every active feature, however many: no top_k. Memory beyond the result does not grow with the
  // number of rows.
  SparseFeatures encode_sparse(int64_t layer, const at::Tensor& hidden) const;
  // Many layers at once, concurrently.
  std::map<int64_t, SparseFeatures> encode_sparse(
      const std::map<int64_t, at::Tensor>& hidden_states) const;
  // The same in one pass over the weights, without a result that is held. The sink gets at most
  // chunk_size rows at a time, on the calling thread, those of a layer in their order. What it
  // throws ends the call.
  void encode_sparse(const std::map<int64_t, at::Tensor>& hidden_states, const SparseSink& sink,
                     const SparseFormat& format = {}) const;

  // Reconstruction [.., d_out] float32 ([.., n * H] with write_layers n, the parts of the layers
  // one after the other): y = b_dec + sum over features of activation * W_dec[:, feature], plus x @
  // W_skip.T where the layer has a skip connection, which needs the hidden states.
  at::Tensor decode(int64_t layer, const at::Tensor& activations, const at::Tensor& indices,
                    const at::Tensor& hidden = {}) const;
  at::Tensor decode(int64_t layer, const SparseFeatures& features,
                    const at::Tensor& hidden = {}) const;

  // W_dec[:, feature] [d_out] as float32: what one unit of the feature adds to the reconstruction.
  std::vector<float> decoder_direction(int64_t layer, int64_t feature) const;

  // Encodes on the CPU and tells how; the result is dropped.
  Explanation explain(int64_t layer, const at::Tensor& hidden) const;

  // Throws c10::ValueError where a tensor of the layer was changed since the engine was built, as
  // every call above does. What a tensor's version counter does not see (`.data`, other owners of
  // its memory, inference mode) is seen on the CPU where most of it is changed, and not on CUDA:
  // there features would be found by copies and bounds of the old weights, and their values be
  // computed from the new ones.
  void check_unchanged(int64_t layer) const;

  std::vector<int64_t> layers() const;
  const LayerWeights& weights(int64_t layer) const;
  const Options& options() const;
  Memory memory() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Whether this build has CUDA kernels. Without them it encodes on the CPU alone.
SPARSE_TRANSCODER_API bool cuda_kernels();

}  // namespace sparse_transcoder
