// Reads back what the int8 screen's rows and panels stand for, as kernels/cpu.h lays them out.
#pragma once

#include <cstring>
#include <vector>

#include "kernels/cpu.h"

namespace int8 {

using sparse_transcoder::kernels::Int8Layout;
using sparse_transcoder::kernels::panel_features;

template <typename T>
T read(const void* from, int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const char*>(from) + i * sizeof(T), sizeof(T));
  return value;
}

// `values` approximate a vector's inputs; the product of a row's and a feature's `margin` bounds what that changes.
struct Vector {
  std::vector<double> values, margin;
};

inline Vector read_row(const Int8Layout& layout, const int8_t* row, int64_t planes) {
  Vector out = {std::vector<double>(layout.size), std::vector<double>(2 * layout.groups)};
  for (int64_t plane = 0; plane < planes; ++plane) {
    const int8_t* q = row + plane * layout.row_bytes();
    const void* scales = q + layout.inputs();
    for (int64_t i = 0; i < layout.size; ++i) out.values[i] += double{read<float>(scales, i / layout.depth)} * q[i];
    for (size_t i = 0; plane == 0 && i < out.margin.size(); ++i)
      out.margin[i] = double{read<float>(scales, layout.groups)} * q[layout.groups * layout.depth + i];
  }
  return out;
}

inline Vector read_feature(const Int8Layout& layout, const uint8_t* panel, int64_t feature) {
  Vector out = {std::vector<double>(layout.size), std::vector<double>(2 * layout.groups)};
  const void* scales = panel + panel_features * layout.inputs();
  const auto scale = [&](int64_t group) { return double{read<float>(scales, group * panel_features + feature)}; };
  const auto at = [&](int64_t i) { return panel[i / 4 * 4 * panel_features + 4 * feature + i % 4]; };
  for (int64_t i = 0; i < layout.size; ++i) out.values[i] = scale(i / layout.depth) * (at(i) - 128);
  for (size_t i = 0; i < out.margin.size(); ++i)
    out.margin[i] = scale(layout.groups) * at(layout.groups * layout.depth + static_cast<int64_t>(i));
  return out;
}

}  // namespace int8
