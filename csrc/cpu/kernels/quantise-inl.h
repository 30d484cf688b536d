// How rows and weights become int8 and int16, and what that can change. Compiled by each
// instruction set for itself.
//
// int8. A row and a feature are first rotated, y = R x and z = R w, which leaves x . w = y . z / n
// but spreads the few large inputs that rows have over n of them (QuaRot, Ashkboos et al., 2024;
// QuIP#, Tseng et al., 2024): R flips signs at random, then is a Hadamard transform, n inputs at a
// time. Then y = s q + e with integers q and one scale s, z = t p + d, and
//     y . z  =  s t (q . p)  +  e . z  +  (s q) . d
// The first term is the score: an integer product, exact in int32. By Cauchy-Schwarz the others are
// at most
//     ||e|| ||z||  +  ||s q|| ||d||,
// which the screen adds to it: what it compares is an upper bound of x . w.
//
// int16. One scale for a whole row, such that ||q_g|| <= 46340 = floor(sqrt(2^31)) for each part
// q_g of int16_depth inputs: by Cauchy-Schwarz no partial sum of q_g . p_g leaves int32, whatever
// the order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/kernels/kernels.h"

namespace sparse_transcoder::cpu {
namespace {  // internal linkage: each instruction set compiles its own

constexpr float smallest_scale =
    0x1p-100f;  // what has a smaller one is taken as zeros: all of it is residual
constexpr int lanes = 16;
// max |x[i]|, as integers: magnitudes of float32 order like their bits, and NaN is the largest.
inline float largest_magnitude(const float* x, int64_t size) {
  int32_t largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    largest = std::max(largest, bits & 0x7fffffff);
  }
  float value;
  std::memcpy(&value, &largest, sizeof(value));
  return value;
}

// The nearest integer of |x| < 2^22: added to 1.5 * 2^23 a float32 has no fraction left, and its
// low bits hold the integer.
inline int32_t nearest(float x) {
  const float shifted = x + 0x1.8p23f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  return bits - 0x4b400000;
}

// Rounds up; bounds carry relative errors of a few 2^-24 in their last steps.
inline float up(double bound) {
  return std::max(static_cast<float>(bound * (1 + 0x1p-20)), std::numeric_limits<float>::min());
}

// y = R x, n = layout.mixed. Each of its log2 n steps rounds every number once, so that y is off by
// at most log2 n 2^-24 ||R x||, doubled here for good measure.
void rotate(const Int8Layout& layout, const float* __restrict x, float* __restrict y) {
  const int64_t size = layout.size, inputs = layout.inputs;
  for (int64_t i = 0; i < size; ++i) {
    uint32_t bits, sign = static_cast<uint32_t>(i) * 0x9e3779b1u;
    sign = (sign ^ sign >> 15) * 0x85ebca77u;
    std::memcpy(&bits, x + i, sizeof(bits));
    bits ^= sign & 0x80000000u;
    std::memcpy(y + i, &bits, sizeof(bits));
  }
  std::fill(y + size, y + inputs, 0.0f);
  const auto step = [](float* __restrict a, float* __restrict b, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      const float sum = a[i] + b[i], difference = a[i] - b[i];
      a[i] = sum;
      b[i] = difference;
    }
  };
  for (int64_t half = inputs / layout.mixed; half < inputs; half *= 2)
    for (int64_t i = 0; i < inputs; i += 2 * half) step(y + i, y + i + half, half);
}

inline double rotation_roundoff(const Int8Layout& layout) {
  return std::log2(layout.mixed) * 0x1p-23;
}

// y = scale q + e. Norms are upper bounds.
struct Quantised {
  float scale;      // 0 where every integer is
  int32_t sum;      // of q
  double norm;      // of y
  double residual;  // of e
};

// y / scale is at most 127 and its norm at least that, so squares do not overflow, nor does it
// matter which underflow; it is rounded twice: off by at most 2^-22 of itself.
Quantised quantise(const float* y, int64_t size, int8_t* q) {
  const float largest = largest_magnitude(y, size), scale = largest / 127;
  if (!(scale >= smallest_scale &&
        scale <= std::numeric_limits<float>::max())) {  // too small, or not finite
    std::fill(q, q + size, int8_t{0});
    const double norm = std::sqrt(static_cast<double>(size)) * largest;
    return {0, 0, norm, norm};
  }
  const float inverse = 1 / scale;
  float squares[lanes] = {}, left[lanes] = {};
  int32_t sums[lanes] = {};
  for (int64_t i = 0; i < size; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) {
      const float value = y[i + lane] * inverse;
      const int32_t integer = nearest(value);
      const float off = value - static_cast<float>(integer);
      q[i + lane] = static_cast<int8_t>(integer);
      sums[lane] += integer;
      squares[lane] += value * value;
      left[lane] += off * off;
    }
  int32_t sum = 0;
  double value_squares = 0, off_squares = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    sum += sums[lane];
    value_squares += squares[lane];
    off_squares += left[lane];
  }
  // Each sum has at most size / lanes + 2 roundings: for the most inputs far within 2^-10, of a
  // square within 2^-11.
  const double norm = std::sqrt(value_squares) * (1 + 0x1p-10),
               off_norm = std::sqrt(off_squares) * (1 + 0x1p-10) + norm * 0x1p-22;
  return {scale, sum, scale * norm, scale * off_norm};
}

// y = scale q + (scale / 254) p + e: p takes what q leaves, 254 times of which is at most 127.
Quantised quantise_rest(const Quantised& first, const float* y, const int8_t* q, int64_t size,
                        int8_t* p) {
  const float inverse = 1 / first.scale;
  float left[lanes] = {};
  int32_t sums[lanes] = {};
  for (int64_t i = 0; i < size; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) {
      const float rest = (y[i + lane] * inverse - static_cast<float>(q[i + lane])) * 254;
      const int32_t integer = std::clamp(nearest(rest), -127, 127);
      const float off = rest - static_cast<float>(integer);
      p[i + lane] = static_cast<int8_t>(integer);
      sums[lane] += integer;
      left[lane] += off * off;
    }
  int32_t sum = 0;
  double off_squares = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    sum += sums[lane];
    off_squares += left[lane];
  }
  // The roundings of y / scale, of what q leaves, 254 times it and the second scale are each at
  // most 2^-22 of what they round.
  const float scale = first.scale / 254;
  return {scale, sum, first.norm,
          scale * std::sqrt(off_squares) * (1 + 0x1p-10) + (first.norm + first.residual) * 0x1p-21};
}

void quantise_row(const Int8Layout& layout, const float* x, int64_t planes, int8_t* row,
                  float* rotated) {
  rotate(layout, x, rotated);
  const Quantised first = quantise(rotated, layout.inputs, row);
  Quantised last = first;
  if (planes == 2) {
    int8_t* second = row + layout.row_bytes();
    if (first.scale > 0)
      last = quantise_rest(first, rotated, row, layout.inputs, second);
    else
      std::fill(second, second + layout.inputs, int8_t{0});
    const Int8Row more = {last.scale, -128 * last.sum, 0, 0};
    std::memcpy(second + layout.inputs, &more, sizeof(more));
  }
  const double off = last.residual + rotation_roundoff(layout) * last.norm;
  const Int8Row terms = {first.scale, -128 * first.sum, up(off), up(last.norm + last.residual)};
  std::memcpy(row + layout.inputs, &terms, sizeof(terms));
}

// Where input i of a feature lies in a panel, from the feature's first byte.
inline int64_t in_panel(int64_t i) { return i / 4 * 4 * panel_features + i % 4; }

void quantise_panel(const Int8Layout& layout, const float* w, int64_t count, uint8_t* panel) {
  constexpr double score_roundoff =
      32 * 0x1p-24;  // of a score, by its terms' norms: three roundings of each, and four additions
  std::vector<float> z(layout.inputs);
  std::vector<int8_t> q(layout.inputs);
  Int8Features terms = {};
  std::fill(panel, panel + panel_features * layout.inputs, uint8_t{0});
  for (int64_t f = 0; f < count; ++f) {
    rotate(layout, w + f * layout.size, z.data());
    const Quantised feature = quantise(z.data(), layout.inputs, q.data());
    for (int64_t i = 0; i < layout.inputs; i += 4) {
      uint8_t four[4];
      for (int j = 0; j < 4; ++j) four[j] = static_cast<uint8_t>(q[i + j] + 128);
      std::memcpy(panel + 4 * f + in_panel(i), four, 4);
    }
    // Divided by n, a power of two, here: scores and margins are of x . w.
    const double n = static_cast<double>(layout.mixed),
                 off = rotation_roundoff(layout) * feature.norm;
    terms.scale[f] = static_cast<float>(feature.scale / n);
    terms.norm[f] = up((feature.norm + off) / n);
    terms.residual[f] = up((feature.residual + off + score_roundoff * feature.norm) / n);
  }
  std::memcpy(panel + panel_features * layout.inputs, &terms, sizeof(terms));
}

// x = scale q + e with |q_i| <= 32767 and parts of norms up to 46340: rounding adds at most
// sqrt(depth) / 2 to a part's.
Int16Scale quantise_int16(const float* x, int64_t size, int16_t* q) {
  std::fill(q + size, q + int16_stride(size), int16_t{0});
  const float largest = largest_magnitude(x, size);
  const int64_t depth = int16_depth(size);
  const double room = 46339 - std::sqrt(static_cast<double>(depth)) / 2;
  const float down = largest >= smallest_scale ? 1 / largest : 0;
  double most = 0;
  for (int64_t begin = 0; begin < size; begin += depth) {
    const int64_t end = std::min(begin + depth, size);
    float squares[lanes] = {};
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes)
      for (int lane = 0; lane < lanes; ++lane) {
        const float y = x[i + lane] * down;
        squares[lane] += y * y;
      }
    for (int lane = 0; i < end; ++i, ++lane) squares[lane] += x[i] * down * (x[i] * down);
    double total = 0;
    for (const float some : squares) total += some;
    most = std::max(most, total);
  }
  // Of x / largest: sums of squares of at most 1, far within 2^-10 for a part's size, and 2^-22 for
  // each quotient.
  const double norm = std::sqrt(most) * (1 + 0x1p-10);
  const float scale = static_cast<float>(largest * std::max(norm / room, 1 / 32766.0));
  if (down == 0 || !(scale >= smallest_scale)) {
    std::fill(q, q + size, int16_t{0});
    return {0, up(std::sqrt(static_cast<double>(size)) * largest), 0};
  }
  const float inverse = 1 / scale;
  float left[lanes] = {};
  int64_t integer_squares = 0, i = 0;
  const auto step = [&](int64_t i, int lane) {
    const float y = x[i] * inverse;
    const int32_t integer = nearest(y);
    const float off = y - static_cast<float>(integer);
    q[i] = static_cast<int16_t>(integer);
    integer_squares += integer * integer;
    left[lane] += off * off;
  };
  for (; i + lanes <= size; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) step(i + lane, lane);
  for (int lane = 0; i < size; ++i, ++lane) step(i, lane);
  double off_squares = 0;
  for (const float part : left) off_squares += part;
  // y is off by at most 2^-22 |y|: for the few large elements that is more than rounding to an
  // integer leaves.
  const double quantised = std::sqrt(static_cast<double>(integer_squares)),
               rounding = std::sqrt(static_cast<double>(size)) / 2;
  const double residual =
      std::sqrt(off_squares) * (1 + 0x1p-10 + size * 0x1p-24) + (quantised + rounding) * 0x1p-22;
  return {scale, up(scale * residual), up(scale * quantised)};
}

}  // namespace
}  // namespace sparse_transcoder::cpu
