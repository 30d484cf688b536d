// The int8 screen in 256-bit vectors, over how four products are added up (Dot). Included by the files that have a Dot.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu.h"

namespace sparse_transcoder::kernels {
namespace {  // internal linkage: each instruction set compiles its own

// One strip of rows times group g of a panel, added to the tile. Twelve sums, two weights and an input fill the 16 registers.
template <typename Dot, int rows>
void screen_group(const Int8Layout& layout, const int8_t* x, int64_t g, const uint8_t* w, const float* w_scales, int64_t planes,
                  float* tile, Ahead& ahead, int64_t lines, bool stream) {
  const int64_t stride = layout.row_bytes(), steps = (g < layout.groups ? layout.depth : layout.margin_depth) / 4;
  for (int64_t first = 0; first < panel_features; first += Dot::features) {
    __m256i sum[rows][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    const int8_t* inputs = x + g * layout.depth;
    const uint8_t* weights = w + 4 * first;
    for (int64_t step = 0; step < steps; ++step, inputs += 4, weights += 4 * panel_features) {
      if (first == 0) ahead.fetch(lines);
      // A stream through memory, which the order of these loops hides from the processor. The next group follows.
      if (stream && first % 16 == 0) __builtin_prefetch(weights + panel_features * layout.depth, 0, 2);
      __m256i wv[2];
      Dot::load(weights, wv);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        const __m256i xv = Dot::input(inputs + r * stride);
        Dot::add(sum[r][0], wv[0], xv);
        Dot::add(sum[r][1], wv[1], xv);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const auto* scales = reinterpret_cast<const float*>(x + r * stride + layout.inputs());
      const auto* starts = reinterpret_cast<const int32_t*>(scales + layout.groups + 1);
      __m256i totals[Dot::features / 8];
      Dot::total(sum[r], totals);
      float* row = tile + r / planes * panel_features + first;
      for (int v = 0; v < Dot::features / 8; ++v) {
        const __m256 product = _mm256_cvtepi32_ps(_mm256_add_epi32(totals[v], _mm256_set1_epi32(starts[g])));
        const __m256 both = _mm256_mul_ps(_mm256_set1_ps(scales[g]), _mm256_loadu_ps(w_scales + first + 8 * v));
        _mm256_storeu_ps(row + 8 * v, _mm256_fmadd_ps(product, both, _mm256_loadu_ps(row + 8 * v)));
      }
    }
  }
}

template <typename Dot>
void screen_int8(const Int8Layout& layout, const int8_t* rows, int64_t count, int64_t planes, const uint8_t* panel,
                 const float* low, float* tile, uint64_t* masks, Ahead& ahead) {
  using Strip =
      void (*)(const Int8Layout&, const int8_t*, int64_t, const uint8_t*, const float*, int64_t, float*, Ahead&, int64_t, bool);
  static constexpr Strip strips[] = {screen_group<Dot, 1>, screen_group<Dot, 2>, screen_group<Dot, 3>,
                                     screen_group<Dot, 4>, screen_group<Dot, 5>, screen_group<Dot, 6>};
  constexpr int64_t most = 6;
  const auto* scales = reinterpret_cast<const float*>(panel + panel_features * layout.inputs());
  const int64_t steps = layout.inputs() / 4 * ((count * planes + most - 1) / most);
  const int64_t lines = (ahead.lines() + steps - 1) / steps;
  std::fill(tile, tile + count * panel_features, 0.0f);
  for (int64_t g = 0; g <= layout.groups; ++g)
    for (int64_t r = 0; r < count * planes; r += most) {
      const int64_t strip = std::min(most, count * planes - r);
      strips[strip - 1](layout, rows + r * layout.row_bytes(), g, panel + panel_features * g * layout.depth,
                        scales + g * panel_features, planes, tile + r / planes * panel_features, ahead, lines,
                        count * planes <= most);
    }
  for (int64_t r = 0; r < count; ++r) {
    masks[r] = 0;
    for (int64_t f = 0; f < panel_features; f += 8) {
      const __m256 score = _mm256_loadu_ps(tile + r * panel_features + f);
      const int may = _mm256_movemask_ps(_mm256_cmp_ps(score, _mm256_loadu_ps(low + f), _CMP_NLT_UQ));
      masks[r] |= uint64_t(may) << f;
    }
  }
}

}  // namespace
}  // namespace sparse_transcoder::kernels
