// The exact activations of a layer.
#pragma once

#include <type_traits>

#include "cpu/kernels/kernels.h"
#include "cpu/weight_copies.h"

namespace sparse_transcoder::cpu {

// Starts to bring memory into the cache.
inline void prefetch(const void* begin, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(begin) + i, 0, 2);
}

class ExactDot {
 public:
  explicit ExactDot(const PreparedLayer& layer)
      : dot_(active_kernels().dot[static_cast<int>(layer.dtype)]),
        weights_(static_cast<const char*>(layer.W_enc.const_data_ptr())),
        bias_(layer.bias.const_data_ptr<float>()),
        size_(layer.hidden_size),
        row_bytes_(layer.hidden_size * layer.W_enc.element_size()) {}

  // One feature's activations for up to dot_rows rows.
  void activations(const float* const* x, int64_t rows, int64_t feature, float* values) const {
    double sums[dot_rows];
    dot_(x, rows, weights(feature), size_, sums);
    for (int64_t r = 0; r < rows; ++r) values[r] = static_cast<float>(sums[r] + bias_[feature]);
  }
  float activation(const float* x, int64_t feature) const {
    float value;
    activations(&x, 1, feature, &value);
    return value;
  }

  const char* weights(int64_t feature) const { return weights_ + feature * row_bytes_; }
  int64_t row_bytes() const { return row_bytes_; }

 private:
  std::remove_extent_t<decltype(KernelTable::dot)> dot_;
  const char* weights_;
  const float* bias_;
  int64_t size_, row_bytes_;
};

}  // namespace sparse_transcoder::cpu
