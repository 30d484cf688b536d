// The exact activations of a layer.
#pragma once

#include <type_traits>

#include "cpu/kernels/kernels.h"
#include "cpu/weight_copies.h"

namespace sparse_transcoder::cpu {

class ExactDot {
 public:
  explicit ExactDot(const PreparedLayer& layer)
      : dot_(active_kernels().dot[static_cast<int>(layer.dtype)]),
        weights_(static_cast<const char*>(layer.W_enc.const_data_ptr())),
        bias_(layer.bias.const_data_ptr<float>()),
        size_(layer.hidden_size),
        row_bytes_(layer.hidden_size * layer.W_enc.element_size()) {}

  // One feature's activations for up to dot_rows rows. Meanwhile the weights of the feature `next`
  // are brought into the cache.
  void activations(const float* const* x, int64_t rows, int64_t feature, int64_t next,
                   float* values) const {
    double sums[dot_rows];
    dot_(x, rows, weights(feature), weights(next), size_, sums);
    for (int64_t r = 0; r < rows; ++r) values[r] = static_cast<float>(sums[r] + bias_[feature]);
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
