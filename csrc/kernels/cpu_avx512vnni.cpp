// AVX-512 with VNNI: Intel since 2019, AMD since Zen 4. Compiled with those flags, called only where the machine has them.
#include <immintrin.h>

#include <limits>

#include "cpu.h"
#include "gate.h"
#include "quantise.h"

namespace sparse_transcoder::kernels {
namespace {

constexpr int strip_rows = 6;  // 6 rows x 4 vectors of 16 features: 24 sums, 4 weights and an input fill the 32 registers

// Assembly, as gcc 12 copies the sum around the intrinsics of these.
struct Int8 {  // four uint8 of w times four int8 of x
  static void add(__m512i& sum, __m512i w, __m512i x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); }
};
struct Int16 {  // two int16 times two
  static void add(__m512i& sum, __m512i w, __m512i x) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); }
};

// sum[r][v] += rows x panel over `steps` four-byte steps of the inputs: x [rows] `stride` bytes apart, w [steps][64 features].
template <typename Type, int rows>
inline __attribute__((always_inline)) void multiply(const char* x, int64_t stride, const char* w, int64_t steps,
                                                    __m512i (&sum)[rows][4]) {
  for (int64_t step = 0; step < steps; ++step, x += 4, w += 4 * panel_features) {
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

// One group of a strip of rows times a panel, added to the tile; with the margin, the last group, the masks come out.
template <int rows, int planes, bool margin>
__attribute__((noinline)) void screen_group(const Int8Layout& layout, const int8_t* x, int64_t g, const uint8_t* w,
                                            const float* w_scales, const float* low, float* tile, uint64_t* masks) {
  const int64_t stride = layout.row_bytes();
  const auto scale = [&](int r) { return reinterpret_cast<const float*>(x + r * stride + layout.inputs())[g]; };
  const auto start = [&](int r) {
    return reinterpret_cast<const int32_t*>(x + r * stride + layout.inputs())[layout.groups + 1 + g];
  };
  __m512i sum[rows][4];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_set1_epi32(start(r));
  multiply<Int8, rows>(reinterpret_cast<const char*>(x + g * layout.depth), stride, reinterpret_cast<const char*>(w),
                       (margin ? layout.margin_depth : layout.depth) / 4, sum);
#pragma GCC unroll 6
  for (int r = 0; r < rows; r += margin ? planes : 1) {  // the second plane has no margin of its own
    float* row = tile + r / planes * panel_features;
    const __m512 x_scale = _mm512_set1_ps(scale(r));
    uint64_t mask = 0;
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][v]), _mm512_loadu_ps(w_scales + 16 * v));
      const __m512 score = _mm512_fmadd_ps(part, x_scale, _mm512_loadu_ps(row + 16 * v));
      if (margin)
        mask |= uint64_t{_mm512_cmp_ps_mask(score, _mm512_loadu_ps(low + 16 * v), _CMP_NLT_UQ)} << 16 * v;
      else
        _mm512_storeu_ps(row + 16 * v, score);
    }
    if (margin) masks[r / planes] = mask;
  }
}

template <int planes, bool margin>
void screen_strip(int64_t rows, const Int8Layout& layout, const int8_t* x, int64_t g, const uint8_t* w, const float* w_scales,
                  const float* low, float* tile, uint64_t* masks) {
  switch (rows) {
    case 1:
      return screen_group<planes, planes, margin>(layout, x, g, w, w_scales, low, tile, masks);
    case 2:
      return screen_group<2 * planes, planes, margin>(layout, x, g, w, w_scales, low, tile, masks);
    case 3:
      return screen_group<3 * planes, planes, margin>(layout, x, g, w, w_scales, low, tile, masks);
    default:
      if constexpr (planes == 1) {
        if (rows == 4) return screen_group<4, 1, margin>(layout, x, g, w, w_scales, low, tile, masks);
        if (rows == 5) return screen_group<5, 1, margin>(layout, x, g, w, w_scales, low, tile, masks);
        return screen_group<6, 1, margin>(layout, x, g, w, w_scales, low, tile, masks);
      }
  }
}

template <int planes>
void screen_planes(const Int8Layout& layout, const int8_t* rows, int64_t count, const uint8_t* panel, const float* low,
                   float* tile, uint64_t* masks, Ahead& ahead) {
  constexpr int64_t strip = strip_rows / planes;
  const int64_t passes = (layout.groups + 1) * ((count + strip - 1) / strip), lines = (ahead.lines + passes - 1) / passes;
  const auto* scales = reinterpret_cast<const float*>(panel + panel_features * layout.inputs());
  for (int64_t i = 0; i < count * panel_features; i += 16) _mm512_storeu_ps(tile + i, _mm512_setzero_ps());
  // A group of the panel, 16 KiB, stays in L1 while the rows pass.
  for (int64_t g = 0; g <= layout.groups; ++g) {
    const uint8_t* w = panel + panel_features * g * layout.depth;
    const auto pass = g < layout.groups ? screen_strip<planes, false> : screen_strip<planes, true>;
    for (int64_t r = 0; r < count; r += strip) {
      ahead.fetch(lines);
      pass(std::min(strip, count - r), layout, rows + r * planes * layout.row_bytes(), g, w, scales + g * panel_features, low,
           tile + r * panel_features, masks + r);
    }
  }
}

void screen_int8(const Int8Layout& layout, const int8_t* rows, int64_t count, int64_t planes, const uint8_t* panel,
                 const float* low, float* tile, uint64_t* masks, Ahead& ahead) {
  (planes == 1 ? screen_planes<1> : screen_planes<2>)(layout, rows, count, panel, low, tile, masks, ahead);
}

int32_t dot_int16(const int16_t* x, const int16_t* w, int64_t size) {
  // Rows are padded with zeros to whole vectors.
  __m512i sum[4] = {};
  int64_t i = 0;
  for (; i + 128 <= size; i += 128)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) Int16::add(sum[v], _mm512_loadu_si512(w + i + 32 * v), _mm512_loadu_si512(x + i + 32 * v));
  for (; i < size; i += 32) Int16::add(sum[0], _mm512_loadu_si512(w + i), _mm512_loadu_si512(x + i));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]), _mm512_add_epi32(sum[2], sum[3])));
}

// [64 features][size] to [size / 2][64 features][2]; features from `count` on are zeros.
void pack_int16(const int16_t* w, int64_t count, int64_t size, int16_t* packed) {
  const int64_t stride = int16_stride(size), pairs = (size + 1) / 2;
  const __m512i index = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                           _mm512_set1_epi32(static_cast<int>(stride / 2)));
  for (int64_t v = 0; v < 4; ++v) {
    const __mmask16 mask = static_cast<__mmask16>((1u << std::clamp<int64_t>(count - 16 * v, 0, 16)) - 1);
    const auto* from = reinterpret_cast<const int32_t*>(w + 16 * v * stride);
    auto* to = reinterpret_cast<int32_t*>(packed) + 16 * v;
    for (int64_t pair = 0; pair < pairs; ++pair)
      _mm512_storeu_si512(to + pair * panel_features,
                          _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, index, from + pair, 4));
  }
}

template <int rows>
__attribute__((noinline)) void product_strip(const int16_t* x, const Int16Scale* scale, const int16_t* packed, int64_t begin,
                                             int64_t end, int64_t size, const float* w_scale, float* scores) {
  const int64_t stride = int16_stride(size);
  __m512i sum[rows][4];
  auto* partial = reinterpret_cast<int32_t*>(scores);
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      sum[r][v] = begin == 0 ? _mm512_setzero_si512() : _mm512_loadu_si512(partial + r * panel_features + 16 * v);
  multiply<Int16, rows>(reinterpret_cast<const char*>(x + begin), 2 * stride,
                        reinterpret_cast<const char*>(packed + begin * panel_features), (end - begin + 1) / 2, sum);
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512 both = _mm512_mul_ps(_mm512_set1_ps(scale[r].scale), _mm512_loadu_ps(w_scale + 16 * v));
      if (end < size)
        _mm512_storeu_si512(partial + r * panel_features + 16 * v, sum[r][v]);
      else
        _mm512_storeu_ps(scores + r * panel_features + 16 * v, _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][v]), both));
    }
}

void product_int16(const int16_t* x, const Int16Scale* scale, int64_t rows, const int16_t* w, const float* w_scale, int64_t count,
                   int64_t size, int16_t* packed, float* scores) {
  constexpr void (*strips[])(const int16_t*, const Int16Scale*, const int16_t*, int64_t, int64_t, int64_t, const float*,
                             float*) = {product_strip<1>, product_strip<2>, product_strip<3>,
                                        product_strip<4>, product_strip<5>, product_strip<6>};
  constexpr int64_t depth = 128;  // 16 KiB of the panel stay in L1 while the rows pass
  pack_int16(w, count, size, packed);
  float w_scales[panel_features] = {};
  std::copy(w_scale, w_scale + count, w_scales);
  for (int64_t begin = 0; begin < size; begin += depth)
    for (int64_t r = 0; r < rows; r += strip_rows)
      strips[std::min<int64_t>(strip_rows, rows - r) - 1](x + r * int16_stride(size), scale + r, packed, begin,
                                                          std::min(begin + depth, size), size, w_scales,
                                                          scores + r * panel_features);
}

int64_t candidates(const float* scores, const Gate& gate, const float* residual, int64_t count, Margin margin, float bound,
                   uint32_t* out, int64_t* certain) {
  const __m512 per_norm = _mm512_set1_ps(margin.per_norm), per_residual = _mm512_set1_ps(margin.per_residual);
  const __m512 bounds = _mm512_set1_ps(bound);
  int64_t found = 0, sure_count = 0, i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512 score = _mm512_loadu_ps(scores + i);
    const __m512 slack =
        _mm512_fmadd_ps(per_norm, _mm512_loadu_ps(gate.norm + i), _mm512_mul_ps(per_residual, _mm512_loadu_ps(residual + i)));
    const __m512 upper = _mm512_add_ps(score, slack);
    const unsigned may = _mm512_cmp_ps_mask(upper, _mm512_loadu_ps(gate.low + i), _CMP_NLT_UQ);
    if (may == 0) continue;
    const unsigned sure = _mm512_cmp_ps_mask(_mm512_sub_ps(score, slack), _mm512_loadu_ps(gate.high + i), _CMP_GE_OQ);
    const __m512 needed = _mm512_sub_ps(bounds, _mm512_loadu_ps(gate.bias + i));
    const unsigned top = _mm512_cmp_ps_mask(upper, needed, _CMP_NLT_UQ);
    sure_count += __builtin_popcount(sure);
    for (unsigned mask = may & (top | ~sure); mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      out[found++] = static_cast<uint32_t>(i + lane) << 1 | (~sure >> lane & 1);
    }
  }
  *certain += sure_count;
  return candidates_from(i, scores, gate, residual, count, margin, bound, out, found, certain);
}

}  // namespace

void use_avx512vnni(CpuKernels& kernels) {
  kernels.name = "avx512vnni";
  kernels.int8_rows = std::numeric_limits<int64_t>::max();
  kernels.fast_int16 = true;
  kernels.candidates = candidates;
  kernels.quantise_row = quantise_row;
  kernels.quantise_panel = quantise_panel;
  kernels.screen_int8 = screen_int8;
  kernels.quantise_int16 = quantise_int16;
  kernels.dot_int16 = dot_int16;
  kernels.product_int16 = product_int16;
}

}  // namespace sparse_transcoder::kernels
