// NEON with the dot product extension: Arm's processors since 2018, Apple's since the M1, Graviton
// since the second. This file is compiled with that flag and called only where the machine has it.
#include <arm_neon.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "cpu/kernels/kernels.h"

namespace sparse_transcoder::cpu {
namespace {

constexpr int panel_vectors = panel_features / 4;  // of four features
constexpr int64_t max_rows = 4;

// Four weights of each of four features. They are stored as w + 128. Flipping the highest bit
// leaves w as int8, so the sums need no Int8Row::start.
int8x16_t load_weights(const uint8_t* w) {
  return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w), vdupq_n_u8(0x80)));
}

// Adds one strip of rows times some inputs of a panel to the sums. The sums of a few features stay
// in registers: sixteen, beside the inputs of each row and a weight. A single row takes the panel
// in the order of memory.
template <int rows>
void add_part(const int8_t* x, int64_t stride, const uint8_t* w, int64_t inputs,
              int32x4_t (*sums)[panel_vectors], Prefetcher& prefetcher, int64_t lines) {
  constexpr int vectors = rows == 1 ? 16 : rows == 2 ? 8 : 4;
  for (int first = 0; first < panel_vectors; first += vectors) {
    int32x4_t sum[rows][vectors];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sum[r][v] = sums[r][first + v];
    const uint8_t* weights = w + 16 * first;
    for (int64_t i = 0; i < inputs; i += 16, weights += 16 * panel_features) {
      if (first == 0) prefetcher.fetch(lines);
      int8x16_t xv[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) xv[r] = vld1q_s8(x + r * stride + i);
      const auto step = [&]<int four>(std::integral_constant<int, four>) {
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) {
          const int8x16_t wv = load_weights(weights + 4 * panel_features * four + 16 * v);
#pragma GCC unroll 4
          for (int r = 0; r < rows; ++r) sum[r][v] = vdotq_laneq_s32(sum[r][v], wv, xv[r], four);
        }
      };
      step(std::integral_constant<int, 0>());
      step(std::integral_constant<int, 1>());
      step(std::integral_constant<int, 2>());
      step(std::integral_constant<int, 3>());
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sums[r][first + v] = sum[r][v];
  }
}

// What all strips of a call have in common.
struct Strips {
  const Int8ScreenArgs& args;
  Prefetcher& prefetcher;
  const int64_t lines;  // to prefetch per step
};

// One strip of rows, with all their planes, times a panel.
template <int rows>
void screen_strip(const Strips& strips, const int8_t* x, uint64_t* masks) {
  constexpr int64_t depth = 256;  // inputs of a panel that stay in L1 while its features pass
  const Int8Layout& layout = strips.args.layout;
  const int64_t stride = layout.row_bytes(), planes = strips.args.planes;
  const uint8_t* panel = strips.args.panel;
  const auto& features =
      *reinterpret_cast<const Int8Features*>(panel + panel_features * layout.inputs);
  const auto terms = [&](int64_t r) -> const Int8Row& {
    return *reinterpret_cast<const Int8Row*>(x + r * stride + layout.inputs);
  };
  int32x4_t sums[rows][panel_vectors];
  for (int r = 0; r < rows; ++r) std::fill_n(sums[r], panel_vectors, vdupq_n_s32(0));
  for (int64_t i = 0; i < layout.inputs; i += depth)
    add_part<rows>(x + i, stride, panel + panel_features * i, std::min(depth, layout.inputs - i),
                   sums, strips.prefetcher, strips.lines);
  for (int64_t r = 0; r < rows; r += planes) {
    uint64_t mask = 0;
    for (int v = 0; v < panel_vectors; ++v) {
      // Nothing is fused, so that the masks are those of the portable loop.
      float32x4_t upper = vdupq_n_f32(0);
      for (int64_t plane = 0; plane < planes; ++plane)
        upper = vaddq_f32(upper, vmulq_f32(vcvtq_f32_s32(sums[r + plane][v]),
                                           vmulq_n_f32(vld1q_f32(features.scale + 4 * v),
                                                       terms(r + plane).scale)));
      upper = vaddq_f32(upper, vmulq_n_f32(vld1q_f32(features.norm + 4 * v), terms(r).error));
      upper = vaddq_f32(upper, vmulq_n_f32(vld1q_f32(features.error + 4 * v), terms(r).norm));
      // A NaN is not below, so it passes.
      const uint32x4_t below = vcltq_f32(upper, vld1q_f32(strips.args.surely_out_below + 4 * v));
      constexpr uint32x4_t bits = {1, 2, 4, 8};
      mask |= uint64_t{vaddvq_u32(vbicq_u32(bits, below))} << 4 * v;
    }
    masks[r / planes] = mask;
  }
}

void screen_int8(const Int8ScreenArgs& args, uint64_t* masks, Prefetcher& prefetcher) {
  static constexpr void (*of_rows[max_rows])(const Strips&, const int8_t*, uint64_t*) = {
      screen_strip<1>, screen_strip<2>, screen_strip<3>, screen_strip<4>};
  const int64_t count = args.row_count * args.planes;
  const int64_t steps = args.layout.inputs / 16 * ((count + max_rows - 1) / max_rows);
  const Strips strips = {args, prefetcher, (prefetcher.lines() + steps - 1) / steps};
  for (int64_t r = 0; r < count; r += max_rows)
    of_rows[std::min(max_rows, count - r) - 1](strips, args.rows + r * args.layout.row_bytes(),
                                               masks + r / args.planes);
}

}  // namespace

void use_neondot(KernelTable& kernels) {
  // Not measured on Arm. For four rows gcc makes 7 instructions of 64 products here, and 27 of
  // those of the float32 product, which reads four times the bytes. The shares stay those of the
  // portable loops.
  kernels.crossovers.int8_rows = std::numeric_limits<int64_t>::max();
  kernels.screen_int8 = screen_int8;
}

}  // namespace sparse_transcoder::cpu
