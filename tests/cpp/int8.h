// Reads back what the rows and panels of the int8 screen stand for, as kernels.h lays them out.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/kernels/kernels.h"

namespace int8 {

using sparse_transcoder::panel_features;
using sparse_transcoder::cpu::Int8Features;
using sparse_transcoder::cpu::Int8Layout;
using sparse_transcoder::cpu::Int8Row;

template <typename T>
T read(const void* from, int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const char*>(from) + i * sizeof(T), sizeof(T));
  return value;
}

// `values` approximate a rotated vector's inputs: products of two such vectors are products of the
// vectors themselves. That of a row's and a feature's `margin` bounds how far they are off.
struct Vector {
  std::vector<double> values, margin;
};

inline Vector read_row(const Int8Layout& layout, const int8_t* row, int64_t planes) {
  const auto terms = [&](int64_t plane) {
    return read<Int8Row>(row + plane * layout.row_bytes() + layout.inputs, 0);
  };
  Vector out = {std::vector<double>(layout.inputs), {terms(0).error, terms(0).norm}};
  for (int64_t plane = 0; plane < planes; ++plane)
    for (int64_t i = 0; i < layout.inputs; ++i)
      out.values[i] += double{terms(plane).scale} * row[plane * layout.row_bytes() + i];
  return out;
}

inline Vector read_feature(const Int8Layout& layout, const uint8_t* panel, int64_t feature) {
  const auto terms = read<Int8Features>(panel + panel_features * layout.inputs, 0);
  Vector out = {std::vector<double>(layout.inputs), {terms.norm[feature], terms.error[feature]}};
  for (int64_t i = 0; i < layout.inputs; ++i)
    out.values[i] = double{terms.scale[feature]} *
                    (panel[i / 4 * 4 * panel_features + 4 * feature + i % 4] - 128);
  return out;
}

}  // namespace int8
