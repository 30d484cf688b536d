// Which arithmetic screens a call.
#pragma once

#include "cpu/weight_copies.h"

namespace sparse_transcoder::cpu {

enum class ScreenType { float32, int16, int8 };

struct ScreenChoice {
  ScreenType sparse;  // where few features survive int8
  ScreenType dense;   // where many do
  int64_t planes;     // int8 numbers that hold one input of a hidden state
  // Of a panel's pairs: when more survive int8, the dense screen takes the next panels.
  double dense_share;
};

ScreenChoice choose_screen(const WeightCopies& copies, int64_t row_count);

}  // namespace sparse_transcoder::cpu
