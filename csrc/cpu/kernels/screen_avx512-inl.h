// The int8 screen in 512-bit vectors, and the loop that it shares with the int16 products.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/kernels/kernels.h"

namespace sparse_transcoder::cpu {
namespace {  // internal linkage: each instruction set compiles its own

// Six rows times four vectors of 16 features: 24 sums, 4 weights and an input fill the 32
// registers.
constexpr int strip_rows = 6;

// The products are in assembly because gcc 12 copies the sum around their intrinsics.
struct Int8 {  // four uint8 of w times four int8 of x
  static void add(__m512i& sum, __m512i w, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  }
};

// Adds the products of rows, `stride` bytes apart, and a panel [steps][64 features] to sum[r][v].
// Each step takes four bytes of inputs. between() is called once per step.
template <typename Type, int rows, typename Between>
inline __attribute__((always_inline)) void multiply(const void* inputs, int64_t stride,
                                                    const void* weights, int64_t steps,
                                                    __m512i (&sum)[rows][4],
                                                    const Between& between) {
  const auto *x = static_cast<const char*>(inputs), *w = static_cast<const char*>(weights);
  for (int64_t step = 0; step < steps; ++step, x += 4, w += 4 * panel_features) {
    between();
    __m512i wv[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) wv[v] = _mm512_loadu_si512(w + 64 * v);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      int32_t four;
      std::memcpy(&four, x + r * stride, sizeof(four));
      const __m512i xv = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) Type::add(sum[r][v], wv[v], xv);
    }
  }
}

struct Panel {
  const Int8Layout& layout;
  const uint8_t* weights;
  const float* surely_out_below;
  Prefetcher& prefetcher;
  const int64_t lines;  // to prefetch per step

  const Int8Features& features() const {
    return *reinterpret_cast<const Int8Features*>(weights + panel_features * layout.inputs);
  }
};

// Which of the features [16 * v, 16 * v + 16) a row may reach surely_out_below of, as their bits of
// a mask. `last` is the row's second plane; with one plane it is not looked at.
template <int planes>
inline __attribute__((always_inline)) uint64_t may_reach(const Int8Features& features,
                                                         const float* surely_out_below, int v,
                                                         const Int8Row& first, __m512i first_sum,
                                                         const Int8Row& last, __m512i last_sum) {
  // The scales are multiplied first. Their product times a sum is at most ||x|| ||w||; a sum times
  // one of them alone could overflow.
  const __m512 scale = _mm512_loadu_ps(features.scale + 16 * v);
  __m512 upper = _mm512_mul_ps(_mm512_cvtepi32_ps(first_sum),
                               _mm512_mul_ps(_mm512_set1_ps(first.scale), scale));
  if (planes == 2)
    upper = _mm512_fmadd_ps(_mm512_cvtepi32_ps(last_sum),
                            _mm512_mul_ps(_mm512_set1_ps(last.scale), scale), upper);
  upper =
      _mm512_fmadd_ps(_mm512_set1_ps(first.error), _mm512_loadu_ps(features.norm + 16 * v), upper);
  upper =
      _mm512_fmadd_ps(_mm512_set1_ps(first.norm), _mm512_loadu_ps(features.error + 16 * v), upper);
  const __mmask16 mask =
      _mm512_cmp_ps_mask(upper, _mm512_loadu_ps(surely_out_below + 16 * v), _CMP_NLT_UQ);
  return uint64_t{mask} << 16 * v;
}

// One strip of rows, with all their planes, times a panel. The panel streams from L2; the sums
// never leave the registers.
template <int rows, int planes>
__attribute__((noinline)) void screen_strip(const Panel& panel, const int8_t* x, uint64_t* masks) {
  const Int8Layout& layout = panel.layout;
  const Int8Features& features = panel.features();
  const int64_t stride = layout.row_bytes();
  const auto terms = [&](int r) -> const Int8Row& {
    return *reinterpret_cast<const Int8Row*>(x + r * stride + layout.inputs);
  };
  __m512i sum[rows][4];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_set1_epi32(terms(r).start);
  multiply<Int8, rows>(x, stride, panel.weights, layout.inputs / 4, sum,
                       [&] { panel.prefetcher.fetch(panel.lines); });
#pragma GCC unroll 6
  for (int r = 0; r < rows; r += planes) {
    uint64_t mask = 0;
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      mask |= may_reach<planes>(features, panel.surely_out_below, v, terms(r), sum[r][v],
                                terms(r + planes - 1), sum[r + planes - 1][v]);
    masks[r / planes] = mask;
  }
}

template <int planes, int... i>
void screen_planes(const Int8ScreenArgs& args, uint64_t* masks, Prefetcher& prefetcher,
                   std::integer_sequence<int, i...>) {
  static constexpr void (*strips[])(const Panel&, const int8_t*,
                                    uint64_t*) = {screen_strip<(i + 1) * planes, planes>...};
  constexpr int64_t max_rows = sizeof...(i);
  const int64_t count = args.row_count, row_bytes = planes * args.layout.row_bytes();
  const int64_t steps = args.layout.inputs / 4 * ((count + max_rows - 1) / max_rows);
  const Panel panel = {args.layout, args.panel, args.surely_out_below, prefetcher,
                       (prefetcher.lines() + steps - 1) / steps};
  for (int64_t r = 0; r < count; r += max_rows)
    strips[std::min(max_rows, count - r) - 1](panel, args.rows + r * row_bytes, masks + r);
}

void screen_int8(const Int8ScreenArgs& args, uint64_t* masks, Prefetcher& prefetcher) {
  if (args.planes == 1)
    screen_planes<1>(args, masks, prefetcher, std::make_integer_sequence<int, strip_rows>());
  else
    screen_planes<2>(args, masks, prefetcher, std::make_integer_sequence<int, strip_rows / 2>());
}

}  // namespace
}  // namespace sparse_transcoder::cpu
