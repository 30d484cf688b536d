// The exact activations of a block's rows, and what they decide.
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
  // It counts in the worker's counters.
  ExactDot(const Workspace& workspace, const RowBlock& block, int64_t worker)
      : dot_(active_kernels().dot[static_cast<int>(block.layer->dtype)]),
        normed_(normed_row(workspace, block, 0)),
        weights_(static_cast<const char*>(block.layer->W_enc.const_data_ptr())),
        bias_(block.layer->bias.const_data_ptr<float>()),
        min_active_(block.layer->min_active.const_data_ptr<float>()),
        size_(block.layer->hidden_size),
        row_bytes_(size_ * block.layer->W_enc.element_size()),
        layer_(block.layer),
        counters_(*workspace.workers[worker].counters) {}

  // Computes the pairs of a list and empties it. Those that are active go to the collector (see
  // collectors.h). Consecutive pairs of one feature share what is read of it. fetches: brings the
  // next feature's weights into the cache.
  template <typename Collector>
  void compute(SurvivorList& list, bool fetches, const Collector& collector) const {
    for (int64_t i = 0, count = 0; i < list.size; i += count) {
      count = list.run_length(i);
      if (fetches && i + count < list.size)
        prefetch(weights(list.pairs[i + count].feature()), row_bytes_);
      compute(list.pairs + i, count, collector);
    }
    list.clear();
  }

  // Computes up to dot_rows pairs, all of one feature.
  template <typename Collector>
  void compute(const Survivor* pairs, int64_t count, const Collector& collector) const {
    float values[dot_rows];
    activations(pairs, count, values);
    counters_.computed += count;
    for (int64_t i = 0; i < count; ++i) decide(pairs[i], values[i], collector);
  }

  const char* weights(int64_t feature) const { return weights_ + feature * row_bytes_; }
  int64_t row_bytes() const { return row_bytes_; }

 private:
  // The exact activation alone says whether a feature is active.
  template <typename Collector>
  void decide(const Survivor& pair, float activation, const Collector& collector) const {
    counters_.ambiguous += pair.ambiguous();
    if (activation >= min_active_[pair.feature()]) {
      // The surely active ones are counted already.
      collector.active_count(pair.row()) += pair.ambiguous();
      collector.add(pair.row(), pair.feature(), activation);
    } else if (!pair.ambiguous()) {  // it was surely active
      counters_.contradicted = layer_;
    }
  }

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
  const Layer* layer_;
  Counters& counters_;
};

}  // namespace sparse_transcoder::cpu
