// AVX2, FMA and F16C: x86-64 since 2013. This file is compiled with those flags and called only
// where the machine has them.
#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "cpu/kernels/element-inl.h"
#include "cpu/kernels/gate-inl.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/list-inl.h"
#include "cpu/kernels/quantise-inl.h"
#include "cpu/kernels/screen_avx2-inl.h"
#include "cpu/kernels/sort-inl.h"

namespace sparse_transcoder::cpu {
namespace {

__m256 load8(const float* w, F32) { return _mm256_loadu_ps(w); }
__m256 load8(const uint16_t* w, BF16) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
__m256 load8(const uint16_t* w, F16) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
}

// The conversion reads memory where it can, which is half the work of reading a register.
__m256d load4(const float* w, F32) { return _mm256_cvtps_pd(_mm_loadu_ps(w)); }
__m256d load4(const uint16_t* w, BF16) {
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w));
  return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(raw), 16)));
}
__m256d load4(const uint16_t* w, F16) {
  return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w))));
}

// The 32 partial sums of each row are made a few vectors at a time, so that those of all rows stay
// in registers. Weights are converted once for all rows.
template <typename Element, int rows>
void dot_block(const float* const* x, const typename Element::type* w, int64_t size,
               double* totals) {
  constexpr int vectors = rows == 1 ? 8 : rows == 4 ? 2 : 4;
  const int64_t whole = size / 32 * 32;
  alignas(32) double sums[rows][32];
  for (int first = 0; first < 32; first += 4 * vectors) {
    __m256d sum[rows][vectors];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] = _mm256_setzero_pd();
    for (int64_t i = first; i < whole; i += 32)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const __m256d wv = load4(w + i + 4 * v, Element());
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r)
          sum[r][v] = _mm256_fmadd_pd(load4(x[r] + i + 4 * v, F32()), wv, sum[r][v]);
      }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) _mm256_store_pd(sums[r] + first + 4 * v, sum[r][v]);
  }
  for (int r = 0; r < rows; ++r) {
    for (int64_t i = whole, lane = 0; i < size; ++i, ++lane)
      sums[r][lane] += double{x[r][i]} * Element::widen(w[i]);
    // Adds up in the order of fold, in registers.
    __m256d sum[8];
    for (int v = 0; v < 8; ++v) sum[v] = _mm256_load_pd(sums[r] + 4 * v);
    for (int width = 4; width > 0; width /= 2)
      for (int v = 0; v < width; ++v) sum[v] = _mm256_add_pd(sum[v], sum[v + width]);
    const __m128d two =
        _mm_add_pd(_mm256_castpd256_pd128(sum[0]), _mm256_extractf128_pd(sum[0], 1));
    totals[r] = _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
}

template <typename Element>
void dot(const float* const* x, int64_t rows, const void* weights, int64_t size, double* totals) {
  const auto* w = static_cast<const typename Element::type*>(weights);
  static constexpr void (*blocks[dot_rows])(const float* const*, const typename Element::type*,
                                            int64_t, double*) = {
      dot_block<Element, 1>, dot_block<Element, 2>, dot_block<Element, 3>, dot_block<Element, 4>};
  blocks[rows - 1](x, w, size, totals);
}

// A block of `rows` x `features` dot products. Both operands are read along their rows, so nothing
// is packed.
template <typename Element, int rows, int features>
void product_block(const float* x, const typename Element::type* w, int64_t size, float* scores,
                   int64_t stride) {
  __m256 sum[rows][features];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int f = 0; f < features; ++f) sum[r][f] = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    __m256 wv[features];
#pragma GCC unroll 4
    for (int f = 0; f < features; ++f) wv[f] = load8(w + f * size + i, Element());
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const __m256 xv = _mm256_loadu_ps(x + r * size + i);
#pragma GCC unroll 4
      for (int f = 0; f < features; ++f) sum[r][f] = _mm256_fmadd_ps(xv, wv[f], sum[r][f]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int f = 0; f < features; ++f) {
      __m128 half =
          _mm_add_ps(_mm256_castps256_ps128(sum[r][f]), _mm256_extractf128_ps(sum[r][f], 1));
      half = _mm_add_ps(half, _mm_movehl_ps(half, half));
      float total = _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
      for (int64_t j = i; j < size; ++j) total += x[r * size + j] * Element::widen(w[f * size + j]);
      scores[r * stride + f] = total;
    }
}

// Twelve sums, three weights and one input fill the sixteen registers.
template <typename Element, int rows>
void product_rows(const float* x, const typename Element::type* w, int64_t count, int64_t size,
                  float* scores, int64_t stride) {
  int64_t f = 0;
  for (; f + 3 <= count; f += 3)
    product_block<Element, rows, 3>(x, w + f * size, size, scores + f, stride);
  for (; f < count; ++f) product_block<Element, rows, 1>(x, w + f * size, size, scores + f, stride);
}

template <typename Element>
void product(const float* x, int64_t rows, const void* weights, int64_t count, int64_t size,
             float* scores) {
  const auto* w = static_cast<const typename Element::type*>(weights);
  // The rows of a block stay in L2 while all weights pass; three features stay in L1 while the rows
  // of the block pass.
  const int64_t block = std::max<int64_t>(4, (128 << 10) / (4 * size) / 4 * 4);
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t last = std::min(first + block, rows);
    for (int64_t f = 0; f < count; f += 3) {
      const int64_t group = std::min<int64_t>(3, count - f);
      int64_t r = first;
      for (; r + 4 <= last; r += 4)
        product_rows<Element, 4>(x + r * size, w + f * size, group, size, scores + r * count + f,
                                 count);
      for (; r < last; ++r)
        product_rows<Element, 1>(x + r * size, w + f * size, group, size, scores + r * count + f,
                                 count);
    }
  }
}

// Four int8 products per sum, without VNNI. Both operands are widened to 16 bits, four features per
// vector, where pairs of products add up without saturation.
struct Widen {
  static constexpr int features = 8;
  static void load(const uint8_t* w, __m256i (&wv)[2]) {
    wv[0] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
    wv[1] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16)));
  }
  static __m256i input(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof(four));
    return _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
  }
  static void add(__m256i& sum, __m256i w, __m256i x) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
  }
  static void total(const __m256i (&sum)[2], __m256i (&totals)[1]) {
    totals[0] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum[0], sum[1]), 0xd8);
  }
};

// One part of a row and a feature. Both are padded with zeros to whole vectors.
int32_t dot_part(const int16_t* x, const int16_t* w, int64_t size) {
  __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                    _mm256_setzero_si256()};
  const auto load = [](const int16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  };
  int64_t i = 0;
  for (; i + 64 <= size; i += 64)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      sum[v] =
          _mm256_add_epi32(sum[v], _mm256_madd_epi16(load(x + i + 16 * v), load(w + i + 16 * v)));
  for (; i < size; i += 16)
    sum[0] = _mm256_add_epi32(sum[0], _mm256_madd_epi16(load(x + i), load(w + i)));
  const __m256i total =
      _mm256_add_epi32(_mm256_add_epi32(sum[0], sum[1]), _mm256_add_epi32(sum[2], sum[3]));
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  half = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
  return _mm_cvtsi128_si32(half) + _mm_extract_epi32(half, 1);
}

void dot_int16(const int16_t* const* x, int64_t rows, const int16_t* w, int64_t size,
               int64_t* sums) {
  const int64_t part = int16_part_size(size);
  for (int64_t r = 0; r < rows; ++r) {
    sums[r] = 0;
    for (int64_t i = 0; i < size; i += part)
      sums[r] += dot_part(x[r] + i, w + i, std::min(part, size - i));
  }
}

// Eight float32, for the gate.
struct Eight {
  using Floats = __m256;
  static constexpr int64_t width = 8;
  static __m256 load(const float* from) { return _mm256_loadu_ps(from); }
  static __m256 fill(float value) { return _mm256_set1_ps(value); }
  static __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m256 subtract(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
  static __m256 multiply(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  static __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
  static int64_t count(unsigned mask) { return __builtin_popcount(mask); }
  static unsigned at_least(__m256 a, __m256 b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ));
  }
  static unsigned not_less(__m256 a, __m256 b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ));
  }
};

template <typename Element>
void widen(const void* stored, float* out, int64_t size) {
  const auto* from = static_cast<const typename Element::type*>(stored);
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) _mm256_storeu_ps(out + i, load8(from + i, Element()));
  for (; i < size; ++i) out[i] = Element::widen(from[i]);
}

}  // namespace

void use_avx2(KernelTable& kernels) {
  kernels.crossovers.int8_rows = std::numeric_limits<int64_t>::max();
  kernels.crossovers.max_share_float32 = 0.05;
  kernels.dot[0] = dot<F32>;
  kernels.dot[1] = dot<BF16>;
  kernels.dot[2] = dot<F16>;
  kernels.product[0] = product<F32>;
  kernels.product[1] = product<BF16>;
  kernels.product[2] = product<F16>;
  kernels.gate_row = gate_row<Eight>;
  kernels.widen[0] = widen<F32>;
  kernels.widen[1] = widen<BF16>;
  kernels.widen[2] = widen<F16>;
  kernels.quantise_row = quantise_row;
  kernels.quantise_panel = quantise_panel;
  kernels.screen_int8 = screen_int8<Widen>;
  kernels.quantise_int16 = quantise_int16;
  kernels.dot_int16 = dot_int16;
  kernels.list_survivors = list_survivors<transpose>;
  kernels.sort_keys = sort_keys;
}

}  // namespace sparse_transcoder::cpu
