// Which screen finds the candidates of a call, and what the int8 screen's parts share.
#pragma once

#include <sparse_transcoder/options.h>

#include "cuda/kernels/kernels.h"
#include "layer.h"

namespace sparse_transcoder::cuda {

// Calls of at most so many rows are screened in int8 where the layer has such a copy.
constexpr int64_t max_int8_rows = few_rows;
static_assert(max_int8_rows <= few_rows);
// "auto" makes an int8 copy of encoders of at least so many weights: reading fewer takes less time
// than the other steps.
constexpr int64_t min_int8_weights = int64_t{1} << 24;

// Whether a layer whose weights stay on the device gets an int8 copy. Where device_weight_bytes
// bounds the memory, "auto" leaves it to weights.
inline bool makes_int8(const Layer& layer, const Options& options) {
  if (layer.hidden_size > max_int8_inputs) return false;
  return options.screening == Screening::int8 ||
         (options.screening == Screening::automatic && options.device_weight_bytes < 0 &&
          layer.features * layer.hidden_size >= min_int8_weights);
}

}  // namespace sparse_transcoder::cuda
