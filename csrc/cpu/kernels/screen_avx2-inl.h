// The int8 screen in 256-bit vectors, over how four products are added up (Dot). Included by the
// files that have a Dot.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu/kernels/kernels.h"

namespace sparse_transcoder::cpu {
namespace {  // internal linkage: each instruction set compiles its own

// One strip of rows times some inputs of a panel, added to the sums [rows][64 features]. Twelve
// sums, two weights and an input fill the 16 registers: gcc keeps them there in a function of its
// own.
template <typename Dot, int rows>
__attribute__((noinline)) void add_part(const int8_t* x, int64_t stride, const uint8_t* w,
                                        int64_t steps, __m256i (*sums)[8], Ahead& ahead,
                                        int64_t lines, bool stream) {
  for (int64_t first = 0; first < panel_features; first += Dot::features) {
    __m256i sum[rows][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    const int8_t* inputs = x;
    const uint8_t* weights = w + 4 * first;
    for (int64_t step = 0; step < steps; ++step, inputs += 4, weights += 4 * panel_features) {
      if (first == 0) ahead.fetch(lines);
      // A stream through memory, which the order of these loops hides from the processor. The next
      // part follows.
      if (stream && first % 16 == 0) __builtin_prefetch(weights + 4 * panel_features * steps, 0, 2);
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
      __m256i totals[Dot::features / 8];
      Dot::total(sum[r], totals);
      for (int v = 0; v < Dot::features / 8; ++v)
        sums[r][first / 8 + v] = _mm256_add_epi32(sums[r][first / 8 + v], totals[v]);
    }
  }
}

// One strip of rows, of all planes, times a panel.
template <typename Dot, int rows>
void screen_strip(const Int8Layout& layout, const int8_t* x, int64_t planes, const uint8_t* panel,
                  const float* low, uint64_t* masks, Ahead& ahead, int64_t lines, bool stream) {
  constexpr int64_t depth = 256;  // inputs of a panel that stay in L1 while its features pass
  const int64_t stride = layout.row_bytes();
  const auto& features =
      *reinterpret_cast<const Int8Features*>(panel + panel_features * layout.inputs);
  const auto terms = [&](int r) -> const Int8Row& {
    return *reinterpret_cast<const Int8Row*>(x + r * stride + layout.inputs);
  };
  __m256i sums[rows][panel_features / 8];
  for (int r = 0; r < rows; ++r)
    for (__m256i& sum : sums[r]) sum = _mm256_set1_epi32(terms(r).start);
  for (int64_t i = 0; i < layout.inputs; i += depth)
    add_part<Dot, rows>(x + i, stride, panel + panel_features * i,
                        std::min(depth, layout.inputs - i) / 4, sums, ahead, lines, stream);
  for (int r = 0; r < rows; r += planes) {
    masks[r / planes] = 0;
    for (int v = 0; v < panel_features / 8; ++v) {
      __m256 upper = _mm256_setzero_ps();
      for (int plane = 0; plane < planes; ++plane) {
        const __m256 both = _mm256_mul_ps(_mm256_set1_ps(terms(r + plane).scale),
                                          _mm256_loadu_ps(features.scale + 8 * v));
        upper = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r + plane][v]), both, upper);
      }
      upper = _mm256_fmadd_ps(_mm256_set1_ps(terms(r).residual),
                              _mm256_loadu_ps(features.norm + 8 * v), upper);
      upper = _mm256_fmadd_ps(_mm256_set1_ps(terms(r).norm),
                              _mm256_loadu_ps(features.residual + 8 * v), upper);
      const int may =
          _mm256_movemask_ps(_mm256_cmp_ps(upper, _mm256_loadu_ps(low + 8 * v), _CMP_NLT_UQ));
      masks[r / planes] |= uint64_t(may) << 8 * v;
    }
  }
}

template <typename Dot>
void screen_int8(const Int8Layout& layout, const int8_t* rows, int64_t count, int64_t planes,
                 const uint8_t* panel, const float* low, uint64_t* masks, Ahead& ahead) {
  using Strip = void (*)(const Int8Layout&, const int8_t*, int64_t, const uint8_t*, const float*,
                         uint64_t*, Ahead&, int64_t, bool);
  static constexpr Strip strips[] = {screen_strip<Dot, 1>, screen_strip<Dot, 2>,
                                     screen_strip<Dot, 3>, screen_strip<Dot, 4>,
                                     screen_strip<Dot, 5>, screen_strip<Dot, 6>};
  constexpr int64_t most = 6;
  const int64_t steps = layout.inputs / 4 * ((count * planes + most - 1) / most);
  const int64_t lines = (ahead.lines() + steps - 1) / steps;
  for (int64_t r = 0; r < count * planes; r += most) {
    const int64_t strip = std::min(most, count * planes - r);
    strips[strip - 1](layout, rows + r * layout.row_bytes(), planes, panel, low, masks + r / planes,
                      ahead, lines, count * planes <= most);
  }
}

}  // namespace
}  // namespace sparse_transcoder::cpu
