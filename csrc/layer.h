// One layer made ready to encode: checked weights and the per-feature vectors that every screen
// needs.
#pragma once

#include <sparse_transcoder/engine.h>

#include "cpu/kernels/kernels.h"
#include "cpu/screen.h"

namespace sparse_transcoder {

// What float32 operations under the normal range can add up to in a score: of the CPU's lanes,
// which do not flush them to zero, and of a device's product, which may.
inline double underflow(int64_t hidden_size) { return (hidden_size + 128) * 0x1p-125; }

// Where a layer is encoded, and whether its W_enc stays in pinned host memory until it is needed
// there.
struct Placement {
  at::Device device;
  bool streamed;
};

struct Layer {
  Layer(int64_t id, LayerWeights declared, const Options& options, Placement placement);

  int64_t id;
  LayerWeights weights;
  at::Device device;
  bool streamed;
  int64_t features, hidden_size;
  int64_t top_k;  // slots in the output
  int64_t
      selected;  // features that may fill them: top_k, or the coder's own k where that is smaller
  int64_t most_active;  // features that can be active in a row: the coder's k, or all
  Dtype dtype;          // of W_enc
  at::Tensor W_enc;     // [F, H] contiguous; on `device`, or pinned
  at::Tensor norm, bias, gate, low,
      high;  // [F] float32, see FeatureBounds; low: infinite up to whole panels
  ScreeningCopies copies;
  bool bf16_screen =
      false;  // on CUDA: W_enc is bfloat16, or has such a copy, and may be screened so
  at::Tensor input_bias, ln_weight, ln_bias;  // [H] float32, or undefined
  float largest_norm, largest_bias;

  int64_t weight_bytes() const;
  int64_t gate_bytes() const;
  FeatureBounds gate_at(int64_t feature) const;
};

Dtype kernel_dtype(at::ScalarType type);

// Shapes, types, devices and finite vectors of what a layer declares; c10::ValueError or TypeError
// where something is wrong.
void check_weights(int64_t id, const LayerWeights& weights);

// "layer 41" or "layer 41 (path)": how errors name a layer.
std::string describe(int64_t id, const LayerWeights& weights);

}  // namespace sparse_transcoder
