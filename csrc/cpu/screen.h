// Low-precision copies of an encoder's weights, and which arithmetic screens a call with them.
#pragma once

#include <sparse_transcoder/engine.h>

#include "cpu/kernels/kernels.h"

namespace sparse_transcoder {

// Undefined tensors: no such copy.
struct ScreeningCopies {
  at::Tensor int8;                         // [panels, panel_bytes] uint8
  at::Tensor int16;                        // [F, int16_stride] int16
  at::Tensor int16_scale, int16_residual;  // [F] float32
  at::Tensor bf16;                         // [F, H] bfloat16, on CUDA
  float bf16_residual = 0;                 // ||w - bf16(w)|| <= bf16_residual * norm(w)

  int64_t bytes() const;
};

// Copies of W_enc [F, H] on the CPU that `screening` asks for, made on all of torch's threads; and
// its row norms, [F] float64, NaN or Inf where the row is not finite.
ScreeningCopies make_copies(const at::Tensor& W_enc, Screening screening, const std::string& who,
                            at::Tensor& norms);

// A bfloat16 copy of W_enc [F, H]. norm [F] float32, at least the rows' norms, is raised where a
// row of numbers under bfloat16's normal range would make everybody's residual large.
void add_bf16_copy(ScreeningCopies& copies, const at::Tensor& W_enc, const std::string& who,
                   at::Tensor& norm);

enum class Arithmetic { float32, int16, int8 };

struct Choice {
  Arithmetic sparse;   // where few features survive int8
  Arithmetic dense;    // where many do
  int64_t planes;      // int8 numbers that a hidden state's input is held in
  double dense_share;  // of a panel's pairs: when more survive int8, the dense screen takes the
                       // next panels
};

Choice choose_screen(const ScreeningCopies& copies, int64_t rows);

}  // namespace sparse_transcoder
