// A layer's weights where the device reads them, and their low-precision copies.
#pragma once

#include <ATen/core/Tensor.h>
#include <sparse_transcoder/options.h>

#include <memory>

#include "cuda/int8_trial.h"
#include "layer.h"

namespace sparse_transcoder::cuda {

// A layer as this backend encodes it.
struct PreparedLayer : Layer {
  at::Tensor W_enc;  // [F, H] contiguous; on the device, or in pinned host memory
  bool streamed;     // whether W_enc stays on the host until it is needed
  LayerBounds bounds;
  bool bf16_screen = false;    // W_enc is bfloat16, or has such a copy, and may be screened so
  at::Tensor bf16 = {};        // [F, H] bfloat16 on the device, or undefined
  float bf16_error = 0;        // ||w - bf16(w)|| <= bf16_error * norm(w)
  at::Tensor int8 = {};        // [F, int8_inputs(H)] int8 on the device, or undefined
  at::Tensor int8_scale = {};  // [F] float32: of int8, over int8_mixed
  at::Tensor int8_error = {};  // [F] float32, see ScreenErrors::share
  float int8_norm = 0;         // the largest norm of a feature's int8 numbers
  bool tensor_cores = false;   // see has_tensor_cores
  // Null where int8 is the user's choice, or there is no such copy.
  std::unique_ptr<Int8Trial> int8_trial = {};

  int64_t screening_bytes() const;
};

// Bytes of device memory that a resident layer takes.
int64_t resident_bytes(const Layer& layer, const Options& options);

PreparedLayer prepare_layer(const Layer& layer, const Options& options, bool streamed);

// Makes layer.bf16. Norms are raised where a row of numbers under bfloat16's normal range would
// make the error of every feature large.
void add_bf16_copy(PreparedLayer& layer);
// Makes layer.int8 and what goes with it.
void add_int8_copy(PreparedLayer& layer);

}  // namespace sparse_transcoder::cuda
