// The exact activations of a block's rows.
#pragma once

#include <type_traits>

#include "cpu/workspace.h"

namespace sparse_transcoder::cpu {

// Starts to bring memory into the cache.
inline void prefetch(const void* begin, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(begin) + i, 0, 2);
}

class ExactDot {
 public:
  ExactDot(const Workspace& workspace, const RowBlock& block)
      : dot_(active_kernels().dot[static_cast<int>(block.layer->dtype)]),
        normed_(normed_row(workspace, block, 0)),
        weights_(static_cast<const char*>(block.layer->W_enc.const_data_ptr())),
        bias_(block.layer->bias.const_data_ptr<float>()),
        min_active_(block.layer->min_active.const_data_ptr<float>()),
        size_(block.layer->hidden_size),
        row_bytes_(size_ * block.layer->W_enc.element_size()) {}

  // Computes the pairs of a list and empties it: take(pair, activation). Consecutive pairs of one
  // feature share what is read of it. fetches: brings the next feature's weights into the cache.
  template <typename Take>
  void compute(SurvivorList& list, bool fetches, const Take& take) const {
    for (int64_t i = 0, count = 0; i < list.size; i += count) {
      count = list.run_length(i);
      if (fetches && i + count < list.size)
        prefetch(weights(list.pairs[i + count].feature()), row_bytes_);
      float values[dot_rows];
      activations(list.pairs + i, count, values);
      for (int64_t j = 0; j < count; ++j) take(list.pairs[i + j], values[j]);
    }
    list.clear();
  }

  float activation(int64_t row, int64_t feature) const {
    const Survivor pair(row, feature, false);
    float value;
    activations(&pair, 1, &value);
    return value;
  }

  // Whether an exact activation makes its feature active. Nothing else decides it.
  bool is_active(int64_t feature, float activation) const {
    return activation >= min_active_[feature];
  }

  const char* weights(int64_t feature) const { return weights_ + feature * row_bytes_; }
  int64_t row_bytes() const { return row_bytes_; }

 private:
  // The activations of up to dot_rows pairs, all of one feature.
  void activations(const Survivor* pairs, int64_t count, float* values) const {
    const int64_t feature = pairs->feature();
    const float* x[dot_rows];
    for (int64_t i = 0; i < count; ++i) x[i] = normed_ + pairs[i].row() * size_;
    double sums[dot_rows];
    dot_(x, count, weights(feature), size_, sums);
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(sums[i] + bias_[feature]);
  }

  std::remove_extent_t<decltype(KernelTable::dot)> dot_;
  const float* normed_;
  const char* weights_;
  const float* bias_;
  const float* min_active_;
  int64_t size_, row_bytes_;
};

}  // namespace sparse_transcoder::cpu
