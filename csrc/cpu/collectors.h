// What becomes of the active features that a scan finds. A collector belongs to one worker and one
// RowBlock. It has:
//
//   active_count(row)          the row's counter of active features
//   min_value(row)             a score, without its bias, surely under this is of no use
//   defer(row, feature)        takes a surely active feature before it is computed, or says false
//   add(row, feature, value)   takes an active feature and its activation
#pragma once

#include <limits>

#include "bounds.h"
#include "cpu/exact_dot.h"

namespace sparse_transcoder::cpu {

constexpr float infinity = std::numeric_limits<float>::infinity();

// Keeps the k best of each row in the worker's reservoirs.
class TopKCollector {
 public:
  TopKCollector(const Workspace& workspace, const RowBlock& block, int64_t worker)
      : block_(block),
        reservoirs_(&reservoir(workspace, block, 0, worker)),
        stride_(workspace.plan.workers),
        exact_(workspace, block, worker) {}

  int64_t& active_count(int64_t row) const { return reservoir_of(row).active_count; }

  float min_value(int64_t row) const {
    const double value = reservoir_of(row).min_activation();
    if (value <= 0) return -infinity;
    return static_cast<float>(value - (value + block_.layer->max_bias) * kth_best_rounding -
                              underflow(block_.layer->hidden_size));
  }

  bool defer(int64_t row, const DeferredFeature& feature) const {
    if (reservoir_of(row).defer(feature)) return true;
    compute_deferred(row);
    return false;
  }

  void add(int64_t row, int64_t feature, float value) const {
    reservoir_of(row).add(make_key(value, feature));
  }

 private:
  Reservoir& reservoir_of(int64_t row) const { return reservoirs_[row * stride_]; }

  // Turns the deferred features of a row into keys.
  void compute_deferred(int64_t row) const {
    Reservoir& reservoir = reservoir_of(row);
    const DeferredFeature* deferred = reservoir.deferred;
    for (int64_t i = 0; i < reservoir.deferred_count; ++i) {
      if (i + 1 < reservoir.deferred_count)
        prefetch(exact_.weights(deferred[i + 1].feature), exact_.row_bytes());
      const Survivor pair(row, deferred[i].feature, false);
      exact_.compute(&pair, 1, *this);
    }
    reservoir.deferred_count = 0;
  }

  const RowBlock& block_;
  Reservoir* const reservoirs_;  // the worker's, of the block's first row; rows are stride_ apart
  const int64_t stride_;
  const ExactDot exact_;
};

// What collectors that do not rank features share.
struct RowCollector {
  const Workspace& workspace;
  const RowBlock& block;
  const int64_t worker;

  int64_t& active_count(int64_t row) const {
    return reservoir(workspace, block, row, worker).active_count;
  }
};

// Counts the active features of each row and keeps none.
struct CountCollector : RowCollector {
  float min_value(int64_t) const { return infinity; }
  bool defer(int64_t, const DeferredFeature&) const { return true; }
  void add(int64_t, int64_t, float) const {}
};

// Takes every active feature of a row to the worker's entries, while there is room.
struct GatherCollector : RowCollector {
  float min_value(int64_t) const { return -infinity; }
  bool defer(int64_t, const DeferredFeature&) const { return false; }
  void add(int64_t row, int64_t feature, float value) const {
    const WorkerBuffers& buffers = workspace.workers[worker];
    EntryCount& count = *buffers.entry_count;
    count.full |= count.used == workspace.plan.entry_capacity();
    if (count.full) return;
    buffers.entries[count.used++] = {static_cast<int32_t>(row), static_cast<uint32_t>(feature),
                                     value};
  }
};

// Writes every active feature to its entry. One worker scans all features of a row, so that they
// come in ascending order.
struct WriteCollector : RowCollector {
  float min_value(int64_t) const { return -infinity; }
  bool defer(int64_t, const DeferredFeature&) const { return false; }
  void add(int64_t row, int64_t feature, float value) const {
    const SparseFeatures& out = block.request->sparse;
    const int64_t* row_begin = out.row_begin.const_data_ptr<int64_t>() + block.first_row + row;
    const int64_t entry = row_begin[0] + reservoir(workspace, block, row, worker).written++;
    // Who changes the hidden states while they are encoded may make more entries than were counted.
    if (entry >= row_begin[1]) return;
    out.features.mutable_data_ptr<int64_t>()[entry] = feature;
    out.activations.mutable_data_ptr<float>()[entry] = value;
  }
};

}  // namespace sparse_transcoder::cpu
