// Plain C++, for any machine. It defines the order of every sum.
#include <algorithm>
#include <functional>

#include "cpu/kernels/element-inl.h"
#include "cpu/kernels/gate-inl.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/list-inl.h"
#include "cpu/kernels/quantise-inl.h"

namespace sparse_transcoder::cpu {
namespace {

template <typename Element>
void dot(const float* const* x, int64_t rows, const void* weights, int64_t size, double* totals) {
  const auto* w = static_cast<const typename Element::type*>(weights);
  for (int64_t r = 0; r < rows; ++r) {
    double sums[32] = {};
    int64_t i = 0;
    for (; i + 32 <= size; i += 32)
      for (int lane = 0; lane < 32; ++lane)
        sums[lane] += double{x[r][i + lane]} * Element::widen(w[i + lane]);
    for (int lane = 0; i < size; ++i, ++lane) sums[lane] += double{x[r][i]} * Element::widen(w[i]);
    totals[r] = fold(sums);
  }
}

// Two rows times two features at a time, each with four partial sums, which compilers turn into
// vectors on any machine.
template <typename Element>
void product(const float* x, int64_t rows, const void* weights, int64_t count, int64_t size,
             float* scores) {
  const auto* w = static_cast<const typename Element::type*>(weights);
  for (int64_t f = 0; f < count; f += 2)
    for (int64_t r = 0; r < rows; r += 2) {
      // Where a pair has no second row or feature, the first is computed twice.
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

template <typename Element>
void widen(const void* stored, float* out, int64_t size) {
  const auto* from = static_cast<const typename Element::type*>(stored);
  for (int64_t i = 0; i < size; ++i) out[i] = Element::widen(from[i]);
}

void screen_int8(const Int8ScreenArgs& args, uint64_t* masks, Prefetcher&) {
  const Int8Layout& layout = args.layout;
  const auto& features =
      *reinterpret_cast<const Int8Features*>(args.panel + panel_features * layout.inputs);
  for (int64_t r = 0; r < args.row_count; ++r) {
    float upper[panel_features] = {};
    const int8_t* planes = args.rows + r * args.planes * layout.row_bytes();
    for (int64_t plane = 0; plane < args.planes; ++plane) {
      const int8_t* row = planes + plane * layout.row_bytes();
      const auto& terms = *reinterpret_cast<const Int8Row*>(row + layout.inputs);
      int32_t sums[panel_features];
      std::fill(sums, sums + panel_features, terms.start);
      for (int64_t i = 0; i < layout.inputs; i += 4) {
        const uint8_t* four = args.panel + panel_offset(i);
        for (int64_t f = 0; f < panel_features; ++f)
          for (int j = 0; j < 4; ++j) sums[f] += int32_t{four[4 * f + j]} * row[i + j];
      }
      for (int64_t f = 0; f < panel_features; ++f)
        upper[f] += static_cast<float>(sums[f]) * (terms.scale * features.scale[f]);
    }
    const auto& terms = *reinterpret_cast<const Int8Row*>(planes + layout.inputs);
    masks[r] = 0;
    for (int64_t f = 0; f < panel_features; ++f) {
      upper[f] += terms.error * features.norm[f];
      upper[f] += terms.norm * features.error[f];
      masks[r] |= uint64_t{!(upper[f] < args.surely_out_below[f])} << f;
    }
  }
}

void dot_int16(const int16_t* const* x, int64_t rows, const int16_t* w, int64_t size,
               int64_t* sums) {
  const int64_t part = int16_part_size(size);
  for (int64_t r = 0; r < rows; ++r) {
    sums[r] = 0;
    for (int64_t begin = 0; begin < size; begin += part) {
      int32_t sum = 0;
      for (int64_t i = begin; i < std::min(begin + part, size); ++i) sum += int32_t{x[r][i]} * w[i];
      sums[r] += sum;
    }
  }
}

void product_int16(const Int16ProductArgs& args, float* scores, Prefetcher&) {
  const int64_t stride = int16_stride(args.size);
  for (int64_t r = 0; r < args.row_count; ++r)
    for (int64_t f = 0; f < args.feature_count; ++f) {
      const int16_t* row = args.rows + r * stride;
      int64_t sum;
      dot_int16(&row, 1, args.features + f * stride, args.size, &sum);
      scores[r * panel_features + f] =
          static_cast<float>(sum) * (args.row_scale[r].scale * args.feature_scale[f]);
    }
}

void sort_keys(uint64_t* keys, int64_t count) { std::sort(keys, keys + count, std::greater<>()); }

}  // namespace

void use_portable(KernelTable& kernels) {
  kernels.crossovers = {.int8_rows = 4,
                        .two_planes_rows = 0,
                        .max_share_float32 = 0.05,
                        .max_share_int16 = 0.2,
                        .fast_int16 = false};
  kernels.dot[0] = dot<F32>;
  kernels.dot[1] = dot<BF16>;
  kernels.dot[2] = dot<F16>;
  kernels.product[0] = product<F32>;
  kernels.product[1] = product<BF16>;
  kernels.product[2] = product<F16>;
  kernels.gate_row = gate_row<Scalar>;
  kernels.widen[0] = widen<F32>;
  kernels.widen[1] = widen<BF16>;
  kernels.widen[2] = widen<F16>;
  kernels.quantise_row = quantise_row;
  kernels.quantise_panel = quantise_panel;
  kernels.screen_int8 = screen_int8;
  kernels.quantise_int16 = quantise_int16;
  kernels.dot_int16 = dot_int16;
  kernels.product_int16 = product_int16;
  kernels.list_survivors = list_survivors<transpose>;
  kernels.sort_keys = sort_keys;
}

}  // namespace sparse_transcoder::cpu
