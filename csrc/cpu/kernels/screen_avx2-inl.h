// The int8 screen in 256-bit vectors. Dot says how four products are added to a sum; the files that
// have one include this.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu/kernels/kernels.h"

namespace sparse_transcoder::cpu {
namespace {  // internal linkage: each instruction set compiles its own

// Adds one strip of rows times some inputs of a panel to the sums [rows][64 features]. Twelve sums,
// two weights and an input fill the 16 registers; gcc keeps them there only in a function of its
// own.
template <typename Dot, int rows>
__attribute__((noinline)) void add_part(const int8_t* x, int64_t stride, const uint8_t* w,
                                        int64_t steps, __m256i (*sums)[8], Prefetcher& prefetcher,
                                        int64_t lines, bool stream) {
  for (int64_t first = 0; first < panel_features; first += Dot::features) {
    __m256i sum[rows][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    const int8_t* inputs = x;
    const uint8_t* weights = w + 4 * first;
    for (int64_t step = 0; step < steps; ++step, inputs += 4, weights += 4 * panel_features) {
      if (first == 0) prefetcher.fetch(lines);
      // The next part of the panel follows in memory. The order of these loops hides that from the
      // processor.
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

// What all strips of a call have in common.
struct Strips {
  const Int8ScreenArgs& args;
  Prefetcher& prefetcher;
  const int64_t lines;  // to prefetch per step
  const bool stream;    // whether the panel is read only once
};

// One strip of rows, with all their planes, times a panel.
template <typename Dot, int rows>
void screen_strip(const Strips& strips, const int8_t* x, uint64_t* masks) {
  constexpr int64_t depth = 256;  // inputs of a panel that stay in L1 while its features pass
  const Int8Layout& layout = strips.args.layout;
  const int64_t stride = layout.row_bytes(), planes = strips.args.planes;
  const uint8_t* panel = strips.args.panel;
  const float* surely_out_below = strips.args.surely_out_below;
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
                        std::min(depth, layout.inputs - i) / 4, sums, strips.prefetcher,
                        strips.lines, strips.stream);
  for (int r = 0; r < rows; r += planes) {
    masks[r / planes] = 0;
    for (int v = 0; v < panel_features / 8; ++v) {
      __m256 upper = _mm256_setzero_ps();
      for (int plane = 0; plane < planes; ++plane) {
        const __m256 both = _mm256_mul_ps(_mm256_set1_ps(terms(r + plane).scale),
                                          _mm256_loadu_ps(features.scale + 8 * v));
        upper = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r + plane][v]), both, upper);
      }
      upper = _mm256_fmadd_ps(_mm256_set1_ps(terms(r).error),
                              _mm256_loadu_ps(features.norm + 8 * v), upper);
      upper = _mm256_fmadd_ps(_mm256_set1_ps(terms(r).norm),
                              _mm256_loadu_ps(features.error + 8 * v), upper);
      const int may = _mm256_movemask_ps(
          _mm256_cmp_ps(upper, _mm256_loadu_ps(surely_out_below + 8 * v), _CMP_NLT_UQ));
      masks[r / planes] |= uint64_t(may) << 8 * v;
    }
  }
}

template <typename Dot>
void screen_int8(const Int8ScreenArgs& args, uint64_t* masks, Prefetcher& prefetcher) {
  static constexpr void (*of_rows[])(const Strips&, const int8_t*, uint64_t*) = {
      screen_strip<Dot, 1>, screen_strip<Dot, 2>, screen_strip<Dot, 3>,
      screen_strip<Dot, 4>, screen_strip<Dot, 5>, screen_strip<Dot, 6>};
  constexpr int64_t max_rows = 6;
  const int64_t count = args.row_count * args.planes;
  const int64_t steps = args.layout.inputs / 4 * ((count + max_rows - 1) / max_rows);
  const Strips strips = {args, prefetcher, (prefetcher.lines() + steps - 1) / steps,
                         count <= max_rows};
  for (int64_t r = 0; r < count; r += max_rows)
    of_rows[std::min(max_rows, count - r) - 1](strips, args.rows + r * args.layout.row_bytes(),
                                               masks + r / args.planes);
}

}  // namespace
}  // namespace sparse_transcoder::cpu
