// The gate for one score after another: what every instruction set does for the last few, and the
// portable one for all.
#pragma once

#include "cpu/kernels/kernels.h"

namespace sparse_transcoder::cpu {
namespace {  // internal linkage: each instruction set compiles its own

// As CpuKernels::candidates, for positions [begin, count); `found` are in `out` already.
inline int64_t candidates_from(int64_t begin, const float* scores, const FeatureBounds& gate,
                               const float* residual, int64_t count, Margin margin, float bound,
                               uint32_t* out, int64_t found, int64_t* certain) {
  for (int64_t i = begin; i < count; ++i) {
    const float slack = margin.per_norm * gate.norm[i] + margin.per_residual * residual[i];
    const float upper = scores[i] + slack;
    const bool sure = scores[i] - slack >= gate.surely_in_from[i];
    *certain += sure;
    // Written so that NaN, the margin of a row too large to screen, counts as "may be".
    if (!(upper < gate.surely_out_below[i]) && (!sure || !(upper < bound - gate.bias[i])))
      out[found++] = static_cast<uint32_t>(i) << 1 | !sure;
  }
  return found;
}

}  // namespace
}  // namespace sparse_transcoder::cpu
