// One declared layer, checked and folded into what both devices need: activation kind, gates, norms
// and biases. It holds no copy of a matrix.
#pragma once

#include <sparse_transcoder/options.h>
#include <sparse_transcoder/weights.h>

#include <string>
#include <vector>

#include "stamp.h"
#include "types.h"

namespace sparse_transcoder {

struct Layer {
  // declared: as check_weights lets it through. device: where the layer is encoded; its vectors are
  // placed there, and W_enc stays where it is.
  Layer(int64_t id, LayerWeights declared, at::Device device, float activation_threshold);

  int64_t id;
  LayerWeights declared;
  at::Device device;
  ActivationKind kind;
  int64_t features, hidden_size;
  int64_t max_active;     // features that can be active in a row: k of a top-k coder, or all
  Dtype dtype;            // of W_enc
  at::Tensor bias;        // [F] float32
  at::Tensor min_active;  // [F] float32, see FeatureBounds
  at::Tensor input_bias;  // [H] float32, or undefined
  at::Tensor ln_weight;   // [H] float32, or undefined
  at::Tensor ln_bias;     // [H] float32, or undefined
  float max_bias;         // of |bias|
  // Of every declared tensor, as it was before anything was made of it.
  std::vector<Stamp> stamps;

  // "layer 41 (path)": how errors name it.
  std::string name() const;
  // Of every declared tensor.
  int64_t declared_bytes() const;
  // Throws c10::ValueError where a declared tensor is no longer what it was.
  void check_unchanged() const;
  // What is said where results contradict each other.
  std::string changed() const;
};

// What decides whether a layer's features survive a screen, on the layer's device. Backends make it
// together with their copies of W_enc, since both read the whole matrix.
struct LayerBounds {
  // exact_norm [F] float64: ||w|| of every feature. Throws c10::ValueError where one is not finite.
  LayerBounds(const Layer& layer, const at::Tensor& exact_norm);

  at::Tensor norm;              // [F] float32, an upper bound
  at::Tensor surely_out_below;  // [F up to whole panels] float32
  at::Tensor surely_in_from;    // [F] float32
  float max_norm;

  // The vectors of the layer's features from this one on.
  FeatureBounds from(const Layer& layer, int64_t feature) const;
  // With the layer's own vectors.
  int64_t bytes(const Layer& layer) const;
};

Dtype dtype_of(at::ScalarType type);

}  // namespace sparse_transcoder
