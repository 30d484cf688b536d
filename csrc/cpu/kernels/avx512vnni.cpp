// AVX-512 with VNNI: Intel since 2019, AMD since Zen 4. This file is compiled with those flags and
// called only where the machine has them.
#include <immintrin.h>

#include "cpu/kernels/element-inl.h"
#include "cpu/kernels/gate-inl.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/list-inl.h"
#include "cpu/kernels/quantise-inl.h"
#include "cpu/kernels/screen_avx512-inl.h"
#include "cpu/kernels/sort-inl.h"

namespace sparse_transcoder::cpu {
namespace {

// In assembly for the reason that Int8 has.
struct Int16 {  // two int16 of w times two int16 of x
  static void add(__m512i& sum, __m512i w, __m512i x) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  }
};

// One part of up to four rows and a feature, all padded with zeros to whole vectors. Two sums per
// row hide the latency; one row alone needs four.
template <int rows>
void add_part(const int16_t* const* x, const int16_t* w, int64_t begin, int64_t end,
              int64_t* totals) {
  constexpr int vectors = rows == 1 ? 4 : 2;
  __m512i sum[rows][vectors];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[r][v] = _mm512_setzero_si512();
  int64_t i = begin;
  for (; i + 32 * vectors <= end; i += 32 * vectors)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const __m512i wv = _mm512_loadu_si512(w + i + 32 * v);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r)
        Int16::add(sum[r][v], wv, _mm512_loadu_si512(x[r] + i + 32 * v));
    }
  for (; i < end; i += 32) {
    const __m512i wv = _mm512_loadu_si512(w + i);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) Int16::add(sum[r][0], wv, _mm512_loadu_si512(x[r] + i));
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 1; v < vectors; ++v) sum[r][0] = _mm512_add_epi32(sum[r][0], sum[r][v]);
  if constexpr (rows < 4) {
    for (int r = 0; r < rows; ++r) totals[r] += _mm512_reduce_add_epi32(sum[r][0]);
  } else {  // all four at once
    const auto fold = [](__m512i a, __m512i b) {
      return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    };
    const __m512i two01 = fold(sum[0][0], sum[1][0]), two23 = fold(sum[2][0], sum[3][0]);
    const __m512i all =
        _mm512_add_epi32(_mm512_unpacklo_epi64(two01, two23), _mm512_unpackhi_epi64(two01, two23));
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    auto* out = reinterpret_cast<__m256i*>(totals);
    _mm256_storeu_si256(out,
                        _mm256_add_epi64(_mm256_loadu_si256(out), _mm256_cvtepi32_epi64(four)));
  }
}

void dot_int16(const int16_t* const* x, int64_t rows, const int16_t* w, int64_t size,
               int64_t* sums) {
  static constexpr void (*parts[dot_rows])(const int16_t* const*, const int16_t*, int64_t, int64_t,
                                           int64_t*) = {add_part<1>, add_part<2>, add_part<3>,
                                                        add_part<4>};
  std::fill(sums, sums + rows, int64_t{0});
  const int64_t part = int16_part_size(size);
  for (int64_t i = 0; i < size; i += part) parts[rows - 1](x, w, i, std::min(i + part, size), sums);
}

// One pass of the transposition of 64 rows of 64 bits, eight rows in each vector: as in list-inl.h
// the two off-diagonal quarters of every square of 2 * half bits are swapped. The square's first
// rows keep their low bits, the last ones their high bits. The other bits come from the row `half`
// away, turned by as many bits.
template <int half>
void swap_quarters(__m512i (&rows)[8]) {
  constexpr uint64_t low = ~uint64_t{0} / ((uint64_t{1} << half) + 1);
  constexpr __mmask8 last_in_vector = half == 4 ? 0xf0 : half == 2 ? 0xcc : 0xaa;
  const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i away = _mm512_xor_si512(lanes, _mm512_set1_epi64(half));
  __m512i from[8];
  std::copy_n(rows, 8, from);
#pragma GCC unroll 8
  for (int v = 0; v < 8; ++v) {
    const __mmask8 last = half < 8 ? last_in_vector : v & half / 8 ? 0xff : 0;
    const __m512i other = half < 8 ? _mm512_permutexvar_epi64(away, from[v]) : from[v ^ half / 8];
    const __m512i turn = _mm512_mask_set1_epi64(_mm512_set1_epi64(half), last, 64 - half);
    const __m512i keep = _mm512_mask_set1_epi64(_mm512_set1_epi64(low), last, ~low);
    constexpr int choose_bits = 0xca;  // keep ? rows : other
    rows[v] = _mm512_ternarylogic_epi64(keep, from[v], _mm512_rolv_epi64(other, turn), choose_bits);
  }
}

void transpose_in_vectors(uint64_t* bits) {
  __m512i rows[8];
#pragma GCC unroll 8
  for (int v = 0; v < 8; ++v) rows[v] = _mm512_loadu_si512(bits + 8 * v);
  swap_quarters<32>(rows);
  swap_quarters<16>(rows);
  swap_quarters<8>(rows);
  swap_quarters<4>(rows);
  swap_quarters<2>(rows);
  swap_quarters<1>(rows);
#pragma GCC unroll 8
  for (int v = 0; v < 8; ++v) _mm512_storeu_si512(bits + 8 * v, rows[v]);
}

__m512d load8(const float* w, F32) { return _mm512_cvtps_pd(_mm256_loadu_ps(w)); }
__m512d load8(const uint16_t* w, BF16) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
  return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16)));
}
__m512d load8(const uint16_t* w, F16) {
  return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
}

// The 32 partial sums of each row are four vectors. Weights are converted once for all rows.
template <typename Element, int rows>
void dot_block(const float* const* x, const typename Element::type* w, int64_t size,
               double* totals) {
  const int64_t whole = size / 32 * 32;
  __m512d sum[rows][4];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_setzero_pd();
  for (int64_t i = 0; i < whole; i += 32)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512d wv = load8(w + i + 8 * v, Element());
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r)
        sum[r][v] = _mm512_fmadd_pd(load8(x[r] + i + 8 * v, F32()), wv, sum[r][v]);
    }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    if (whole < size) {
      alignas(64) double sums[32];
      for (int v = 0; v < 4; ++v) _mm512_store_pd(sums + 8 * v, sum[r][v]);
      for (int64_t i = whole, lane = 0; i < size; ++i, ++lane)
        sums[lane] += double{x[r][i]} * Element::widen(w[i]);
      for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_load_pd(sums + 8 * v);
    }
    // Adds up in the order of fold.
    const __m512d eight =
        _mm512_add_pd(_mm512_add_pd(sum[r][0], sum[r][2]), _mm512_add_pd(sum[r][1], sum[r][3]));
    const __m256d four =
        _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
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

// Transposes 16 x 16 int32.
inline __attribute__((always_inline)) void transpose(__m512i (&row)[16]) {
  __m512i next[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    next[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    next[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      row[i + 2 * j] = _mm512_unpacklo_epi64(next[i + j], next[i + 2 + j]);
      row[i + 2 * j + 1] = _mm512_unpackhi_epi64(next[i + j], next[i + 2 + j]);
    }
  // row[4 * i + j] holds, in each of four 128-bit lanes l, column 4 * l + j of rows 4 * i to 4 * i
  // + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low02 = _mm512_shuffle_i32x4(row[j], row[4 + j], 0x88),
                  low13 = _mm512_shuffle_i32x4(row[j], row[4 + j], 0xdd);
    const __m512i high02 = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0x88),
                  high13 = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0xdd);
    next[j] = _mm512_shuffle_i32x4(low02, high02, 0x88);
    next[8 + j] = _mm512_shuffle_i32x4(low02, high02, 0xdd);
    next[4 + j] = _mm512_shuffle_i32x4(low13, high13, 0x88);
    next[12 + j] = _mm512_shuffle_i32x4(low13, high13, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) row[i] = next[i];
}

// Turns [64 features][size] into [size / 2][64 features][2]. Features from `count` on become zeros.
// Rows are padded to whole vectors.
void pack_int16(const int16_t* w, int64_t count, int64_t size, int16_t* packed) {
  const int64_t stride = int16_stride(size);
  for (int64_t i = 0; i < size; i += 32)
    for (int64_t first = 0; first < panel_features; first += 16) {
      __m512i row[16];
#pragma GCC unroll 16
      for (int64_t f = 0; f < 16; ++f)
        row[f] = first + f < count ? _mm512_loadu_si512(w + (first + f) * stride + i)
                                   : _mm512_setzero_si512();
      transpose(row);
#pragma GCC unroll 16
      for (int64_t pair = 0; pair < 16; ++pair)
        _mm512_storeu_si512(packed + (i + 2 * pair) * panel_features + 2 * first, row[pair]);
    }
}

// Inputs [begin, end) of a panel: one part, whose products add up within int32.
struct Int16Part {
  int64_t begin, end, size;
  const int16_t* packed;
  const float* scale;
  Prefetcher& prefetcher;
  int64_t lines;  // to prefetch per step
};

// One strip of rows times a part of a panel, which streams from L2.
template <int rows>
__attribute__((noinline)) void product_part(const Int16Part& part, const int16_t* x,
                                            const Int16Scale* scale, float* scores) {
  __m512i sum[rows][4];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_setzero_si512();
  multiply<Int16, rows>(x + part.begin, 2 * int16_stride(part.size),
                        part.packed + part.begin * panel_features, (part.end - part.begin + 1) / 2,
                        sum, [&] { part.prefetcher.fetch(part.lines); });
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      float* out = scores + r * panel_features + 16 * v;
      __m512 total = _mm512_cvtepi32_ps(sum[r][v]);
      if (part.begin > 0) total = _mm512_add_ps(total, _mm512_loadu_ps(out));
      if (part.end == part.size)
        total = _mm512_mul_ps(total, _mm512_mul_ps(_mm512_set1_ps(scale[r].scale),
                                                   _mm512_loadu_ps(part.scale + 16 * v)));
      _mm512_storeu_ps(out, total);
    }
}

void product_int16(const Int16ProductArgs& args, float* scores, Prefetcher& prefetcher) {
  static constexpr void (*strips[])(const Int16Part&, const int16_t*, const Int16Scale*, float*) = {
      product_part<1>, product_part<2>, product_part<3>,
      product_part<4>, product_part<5>, product_part<6>};
  const int64_t rows = args.row_count, size = args.size, part_size = int16_part_size(size);
  pack_int16(args.features, args.feature_count, size, args.packed);
  float feature_scale[panel_features] = {};
  std::copy(args.feature_scale, args.feature_scale + args.feature_count, feature_scale);
  const int64_t steps = (size + 1) / 2 * ((rows + strip_rows - 1) / strip_rows);
  const int64_t lines = (prefetcher.lines() + steps - 1) / steps;
  for (int64_t r = 0; r < rows; r += strip_rows) {
    const auto strip = strips[std::min<int64_t>(strip_rows, rows - r) - 1];
    for (int64_t begin = 0; begin < size; begin += part_size) {
      const Int16Part part = {
          begin, std::min(begin + part_size, size), size, args.packed, feature_scale, prefetcher,
          lines};
      strip(part, args.rows + r * int16_stride(size), args.row_scale + r,
            scores + r * panel_features);
    }
  }
}

// Sixteen float32, for the gate.
struct Sixteen {
  using Floats = __m512;
  static constexpr int64_t width = 16;
  static __m512 load(const float* from) { return _mm512_loadu_ps(from); }
  static __m512 fill(float value) { return _mm512_set1_ps(value); }
  static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static __m512 subtract(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
  static __m512 multiply(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
  static __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
  static int64_t count(unsigned mask) { return __builtin_popcount(mask); }
  static unsigned at_least(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static unsigned not_less(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
};

}  // namespace

void use_avx512vnni(KernelTable& kernels) {
  kernels.crossovers.fast_int16 = true;
  kernels.crossovers.max_share_float32 = 0.25;
  kernels.dot[0] = dot<F32>;
  kernels.dot[1] = dot<BF16>;
  kernels.dot[2] = dot<F16>;
  kernels.gate_row = gate_row<Sixteen>;
  kernels.quantise_row = quantise_row;
  kernels.quantise_panel = quantise_panel;
  kernels.screen_int8 = screen_int8;
  kernels.quantise_int16 = quantise_int16;
  kernels.dot_int16 = dot_int16;
  kernels.product_int16 = product_int16;
  kernels.list_survivors = list_survivors<transpose_in_vectors>;
  kernels.sort_keys = sort_keys;
}

}  // namespace sparse_transcoder::cpu
