// What the kernels of both devices read. Torch-free, so that nvcc compiles it beside any torch.
#pragma once

#include <cstdint>

namespace sparse_transcoder {

// The type of stored weights and of hidden states.
enum class Dtype { float32, bfloat16, float16 };

// Which features of a row are active.
enum class ActivationKind {
  relu,      // those that are positive and reach tau
  jumprelu,  // of these, those strictly above their own threshold
  topk,      // the k largest of those that pass; thresholds count where the checkpoint has any
};

constexpr int64_t panel_features = 64;  // features per panel: one bit each in a 64-bit mask

// What decides whether a feature survives a screen: one entry per feature. Of a score without its
// bias, surely_out_below and surely_in_from bracket min_active - bias, widened by the rounding of
// everything that is done near it. So a score surely under surely_out_below is surely inactive, and
// one surely at surely_in_from or above is surely active.
struct FeatureBounds {
  // What a margin is per unit of: an upper bound of ||w||, or the int8 error of CUDA.
  const float* norm;
  const float* bias;              // b_enc
  const float* min_active;        // max(tau, nextafter(theta), smallest positive float)
  const float* surely_out_below;  // infinite from the last feature up to a whole panel
  const float* surely_in_from;
};

// How far a row's scores may be from the exact dot products: |score - x . w| <= per_norm * norm +
// per_residual * residual, where norm and residual are the feature's. A margin that is not finite
// rules nothing out.
struct Margin {
  float per_norm, per_residual;
};

}  // namespace sparse_transcoder
