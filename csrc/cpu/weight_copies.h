// Low-precision copies of an encoder on the CPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <sparse_transcoder/options.h>

#include <string>

#include "cpu/kernels/kernels.h"
#include "layer.h"

namespace sparse_transcoder::cpu {

// The int16 copy as kernels read it; null where there is none.
struct Int16Rows {
  const int16_t* rows = nullptr;
  const float* scale = nullptr;
  const float* error = nullptr;
  int64_t stride = 0;
};

// A copy that is not made is an undefined tensor.
struct WeightCopies {
  at::Tensor int8;         // [panels, panel_bytes] uint8, see Int8Layout
  at::Tensor int16;        // [F, int16_stride] int16
  at::Tensor int16_scale;  // [F] float32
  at::Tensor int16_error;  // [F] float32, at least ||w - copy|| and the rounding of a score

  Int16Rows int16_rows() const;
  int64_t bytes() const;
};

// Copies of W_enc [F, H] that `screening` asks for, made on all of torch's threads; and its row
// norms, [F] float64, NaN or Inf where the row is not finite. `who` names the layer in errors.
WeightCopies make_copies(const at::Tensor& W_enc, Screening screening, const std::string& who,
                         at::Tensor& norms);

// A layer as this backend encodes it.
struct PreparedLayer : Layer {
  at::Tensor W_enc;  // [F, H] contiguous
  WeightCopies copies;
  LayerBounds bounds;
};

PreparedLayer prepare_layer(const Layer& layer, Screening screening);

}  // namespace sparse_transcoder::cpu
