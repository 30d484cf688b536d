// Transcoder weights: what one layer's checkpoint declares, and how to read it from disk.
#pragma once

#include <ATen/core/Tensor.h>
#include <sparse_transcoder/errors.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace sparse_transcoder {

// One layer's transcoder. Tensors are shared, never copied, and must not be changed while an Engine
// holds them; an undefined tensor means "not declared". F features, H hidden size. Matrices are
// float32, bfloat16 or float16; vectors any of these.
struct LayerWeights {
  at::Tensor W_enc;  // [F, H]
  at::Tensor b_enc;  // [F]
  at::Tensor W_dec;  // [d_out, F]; d_out is the width of the place written to, H where it is one
                     // like the place read. With write_layers n it is [n * H, F]: the rows of n
                     // layers, one after the other
  at::Tensor b_dec;  // [d_out]. With write_layers n: [H] for this layer's own output, or [n * H]
  int64_t write_layers = 1;  // layers that the decoder writes to, from this one on; never guessed
  at::Tensor threshold;      // [F] JumpReLU: a feature is active only strictly above its threshold
  std::optional<int64_t> k;  // top-k coder: only the k largest pre-activations are active
  at::Tensor W_skip;         // [d_out, H] skip connection: y += x @ W_skip.T
  at::Tensor input_bias;     // [H] subtracted from the hidden state
  at::Tensor ln_weight;      // [H] LayerNorm of the hidden state: biased variance, eps 1e-5
  at::Tensor ln_bias;        // [H] LayerNorm's bias
  std::string hook_in;       // where the hidden state must be read, e.g. "mlp.hook_in"
  std::string hook_out;      // what the decoder reconstructs, e.g. "mlp.hook_out"
  std::string source;        // file the weights came from; named in errors
};

// Reads a circuit-tracer transcoder set: `layer_{i}.safetensors` beside an optional `config.yaml`.
// Files are memory-mapped; only the layers asked for are opened (all of them when `layers` is
// empty). With a CUDA device the tensors are copied there. Throws FileNotFound, or c10::ValueError
// naming the file and the reason. Matrices are scanned for NaN and Inf up to 256 MiB in all, so
// that a large set opens at once; the Engine refuses any encoder that is not finite.
SPARSE_TRANSCODER_API std::map<int64_t, LayerWeights> load_weights(const std::string& dir,
                                                                   std::vector<int64_t> layers = {},
                                                                   at::Device device = at::kCPU);

}  // namespace sparse_transcoder
