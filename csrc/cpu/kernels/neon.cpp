// NEON, which every 64-bit Arm processor has: the loops that compilers leave scalar in portable
// C++, and those that convert weights once for several rows.
#include <arm_neon.h>

#include <algorithm>

#include "cpu/kernels/element-inl.h"
#include "cpu/kernels/kernels.h"

namespace sparse_transcoder::cpu {
namespace {

float32x4_t load4(const float* w, F32) { return vld1q_f32(w); }
float32x4_t load4(const uint16_t* w, BF16) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(w), 16));
}
float32x4_t load4(const uint16_t* w, F16) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(w)));
}

// The 32 partial sums of each row are made a few vectors at a time, so that those of all rows stay
// in registers. Weights are converted once for all rows.
template <typename Element, int rows>
void dot_block(const float* const* x, const typename Element::type* w, int64_t size,
               double* totals) {
  constexpr int vectors = rows == 1 ? 8 : rows == 2 ? 4 : 2;
  const int64_t whole = size / 32 * 32;
  double sums[rows][32];
  for (int first = 0; first < 32; first += 4 * vectors) {
    float64x2_t low[rows][vectors], high[rows][vectors];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) low[r][v] = high[r][v] = vdupq_n_f64(0);
    for (int64_t i = first; i < whole; i += 32)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const float32x4_t wv = load4(w + i + 4 * v, Element());
        const float64x2_t w_low = vcvt_f64_f32(vget_low_f32(wv)), w_high = vcvt_high_f64_f32(wv);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          const float32x4_t xv = vld1q_f32(x[r] + i + 4 * v);
          low[r][v] = vfmaq_f64(low[r][v], vcvt_f64_f32(vget_low_f32(xv)), w_low);
          high[r][v] = vfmaq_f64(high[r][v], vcvt_high_f64_f32(xv), w_high);
        }
      }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        vst1q_f64(sums[r] + first + 4 * v, low[r][v]);
        vst1q_f64(sums[r] + first + 4 * v + 2, high[r][v]);
      }
  }
  for (int r = 0; r < rows; ++r) {
    for (int64_t i = whole, lane = 0; i < size; ++i, ++lane)
      sums[r][lane] += double{x[r][i]} * Element::widen(w[i]);
    totals[r] = fold(sums[r]);
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
  float32x4_t sum[rows][features];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int f = 0; f < features; ++f) sum[r][f] = vdupq_n_f32(0);
  int64_t i = 0;
  for (; i + 4 <= size; i += 4) {
    float32x4_t wv[features];
#pragma GCC unroll 4
    for (int f = 0; f < features; ++f) wv[f] = load4(w + f * size + i, Element());
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const float32x4_t xv = vld1q_f32(x + r * size + i);
#pragma GCC unroll 4
      for (int f = 0; f < features; ++f) sum[r][f] = vfmaq_f32(sum[r][f], xv, wv[f]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int f = 0; f < features; ++f) {
      float total = vaddvq_f32(sum[r][f]);
      for (int64_t j = i; j < size; ++j) total += x[r * size + j] * Element::widen(w[f * size + j]);
      scores[r * stride + f] = total;
    }
}

template <typename Element>
void product(const float* x, int64_t rows, const void* weights, int64_t count, int64_t size,
             float* scores) {
  const auto* w = static_cast<const typename Element::type*>(weights);
  // The rows of a block stay in L2 while all weights pass; four features stay in L1 while the rows
  // of the block pass.
  const int64_t block = std::max<int64_t>(4, (128 << 10) / (4 * size) / 4 * 4);
  const auto multiply = [&](int64_t r, bool four_rows, int64_t f, bool four_features) {
    const auto run =
        four_rows ? four_features ? product_block<Element, 4, 4> : product_block<Element, 4, 1>
        : four_features ? product_block<Element, 1, 4>
                        : product_block<Element, 1, 1>;
    run(x + r * size, w + f * size, size, scores + r * count + f, count);
  };
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t last = std::min(first + block, rows);
    for (int64_t f = 0; f < count;) {
      const bool four_features = f + 4 <= count;
      for (int64_t r = first; r < last;) {
        const bool four_rows = r + 4 <= last;
        multiply(r, four_rows, f, four_features);
        r += four_rows ? 4 : 1;
      }
      f += four_features ? 4 : 1;
    }
  }
}

// One part of up to four rows and a feature, all padded with zeros to whole vectors.
template <int rows>
void add_part(const int16_t* const* x, const int16_t* w, int64_t begin, int64_t end,
              int64_t* totals) {
  int32x4_t low[rows], high[rows];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) low[r] = high[r] = vdupq_n_s32(0);
  for (int64_t i = begin; i < end; i += 8) {
    const int16x8_t wv = vld1q_s16(w + i);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const int16x8_t xv = vld1q_s16(x[r] + i);
      low[r] = vmlal_s16(low[r], vget_low_s16(xv), vget_low_s16(wv));
      high[r] = vmlal_high_s16(high[r], xv, wv);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) totals[r] += vaddvq_s32(vaddq_s32(low[r], high[r]));
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

void product_int16(const Int16ProductArgs& args, float* scores, Prefetcher&) {
  const int64_t stride = int16_stride(args.size);
  for (int64_t first = 0; first < args.row_count; first += dot_rows) {
    const int64_t count = std::min(dot_rows, args.row_count - first);
    const int16_t* rows[dot_rows];
    for (int64_t r = 0; r < count; ++r) rows[r] = args.rows + (first + r) * stride;
    for (int64_t f = 0; f < args.feature_count; ++f) {
      int64_t sums[dot_rows];
      dot_int16(rows, count, args.features + f * stride, args.size, sums);
      for (int64_t r = 0; r < count; ++r)
        scores[(first + r) * panel_features + f] =
            static_cast<float>(sums[r]) * (args.row_scale[first + r].scale * args.feature_scale[f]);
    }
  }
}

}  // namespace

// The crossovers stay those of the portable loops: none was measured on Arm.
void use_neon(KernelTable& kernels) {
  kernels.dot[0] = dot<F32>;
  kernels.dot[1] = dot<BF16>;
  kernels.dot[2] = dot<F16>;
  kernels.product[0] = product<F32>;
  kernels.product[1] = product<BF16>;
  kernels.product[2] = product<F16>;
  kernels.dot_int16 = dot_int16;
  kernels.product_int16 = product_int16;
}

}  // namespace sparse_transcoder::cpu
