// Which arithmetic screens a block of rows.
#pragma once

#include "cpu/weight_copies.h"

namespace sparse_transcoder::cpu {

enum class ScreenType { float32, int16, int8 };
constexpr int screen_type_count = 3;

struct ScreenChoice {
  ScreenType sparse;  // where few features survive int8
  ScreenType dense;   // where many do
  int64_t planes;     // int8 numbers that hold one input of a hidden state
  double max_share;   // of a panel's pairs that may survive int8: beyond it the dense screen takes
                      // the next panels
};

ScreenChoice choose_screen(const WeightCopies& copies, const Crossovers& crossovers,
                           int64_t row_count);

// Those of the instruction set, or what SPARSE_TRANSCODER_CROSSOVERS says in their place, such as
// "int8_rows=0 max_share_float32=2". Benchmarks force a screen that way. Throws c10::ValueError.
Crossovers active_crossovers();

}  // namespace sparse_transcoder::cpu
