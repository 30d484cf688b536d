// AVX-512 with VNNI: Intel since 2019, AMD since Zen 4. Compiled with those flags, called only where the machine has them.
#include <immintrin.h>

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
template <typename Type, int rows, typename Between>
inline __attribute__((always_inline)) void multiply(const void* inputs, int64_t stride, const void* weights, int64_t steps,
                                                    __m512i (&sum)[rows][4], const Between& between) {
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

// One group of a panel, as the rows pass.
struct Group64 {
  const Int8Layout& layout;
  const int64_t g;
  const uint8_t* weights;
  const float *scales, *low;
  Ahead& ahead;
  const int64_t lines;  // to fetch ahead in each step
};

// One strip of rows times a group, added to the tile; with the margin, the last group, the masks come out.
template <int rows, int planes, bool margin>
__attribute__((noinline)) void screen_group(const Group64& group, const int8_t* x, float* tile, uint64_t* masks) {
  const Int8Layout& layout = group.layout;
  const int64_t stride = layout.row_bytes(), g = group.g;
  const auto scale = [&](int r) { return reinterpret_cast<const float*>(x + r * stride + layout.inputs())[g]; };
  const auto start = [&](int r) {
    return reinterpret_cast<const int32_t*>(x + r * stride + layout.inputs())[layout.groups + 1 + g];
  };
  __m512i sum[rows][4];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_set1_epi32(start(r));
  multiply<Int8, rows>(x + g * layout.depth, stride, group.weights, (margin ? layout.margin_depth : layout.depth) / 4, sum,
                       [&] { group.ahead.fetch(group.lines); });
#pragma GCC unroll 6
  for (int r = 0; r < rows; r += margin ? planes : 1) {  // the second plane has no margin of its own
    float* row = tile + r / planes * panel_features;
    const __m512 x_scale = _mm512_set1_ps(scale(r));
    uint64_t mask = 0;
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      // The scales first: their product times a sum is at most ||x|| ||w||; a sum times one of them alone could overflow.
      const __m512 both = _mm512_mul_ps(x_scale, _mm512_loadu_ps(group.scales + 16 * v));
      const __m512 score = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][v]), both, _mm512_loadu_ps(row + 16 * v));
      if (margin)
        mask |= uint64_t{_mm512_cmp_ps_mask(score, _mm512_loadu_ps(group.low + 16 * v), _CMP_NLT_UQ)} << 16 * v;
      else
        _mm512_storeu_ps(row + 16 * v, score);
    }
    if (margin) masks[r / planes] = mask;
  }
}

template <int planes>
void screen_planes(const Int8Layout& layout, const int8_t* rows, int64_t count, const uint8_t* panel, const float* low,
                   float* tile, uint64_t* masks, Ahead& ahead) {
  using Strip = void (*)(const Group64&, const int8_t*, float*, uint64_t*);
  constexpr int p = planes, most = strip_rows / planes;
  static constexpr Strip add[] = {screen_group<p, p, false>,
                                  screen_group<2 * p, p, false>,
                                  screen_group<3 * p, p, false>,
                                  screen_group<(planes == 1 ? 4 : 2), p, false>,
                                  screen_group<(planes == 1 ? 5 : 2), p, false>,
                                  screen_group<6, p, false>};
  static constexpr Strip gate[] = {screen_group<p, p, true>,
                                   screen_group<2 * p, p, true>,
                                   screen_group<3 * p, p, true>,
                                   screen_group<(planes == 1 ? 4 : 2), p, true>,
                                   screen_group<(planes == 1 ? 5 : 2), p, true>,
                                   screen_group<6, p, true>};
  const auto* scales = reinterpret_cast<const float*>(panel + panel_features * layout.inputs());
  const int64_t steps = layout.inputs() / 4 * ((count + most - 1) / most), lines = (ahead.lines() + steps - 1) / steps;
  for (int64_t i = 0; i < count * panel_features; i += 16) _mm512_storeu_ps(tile + i, _mm512_setzero_ps());
  // A group of the panel, 16 KiB, stays in L1 while the rows pass.
  for (int64_t g = 0; g <= layout.groups; ++g) {
    const Group64 group = {layout, g, panel + panel_features * g * layout.depth, scales + g * panel_features, low, ahead, lines};
    const Strip* strips = g < layout.groups ? add : gate;
    for (int64_t r = 0; r < count; r += most) {
      const int64_t rows_here = std::min<int64_t>(most, count - r);
      strips[rows_here - 1](group, rows + r * planes * layout.row_bytes(), tile + r * panel_features, masks + r);
    }
  }
}

void screen_int8(const Int8Layout& layout, const int8_t* rows, int64_t count, int64_t planes, const uint8_t* panel,
                 const float* low, float* tile, uint64_t* masks, Ahead& ahead) {
  (planes == 1 ? screen_planes<1> : screen_planes<2>)(layout, rows, count, panel, low, tile, masks, ahead);
}

// Rows are padded with zeros to whole vectors. Two sums a row hide the latency; with one row, four.
template <int rows>
void dot_block(const int16_t* const* x, const int16_t* w, int64_t size, int32_t* totals) {
  constexpr int vectors = rows == 1 ? 4 : 2;
  __m512i sum[rows][vectors];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[r][v] = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 32 * vectors <= size; i += 32 * vectors)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const __m512i wv = _mm512_loadu_si512(w + i + 32 * v);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) Int16::add(sum[r][v], wv, _mm512_loadu_si512(x[r] + i + 32 * v));
    }
  for (; i < size; i += 32) {
    const __m512i wv = _mm512_loadu_si512(w + i);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) Int16::add(sum[r][0], wv, _mm512_loadu_si512(x[r] + i));
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    __m512i total = sum[r][0];
#pragma GCC unroll 4
    for (int v = 1; v < vectors; ++v) total = _mm512_add_epi32(total, sum[r][v]);
    totals[r] = _mm512_reduce_add_epi32(total);
  }
}

void dot_int16(const int16_t* const* x, int64_t rows, const int16_t* w, int64_t size, int32_t* sums) {
  static constexpr void (*blocks[dot_rows])(const int16_t* const*, const int16_t*, int64_t, int32_t*) = {
      dot_block<1>, dot_block<2>, dot_block<3>, dot_block<4>};
  blocks[rows - 1](x, w, size, sums);
}

// 16 x 16 of int32.
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
  // row[4 * i + j] holds, in each of four 128-bit lanes l, column 4 * l + j of rows 4 * i to 4 * i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low02 = _mm512_shuffle_i32x4(row[j], row[4 + j], 0x88), low13 = _mm512_shuffle_i32x4(row[j], row[4 + j], 0xdd);
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

// [64 features][size] to [size / 2][64 features][2]; features from `count` on are zeros. Rows are padded to whole vectors.
void pack_int16(const int16_t* w, int64_t count, int64_t size, int16_t* packed) {
  const int64_t stride = int16_stride(size);
  for (int64_t i = 0; i < size; i += 32)
    for (int64_t first = 0; first < panel_features; first += 16) {
      __m512i row[16];
#pragma GCC unroll 16
      for (int64_t f = 0; f < 16; ++f)
        row[f] = first + f < count ? _mm512_loadu_si512(w + (first + f) * stride + i) : _mm512_setzero_si512();
      transpose(row);
#pragma GCC unroll 16
      for (int64_t pair = 0; pair < 16; ++pair)
        _mm512_storeu_si512(packed + (i + 2 * pair) * panel_features + 2 * first, row[pair]);
    }
}

// Inputs [begin, end) of a strip of rows times a panel; sums in between are kept in the scores' place.
struct Depth {
  int64_t begin, end, size;
  const int16_t* packed;
  const float* w_scale;
  Ahead& ahead;
  int64_t lines;
};

template <int rows>
__attribute__((noinline)) void product_strip(const Depth& depth, const int16_t* x, const Int16Scale* scale, float* scores) {
  __m512i sum[rows][4];
  auto* partial = reinterpret_cast<int32_t*>(scores);
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      sum[r][v] = depth.begin == 0 ? _mm512_setzero_si512() : _mm512_loadu_si512(partial + r * panel_features + 16 * v);
  multiply<Int16, rows>(x + depth.begin, 2 * int16_stride(depth.size), depth.packed + depth.begin * panel_features,
                        (depth.end - depth.begin + 1) / 2, sum, [&] { depth.ahead.fetch(depth.lines); });
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      if (depth.end < depth.size) {
        _mm512_storeu_si512(partial + r * panel_features + 16 * v, sum[r][v]);
      } else {
        const __m512 both = _mm512_mul_ps(_mm512_set1_ps(scale[r].scale), _mm512_loadu_ps(depth.w_scale + 16 * v));
        _mm512_storeu_ps(scores + r * panel_features + 16 * v, _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][v]), both));
      }
    }
}

void product_int16(const int16_t* x, const Int16Scale* scale, int64_t rows, const int16_t* w, const float* w_scale, int64_t count,
                   int64_t size, int16_t* packed, float* scores, Ahead& ahead) {
  static constexpr void (*strips[])(const Depth&, const int16_t*, const Int16Scale*, float*) = {
      product_strip<1>, product_strip<2>, product_strip<3>, product_strip<4>, product_strip<5>, product_strip<6>};
  constexpr int64_t most = 128;  // 16 KiB of the panel stay in L1 while the rows pass
  pack_int16(w, count, size, packed);
  float w_scales[panel_features] = {};
  std::copy(w_scale, w_scale + count, w_scales);
  const int64_t steps = (size + 1) / 2 * ((rows + strip_rows - 1) / strip_rows), lines = (ahead.lines() + steps - 1) / steps;
  for (int64_t begin = 0; begin < size; begin += most) {
    const Depth depth = {begin, std::min(begin + most, size), size, packed, w_scales, ahead, lines};
    for (int64_t r = 0; r < rows; r += strip_rows) {
      const int64_t strip = std::min<int64_t>(strip_rows, rows - r);
      strips[strip - 1](depth, x + r * int16_stride(size), scale + r, scores + r * panel_features);
    }
  }
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
