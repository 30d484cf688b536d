// Hidden states and results in the caller's own memory. This header needs no ATen.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace sparse_transcoder {

// The rows of one layer, and where their results go. K = Engine::ranks(layer). Every pointer is to
// memory of the device that the layer is encoded on.
struct LayerRows {
  int64_t layer;
  const void* hidden;  // [row_count, H], the H numbers of a row one after the other
  int64_t row_count;
  float* activations;                              // [row_count, K], descending
  int64_t* indices;                                // [row_count, K], distinct
  float* sparsity;                                 // [row_count]
  int64_t* active = nullptr;                       // [row_count] active features, not capped by K;
                                                   // -1 where the row is not finite. CPU alone
  c10::ScalarType dtype = c10::ScalarType::Float;  // of hidden: Float, BFloat16 or Half
  int64_t stride = 0;  // numbers from the begin of a row to that of the next; 0 takes H
};

}  // namespace sparse_transcoder
