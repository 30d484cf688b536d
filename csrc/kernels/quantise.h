// How rows and weights become int8 and int16, and what that can change. Compiled by each instruction set for itself.
//
// int8. Group g of a row x has a scale s_g and integers q_g with x_g = s_g q_g + e_g; weights likewise, w_g = t_g p_g + d_g. So
//     x . w  =  sum_g s_g t_g (q_g . p_g)  +  sum_g e_g . w_g  +  sum_g (s_g q_g) . d_g
// The first sum is the score: integer products, exact in int32, then at most 2 groups + 1 float32 additions. By Cauchy-Schwarz,
// group by group, the others are at most
//     sum_g ||e_g|| ||w_g||  +  sum_g ||s_g q_g|| ||d_g||,
// itself a dot product of 2 * groups non-negative numbers of the row with as many of the feature. Those are rounded up to int8
// and uint8 and appended as one more group: what the screen adds up is an upper bound of x . w. The first factor is taken 128
// times, the second divided by it, so that both halves are of one size (a residual is about 1/160 of its vector).
//
// int16. One scale for a whole row, such that ||q|| <= 46340 = floor(sqrt(2^31)): by Cauchy-Schwarz no partial sum of q . p
// leaves int32, whatever the order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu.h"

namespace sparse_transcoder::kernels {
namespace {  // internal linkage: each instruction set compiles its own

constexpr float smallest_scale = 0x1p-100f;  // a group under 127 times this is taken as zeros: all of it is residual
constexpr int lanes = 16;
constexpr double margin_balance = 128;

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

// The nearest integer of |x| < 2^22: added to 1.5 * 2^23 a float32 has no fraction left, and its low bits hold the integer.
inline int32_t nearest(float x) {
  const float shifted = x + 0x1.8p23f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  return bits - 0x4b400000;
}

// Rounds up; bounds carry relative errors of a few 2^-24 in their last steps.
inline float up(double bound) { return std::max(static_cast<float>(bound * (1 + 0x1p-20)), std::numeric_limits<float>::min()); }

// What a group's integers stand for. Norms are upper bounds.
struct Group {
  float scale;      // 0 where every integer is
  double norm;      // of x_g
  double residual;  // of e_g
  int32_t squares;  // q . q
  int32_t sum;      // of q
};

// y = x / scale is at most 127, so its squares neither overflow nor underflow. y is rounded twice: off by at most 2^-22 |y|.
// rest, where given, receives y - q.
inline Group quantise_group(const float* x, int64_t size, int8_t* q, float* rest) {
  const float largest = largest_magnitude(x, size), scale = largest / 127;
  if (!(scale >= smallest_scale && std::isfinite(scale))) {  // all of it is residual
    std::fill(q, q + size, int8_t{0});
    if (rest) std::fill(rest, rest + size, 0.0f);
    const double norm = std::sqrt(static_cast<double>(size)) * largest;
    return {0, norm, norm, 0, 0};
  }
  const float inverse = 1 / scale;
  float squares[lanes] = {}, left[lanes] = {};
  int32_t integer_squares = 0, sum = 0;
  const auto step = [&](int64_t i, int lane) {
    const float y = x[i] * inverse;
    const int32_t integer = nearest(y);
    const float off = y - static_cast<float>(integer);
    q[i] = static_cast<int8_t>(integer);
    if (rest) rest[i] = off;
    integer_squares += integer * integer;
    sum += integer;
    squares[lane] += y * y;
    left[lane] += off * off;
  };
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) step(i + lane, lane);
  for (int lane = 0; i < size; ++i, ++lane) step(i, lane);
  double y_squares = 0, off_squares = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    y_squares += squares[lane];
    off_squares += left[lane];
  }
  // Each sum has at most size / lanes + 2 roundings a lane: far within 2^-10.
  const double y_norm = std::sqrt(y_squares) * (1 + 0x1p-10),
               off_norm = std::sqrt(off_squares) * (1 + 0x1p-10) + y_norm * 0x1p-22;
  return {scale, scale * y_norm, scale * off_norm, integer_squares, sum};
}

// Integers n_i >= values[i] / scale of at most `most`; returns the scale, rounded up so far that a float32 product with it is no
// smaller. A value that is not finite makes the scale so, which rules nothing out.
template <typename Integer>
float quantise_up(const double* values, int64_t size, int most, Integer* out, int64_t (*place)(int64_t)) {
  double largest = 0;
  for (int64_t i = 0; i < size; ++i) largest = std::max(largest, values[i]);
  const float scale = std::max(up(largest / most), smallest_scale);
  for (int64_t i = 0; i < size; ++i)
    out[place(i)] = static_cast<Integer>(std::min<double>(most, std::ceil(values[i] * (1 + 0x1p-30) / scale)));
  return up(scale);
}

inline int64_t in_row(int64_t i) { return i; }
// Where input i of a feature lies in a panel, from the feature's first byte.
inline int64_t in_panel(int64_t i) { return i / 4 * 4 * panel_features + i % 4; }

struct Int8Row {
  int8_t* inputs;
  float* scales;
  int32_t* starts;

  Int8Row(const Int8Layout& layout, int8_t* row)
      : inputs(row),
        scales(reinterpret_cast<float*>(row + layout.inputs())),
        starts(reinterpret_cast<int32_t*>(scales + layout.groups + 1)) {
    std::fill(row, row + layout.row_bytes(), int8_t{0});
  }
};

// x_g = s q + (s / 254) p + e: p takes what q leaves, 254 times of which is at most 127. Group with the norms of both.
inline Group quantise_rest(const Group& first, const float* rest, int64_t size, int8_t* p) {
  const float scale = first.scale / 254;
  int32_t sum = 0, squares = 0;
  double left = 0;
  for (int64_t i = 0; i < size; ++i) {
    const float y = rest[i] * 254;
    const int32_t integer = std::clamp(nearest(y), -127, 127);
    const double off = static_cast<double>(y) - integer;
    p[i] = static_cast<int8_t>(integer);
    sum += integer;
    squares += integer * integer;
    left += off * off;
  }
  // The roundings of y, of rest * 254 and of the scale are each at most 2^-22 of what they round.
  const double norm = scale * std::sqrt(static_cast<double>(squares));
  return {scale, norm, scale * std::sqrt(left) * (1 + 0x1p-20) + (first.norm + norm) * 0x1p-21, squares, sum};
}

inline double quantised_norm(const Group& group) { return group.scale * std::sqrt(static_cast<double>(group.squares)); }

void quantise_row(const Int8Layout& layout, const float* x, int64_t planes, int8_t* out, double* bounds) {
  const Int8Row row(layout, out), second(layout, out + (planes - 1) * layout.row_bytes());  // the same one with a single plane
  float rest[Int8Layout::most_depth];
  for (int64_t g = 0; g < layout.groups; ++g) {
    const int64_t begin = g * layout.depth, size = std::clamp<int64_t>(layout.size - begin, 0, layout.depth);
    const Group group = quantise_group(x + begin, size, row.inputs + begin, rest);
    row.scales[g] = group.scale;
    row.starts[g] = -128 * group.sum;
    bounds[g] = group.residual * margin_balance;
    bounds[layout.groups + g] = quantised_norm(group);
    if (planes == 1 || group.scale == 0) continue;
    const Group more = quantise_rest(group, rest, size, second.inputs + begin);
    second.scales[g] = more.scale;
    second.starts[g] = -128 * more.sum;
    bounds[g] = more.residual * margin_balance;
    bounds[layout.groups + g] += more.norm;
  }
  row.scales[layout.groups] = quantise_up(bounds, 2 * layout.groups, 127, row.inputs + layout.groups * layout.depth, in_row);
}

void quantise_panel(const Int8Layout& layout, const float* w, int64_t count, uint8_t* panel, double* bounds) {
  // Each term of the score is rounded three times and added twice a group, with two planes; their norms add up to |terms|.
  const double roundings = (4 * layout.groups + 32) * 0x1p-24;
  auto* scales = reinterpret_cast<float*>(panel + panel_features * layout.inputs());
  std::fill(panel, panel + layout.panel_bytes(), uint8_t{0});
  for (int64_t f = 0; f < count; ++f) {
    uint8_t* feature = panel + 4 * f;
    for (int64_t g = 0; g < layout.groups; ++g) {
      const int64_t begin = g * layout.depth, size = std::clamp<int64_t>(layout.size - begin, 0, layout.depth);
      int8_t q[Int8Layout::most_depth] = {};
      const Group group = quantise_group(w + f * layout.size + begin, size, q, nullptr);
      for (int64_t i = 0; i < layout.depth; i += 4) {
        uint8_t four[4];
        for (int j = 0; j < 4; ++j) four[j] = static_cast<uint8_t>(q[i + j] + 128);
        std::memcpy(feature + in_panel(begin + i), four, 4);
      }
      scales[g * panel_features + f] = group.scale;
      bounds[g] = group.norm / margin_balance;
      bounds[layout.groups + g] = group.residual + roundings * quantised_norm(group);
    }
    scales[layout.groups * panel_features + f] =
        quantise_up(bounds, 2 * layout.groups, 255, feature + in_panel(layout.groups * layout.depth), in_panel);
  }
}

// x = scale q + e with ||q|| <= 46340 and |q_i| <= 32767: rounding adds at most sqrt(size) / 2 to a norm.
Int16Scale quantise_int16(const float* x, int64_t size, int16_t* q) {
  std::fill(q + size, q + int16_stride(size), int16_t{0});
  const float largest = largest_magnitude(x, size);
  const double room = 46339 - std::sqrt(static_cast<double>(size)) / 2;
  float squares[lanes] = {};
  const float down = largest >= smallest_scale ? 1 / largest : 0;
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) {
      const float y = x[i + lane] * down;
      squares[lane] += y * y;
    }
  for (int lane = 0; i < size; ++i, ++lane) squares[lane] += x[i] * down * (x[i] * down);
  double total = 0;
  for (const float part : squares) total += part;
  // Of x / largest: sums of squares of at most 1, far within 2^-10 for any size that fits a memory, and 2^-22 for each quotient.
  const double norm = std::sqrt(total) * (1 + 0x1p-10 + size * 0x1p-24);
  const float scale = static_cast<float>(largest * std::max(norm / room, 1 / 32766.0));
  if (down == 0 || !(room > 0) || !(scale >= smallest_scale)) {
    std::fill(q, q + size, int16_t{0});
    return {0, up(std::sqrt(static_cast<double>(size)) * largest), 0};
  }
  const float inverse = 1 / scale;
  float left[lanes] = {};
  int64_t integer_squares = 0;
  const auto step = [&](int64_t i, int lane) {
    const float y = x[i] * inverse;
    const int32_t integer = nearest(y);
    const float off = y - static_cast<float>(integer);
    q[i] = static_cast<int16_t>(integer);
    integer_squares += integer * integer;
    left[lane] += off * off;
  };
  for (i = 0; i + lanes <= size; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) step(i + lane, lane);
  for (int lane = 0; i < size; ++i, ++lane) step(i, lane);
  double off_squares = 0;
  for (const float part : left) off_squares += part;
  // y is off by at most 2^-22 |y|: for the few large elements that is more than rounding to an integer leaves.
  const double quantised = std::sqrt(static_cast<double>(integer_squares)), rounding = std::sqrt(static_cast<double>(size)) / 2;
  const double residual = std::sqrt(off_squares) * (1 + 0x1p-10 + size * 0x1p-24) + (quantised + rounding) * 0x1p-22;
  return {scale, up(scale * residual), up(scale * quantised)};
}

}  // namespace
}  // namespace sparse_transcoder::kernels
