// How rows and weights become int8 and int16, and how far that moves them. Each instruction set
// compiles these functions for itself.
//
// For int8 a row and a feature are first rotated, y = R x and z = R w. R flips signs at random,
// then applies a Hadamard transform to n inputs at a time. That leaves x . w = y . z / n and
// spreads the few large inputs of a row over n of them (QuaRot, Ashkboos et al., 2024; QuIP#, Tseng
// et al., 2024). Then y = s q + e and z = t p + d, with integers q and p and one scale each, and
//     y . z  =  s t (q . p)  +  e . z  +  (s q) . d
// The first term is the score, an integer product that is exact in int32. By Cauchy-Schwarz the
// others are at most
//     ||e|| ||z||  +  ||s q|| ||d||
// The screen adds that to the score and compares the sum, which is an upper bound of x . w.
//
// For int16 one scale serves a whole row. It is so large that ||q_g|| <= 46340 = floor(sqrt(2^31))
// for each part q_g of int16_part_size inputs. By Cauchy-Schwarz no partial sum of q_g . p_g leaves
// int32, whatever the order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "bounds.h"
#include "cpu/kernels/kernels.h"

namespace sparse_transcoder::cpu {
namespace {  // internal linkage: each instruction set compiles its own

// A row or feature with a smaller scale is taken as zeros: all of it is error.
constexpr float min_scale = 0x1p-100f;
// Partial sums of a loop, which compilers keep in vectors.
constexpr int lanes = 16;

// max |x[i]|, found in integers: magnitudes of float32 order like their bits, and NaN is the
// largest.
inline float max_magnitude(const float* x, int64_t size) {
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

// The integer nearest to x, for |x| < 2^22. A float32 that is added to 1.5 * 2^23 keeps no
// fraction, and its low bits hold the integer.
inline int32_t nearest(float x) {
  const float shifted = x + 0x1.8p23f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  return bits - 0x4b400000;
}

// A bound as float32. It is rounded up, which also pays for the few roundings of 2^-24 that it
// carries from its last steps.
inline float bound_as_float(double bound) {
  return std::max(static_cast<float>(bound * round_up), std::numeric_limits<float>::min());
}

// y = R x. Each of the log2 n steps rounds every number once, so that y is off by at most
// log2 n 2^-24 ||R x||; rotation_roundoff() is twice that.
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

// A quantised vector y = scale q + e. Norms are upper bounds.
struct Quantised {
  float scale;   // 0 where every integer is
  int32_t sum;   // of q
  double norm;   // of y
  double error;  // of e
};

// Each y / scale is at most 127, and their norm is at least that. So no square overflows, and it
// does not matter which underflow. Each is rounded twice, by at most 2^-22 of itself.
Quantised quantise(const float* y, int64_t size, int8_t* q) {
  const float max = max_magnitude(y, size), scale = max / 127;
  const bool finite = scale <= std::numeric_limits<float>::max();
  if (!(scale >= min_scale && finite)) {
    std::fill(q, q + size, int8_t{0});
    const double norm = std::sqrt(static_cast<double>(size)) * max;
    return {0, 0, norm, norm};
  }
  const float inverse = 1 / scale;
  float squares[lanes] = {}, errors[lanes] = {};
  int32_t sums[lanes] = {};
  for (int64_t i = 0; i < size; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) {
      const float value = y[i + lane] * inverse;
      const int32_t integer = nearest(value);
      const float error = value - static_cast<float>(integer);
      q[i + lane] = static_cast<int8_t>(integer);
      sums[lane] += integer;
      squares[lane] += value * value;
      errors[lane] += error * error;
    }
  int32_t sum = 0;
  double value_squares = 0, error_squares = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    sum += sums[lane];
    value_squares += squares[lane];
    error_squares += errors[lane];
  }
  // Each sum has at most size / lanes + 2 roundings. With max_inputs they change it by far less
  // than 2^-10, and its root by less than 2^-11.
  const double norm = std::sqrt(value_squares) * (1 + 0x1p-10),
               error_norm = std::sqrt(error_squares) * (1 + 0x1p-10) + norm * 0x1p-22;
  return {scale, sum, scale * norm, scale * error_norm};
}

// The second plane: y = scale q + (scale / 254) p + e. p holds what q leaves, which is at most
// 127 / 254 of the scale.
Quantised quantise_rest(const Quantised& first, const float* y, const int8_t* q, int64_t size,
                        int8_t* p) {
  const float inverse = 1 / first.scale;
  float errors[lanes] = {};
  int32_t sums[lanes] = {};
  for (int64_t i = 0; i < size; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) {
      const float rest = (y[i + lane] * inverse - static_cast<float>(q[i + lane])) * 254;
      const int32_t integer = std::clamp(nearest(rest), -127, 127);
      const float error = rest - static_cast<float>(integer);
      p[i + lane] = static_cast<int8_t>(integer);
      sums[lane] += integer;
      errors[lane] += error * error;
    }
  int32_t sum = 0;
  double error_squares = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    sum += sums[lane];
    error_squares += errors[lane];
  }
  // Four numbers are rounded: y / scale, what q leaves, 254 times that, and the second scale. Each
  // changes by at most 2^-22 of itself.
  const float scale = first.scale / 254;
  return {scale, sum, first.norm,
          scale * std::sqrt(error_squares) * (1 + 0x1p-10) + (first.norm + first.error) * 0x1p-21};
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
    const Int8Row terms = {last.scale, -128 * last.sum, 0, 0};
    std::memcpy(second + layout.inputs, &terms, sizeof(terms));
  }
  const double error = last.error + rotation_roundoff(layout) * last.norm;
  const Int8Row terms = {first.scale, -128 * first.sum, bound_as_float(error),
                         bound_as_float(last.norm + last.error)};
  std::memcpy(row + layout.inputs, &terms, sizeof(terms));
}

// Where input i of a feature lies in a panel, counted from the feature's first byte.
inline int64_t panel_offset(int64_t i) { return i / 4 * 4 * panel_features + i % 4; }

void quantise_panel(const Int8Layout& layout, const float* w, int64_t count, uint8_t* panel) {
  // The rounding of a score per product of norms: three roundings of each of two planes' terms and
  // four additions, see "int8" in docs/exactness.md.
  constexpr double score_rounding = 32 * unit_roundoff;
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
      std::memcpy(panel + 4 * f + panel_offset(i), four, 4);
    }
    // Everything is divided by n here, a power of two, so that scores and margins are those of x .
    // w.
    const double n = static_cast<double>(layout.mixed),
                 rotation_error = rotation_roundoff(layout) * feature.norm;
    terms.scale[f] = static_cast<float>(feature.scale / n);
    terms.norm[f] = bound_as_float((feature.norm + rotation_error) / n);
    terms.error[f] =
        bound_as_float((feature.error + rotation_error + score_rounding * feature.norm) / n);
  }
  std::memcpy(panel + panel_features * layout.inputs, &terms, sizeof(terms));
}

// Int16 numbers x = scale q + e with |q_i| <= 32767, whose parts have norms of at most 46340.
// Rounding to integers adds at most sqrt(part size) / 2 to the norm of a part.
Int16Scale quantise_int16(const float* x, int64_t size, int16_t* q) {
  std::fill(q + size, q + int16_stride(size), int16_t{0});
  const float max = max_magnitude(x, size);
  const int64_t part_size = int16_part_size(size);
  const double room = 46339 - std::sqrt(static_cast<double>(part_size)) / 2;
  const float down = max >= min_scale ? 1 / max : 0;
  double max_squares = 0;
  for (int64_t begin = 0; begin < size; begin += part_size) {
    const int64_t end = std::min(begin + part_size, size);
    float squares[lanes] = {};
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes)
      for (int lane = 0; lane < lanes; ++lane) {
        const float y = x[i + lane] * down;
        squares[lane] += y * y;
      }
    for (int lane = 0; i < end; ++i, ++lane) squares[lane] += x[i] * down * (x[i] * down);
    double total = 0;
    for (const float part : squares) total += part;
    max_squares = std::max(max_squares, total);
  }
  // The norm of x / max over one part. Its squares are at most 1: for the size of a part their sum
  // is rounded by far less than 2^-10, and each quotient by 2^-22.
  const double norm = std::sqrt(max_squares) * (1 + 0x1p-10);
  const float scale = static_cast<float>(max * std::max(norm / room, 1 / 32766.0));
  if (down == 0 || !(scale >= min_scale)) {
    std::fill(q, q + size, int16_t{0});
    return {0, bound_as_float(std::sqrt(static_cast<double>(size)) * max), 0};
  }
  const float inverse = 1 / scale;
  float errors[lanes] = {};
  int64_t integer_squares = 0, i = 0;
  const auto step = [&](int64_t i, int lane) {
    const float y = x[i] * inverse;
    const int32_t integer = nearest(y);
    const float error = y - static_cast<float>(integer);
    q[i] = static_cast<int16_t>(integer);
    integer_squares += integer * integer;
    errors[lane] += error * error;
  };
  for (; i + lanes <= size; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) step(i + lane, lane);
  for (int lane = 0; i < size; ++i, ++lane) step(i, lane);
  double error_squares = 0;
  for (const float part : errors) error_squares += part;
  // Each y is off by at most 2^-22 |y|. For the few large elements that is more than rounding to an
  // integer leaves.
  const double quantised = std::sqrt(static_cast<double>(integer_squares)),
               rounding = std::sqrt(static_cast<double>(size)) / 2;
  const double error =
      std::sqrt(error_squares) * (1 + 0x1p-10 + size * 0x1p-24) + (quantised + rounding) * 0x1p-22;
  return {scale, bound_as_float(scale * error), bound_as_float(scale * quantised)};
}

}  // namespace
}  // namespace sparse_transcoder::cpu
