// Low-precision copies of an encoder on the CPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <sparse_transcoder/options.h>

#include <string>

#include "cpu/kernels/kernels.h"
#include "cpu/thread_pool.h"
#include "layer.h"

namespace sparse_transcoder::cpu {

// The int8 copy as kernels read it; null where there is none.
struct Int8Panels {
  Int8Layout layout;
  const uint8_t* panels;

  // The panel that begins with this feature.
  const uint8_t* panel(int64_t feature) const {
    return panels + feature / panel_features * layout.panel_bytes();
  }
};

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

  Int8Panels int8_panels(int64_t hidden_size) const;
  Int16Rows int16_rows() const;
  int64_t bytes() const;
};

// A layer as this backend encodes it.
struct PreparedLayer : Layer {
  at::Tensor W_enc;  // [F, H] contiguous
  WeightCopies copies;
  LayerBounds bounds;
};

// The copies are made by so many workers.
PreparedLayer prepare_layer(const Layer& layer, Screening screening, int64_t workers,
                            ThreadPool& threads);

}  // namespace sparse_transcoder::cpu
