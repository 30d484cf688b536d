// Plain C++: any machine, and the definition of the order of every sum.
#include <algorithm>

#include "cpu/kernels/element-inl.h"
#include "cpu/kernels/gate-inl.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/quantise-inl.h"

namespace sparse_transcoder::cpu {
namespace {

template <typename Element>
void dot(const float* const* rows, int64_t count, const void* weights, int64_t size,
         double* totals) {
  const auto* w = static_cast<const typename Element::type*>(weights);
  for (int64_t r = 0; r < count; ++r) {
    const float* x = rows[r];
    double sums[32] = {};
    int64_t i = 0;
    for (; i + 32 <= size; i += 32)
      for (int lane = 0; lane < 32; ++lane)
        sums[lane] += double{x[i + lane]} * Element::widen(w[i + lane]);
    for (int lane = 0; i < size; ++i, ++lane) sums[lane] += double{x[i]} * Element::widen(w[i]);
    totals[r] = fold(sums);
  }
}

// Four partial sums each for two rows and two features: what compilers turn into vectors on any
// machine.
template <typename Element>
void product(const float* x, int64_t rows, const void* weights, int64_t count, int64_t size,
             float* scores) {
  const auto* w = static_cast<const typename Element::type*>(weights);
  for (int64_t f = 0; f < count; f += 2)
    for (int64_t r = 0; r < rows; r += 2) {
      // Past the last row or feature the last one is computed again.
      const int64_t r1 = std::min(r + 1, rows - 1), f1 = std::min(f + 1, count - 1);
      const float *x0 = x + r * size, *x1 = x + r1 * size;
      const auto *w0 = w + f * size, *w1 = w + f1 * size;
      float s00[4] = {}, s01[4] = {}, s10[4] = {}, s11[4] = {};
      int64_t i = 0;
      for (; i + 4 <= size; i += 4)
        for (int lane = 0; lane < 4; ++lane) {
          const float a = Element::widen(w0[i + lane]), b = Element::widen(w1[i + lane]);
          s00[lane] += x0[i + lane] * a;
          s01[lane] += x0[i + lane] * b;
          s10[lane] += x1[i + lane] * a;
          s11[lane] += x1[i + lane] * b;
        }
      for (int lane = 0; i < size; ++i, ++lane) {
        s00[lane] += x0[i] * Element::widen(w0[i]);
        s01[lane] += x0[i] * Element::widen(w1[i]);
        s10[lane] += x1[i] * Element::widen(w0[i]);
        s11[lane] += x1[i] * Element::widen(w1[i]);
      }
      const auto sum = [](const float* s) { return (s[0] + s[2]) + (s[1] + s[3]); };
      scores[r * count + f] = sum(s00);
      scores[r * count + f1] = sum(s01);
      scores[r1 * count + f] = sum(s10);
      scores[r1 * count + f1] = sum(s11);
    }
}

int64_t candidates(const float* scores, const FeatureBounds& gate, const float* residual,
                   int64_t count, Margin margin, float bound, uint32_t* out, int64_t* certain) {
  return candidates_from(0, scores, gate, residual, count, margin, bound, out, 0, certain);
}

template <typename Element>
void widen(const void* weights, float* out, int64_t size) {
  const auto* w = static_cast<const typename Element::type*>(weights);
  for (int64_t i = 0; i < size; ++i) out[i] = Element::widen(w[i]);
}

void screen_int8(const Int8Layout& layout, const int8_t* rows, int64_t count, int64_t planes,
                 const uint8_t* panel, const float* low, uint64_t* masks, Ahead&) {
  const auto& features =
      *reinterpret_cast<const Int8Features*>(panel + panel_features * layout.inputs);
  for (int64_t r = 0; r < count; ++r) {
    float upper[panel_features] = {};
    for (int64_t plane = 0; plane < planes; ++plane) {
      const int8_t* row = rows + (r * planes + plane) * layout.row_bytes();
      const auto& terms = *reinterpret_cast<const Int8Row*>(row + layout.inputs);
      int32_t sums[panel_features];
      std::fill(sums, sums + panel_features, terms.start);
      for (int64_t i = 0; i < layout.inputs; i += 4) {
        const uint8_t* four = panel + in_panel(i);
        for (int64_t f = 0; f < panel_features; ++f)
          for (int j = 0; j < 4; ++j) sums[f] += int32_t{four[4 * f + j]} * row[i + j];
      }
      for (int64_t f = 0; f < panel_features; ++f)
        upper[f] += static_cast<float>(sums[f]) * (terms.scale * features.scale[f]);
    }
    const auto& terms =
        *reinterpret_cast<const Int8Row*>(rows + r * planes * layout.row_bytes() + layout.inputs);
    masks[r] = 0;
    for (int64_t f = 0; f < panel_features; ++f) {
      upper[f] += terms.residual * features.norm[f];
      upper[f] += terms.norm * features.residual[f];
      masks[r] |= uint64_t{!(upper[f] < low[f])} << f;
    }
  }
}

void dot_int16(const int16_t* const* rows, int64_t count, const int16_t* w, int64_t size,
               int64_t* sums) {
  const int64_t depth = int16_depth(size);
  for (int64_t r = 0; r < count; ++r) {
    sums[r] = 0;
    for (int64_t begin = 0; begin < size; begin += depth) {
      int32_t sum = 0;
      for (int64_t i = begin; i < std::min(begin + depth, size); ++i)
        sum += int32_t{rows[r][i]} * w[i];
      sums[r] += sum;
    }
  }
}

void product_int16(const int16_t* x, const Int16Scale* scale, int64_t rows, const int16_t* w,
                   const float* w_scale, int64_t count, int64_t size, int16_t*, float* scores,
                   Ahead&) {
  const int64_t stride = int16_stride(size);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t f = 0; f < count; ++f) {
      const int16_t* row = x + r * stride;
      int64_t sum;
      dot_int16(&row, 1, w + f * stride, size, &sum);
      scores[r * panel_features + f] = static_cast<float>(sum) * (scale[r].scale * w_scale[f]);
    }
}

}  // namespace

void use_portable(CpuKernels& kernels) {
  kernels = {"portable",
             4,
             0,
             0.05,
             false,
             {dot<F32>, dot<BF16>, dot<F16>},
             {product<F32>, product<BF16>, product<F16>},
             candidates,
             {widen<F32>, widen<BF16>, widen<F16>},
             quantise_row,
             quantise_panel,
             screen_int8,
             quantise_int16,
             dot_int16,
             product_int16};
}

}  // namespace sparse_transcoder::cpu
