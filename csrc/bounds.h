// Bounds on roundings that both devices, or several files, rely on. docs/exactness.md proves each
// in the section that is named beside it. Torch-free; device code of nvcc reads it too.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SPARSE_TRANSCODER_ON_BOTH __host__ __device__
#else
#define SPARSE_TRANSCODER_ON_BOTH
#endif

namespace sparse_transcoder {

// Half a unit in the last place of float32, relative ("Notation").
constexpr double unit_roundoff = 0x1p-24;

// Multiplied with a bound to make up for the roundings of its own computation: fewer than eight
// float64 operations and one conversion to float32 ("Notation").
constexpr double round_up = 1 + 0x1p-20;

// What all float32 operations below the normal range can add up to in one score. An operation loses
// at most 2^-149 where subnormal numbers are kept, and at most 2^-126 where a device flushes them
// to zero, in its result or in an operand. A score takes fewer than 2 (H + 64) of them ("Numbers
// below the normal range").
SPARSE_TRANSCODER_ON_BOTH constexpr double underflow(int64_t hidden_size) {
  return static_cast<double>(hidden_size + 128) * 0x1p-124;
}

// Half the width, beside underflow, of what brackets a gate. Every float32 operation near the gate
// works on numbers of at most |gate| + |bias|, and there are fewer than eight ("Gates").
constexpr double gate_rounding = 8 * unit_roundoff;

// Bound on |float32 product - exact| per unit of ||x|| ||w||, whatever the order of its H additions
// and fused or not; infinite where H is too large for one ("float32"). The terms beyond H pay for
// the norms' own roundings.
constexpr double product_rounding(int64_t hidden_size) {
  const double terms = static_cast<double>(hidden_size + 8) * unit_roundoff;
  return terms > 0.5 ? HUGE_VAL : terms / (1 - terms);
}

// Bound on the rounding of an int16 score per unit of ||s q|| ||t p||: every part is converted and
// added, and two scales are multiplied ("int16").
constexpr double int16_score_rounding(int64_t part_count) {
  return static_cast<double>(8 + 2 * part_count) * unit_roundoff;
}

// How far below the k-th best activation a score with its margin may be rounded, in units of that
// activation plus the largest bias ("The running k-th best").
constexpr double kth_best_rounding = 0x1p-20;

// Rows whose scores could come near the largest float32 are not screened: norms are compared with
// this ("Large rows").
constexpr double max_screened_product = 1e37;

// Norms count as at least that of a row of the smallest normal numbers: what is smaller loses more,
// relatively ("Numbers below the normal range").
constexpr double min_norm_per_root = FLT_MIN;

}  // namespace sparse_transcoder
