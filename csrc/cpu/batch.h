// Rows that go through the stages together: as many blocks, of one layer or of many, as the
// workspace has rows for.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "cpu/thread_pool.h"
#include "cpu/workspace.h"

namespace sparse_transcoder::cpu {

// Workers of one call. Options::lanes is obeyed. Where it leaves the choice, torch's thread count
// of the moment bounds them, and a caller that is itself one of torch's threads works alone.
inline int64_t call_workers(const Plan& plan) {
  if (plan.lanes_chosen) return plan.workers;
  return at::in_parallel_region() ? 1 : std::min<int64_t>(plan.workers, at::get_num_threads());
}

// Runs the stages of a batch on the workers. Tasks are computed from their numbers, and handed over
// by reference, so that nothing is allocated.
class Batch {
 public:
  // blocks: in the order of their workspace rows. ranges_per_block: 0 chooses.
  Batch(const std::vector<RowBlock>& blocks, const Workspace& workspace, ThreadPool& threads,
        int64_t ranges_per_block = 0)
      : blocks_(blocks),
        workspace_(workspace),
        threads_(threads),
        awake_(threads),
        workers_(call_workers(workspace.plan)),
        row_count_(blocks.back().workspace_row + blocks.back().row_count),
        ranges_per_block_(ranges_per_block > 0 ? ranges_per_block : choose_ranges()) {}

  int64_t ranges_per_block() const { return ranges_per_block_; }

  // body(position) for every block.
  template <typename Body>
  void for_blocks(const Body& body) const {
    threads_.run(workers_, blocks_.size(), [&](int64_t, int64_t position) { body(position); });
  }

  // body(worker, block, first, last) for all rows, in pieces [first, last) of one block.
  template <typename Body>
  void for_rows(const Body& body) const {
    // Enough tasks to keep every worker busy; many rows per task share what is read of a feature.
    const int64_t rows_per_task = std::clamp<int64_t>(row_count_ / (4 * workers_), 16, 256);
    const int64_t task_count = (row_count_ + rows_per_task - 1) / rows_per_task;
    const auto rows_of = [&](int64_t worker, int64_t task) {
      const int64_t end = std::min((task + 1) * rows_per_task, row_count_);
      for (int64_t row = task * rows_per_task; row < end;) {
        const RowBlock& block = block_of(row);
        const int64_t last = std::min(end, block.workspace_row + block.row_count);
        body(worker, block, row - block.workspace_row, last - block.workspace_row);
        row = last;
      }
    };
    threads_.run(workers_, task_count, std::cref(rows_of));
  }

  // body(worker, range) for all features of every block.
  template <typename Body>
  void for_features(const Body& body) const {
    const int64_t task_count = static_cast<int64_t>(blocks_.size()) * ranges_per_block_;
    const auto features_of = [&](int64_t worker, int64_t task) {
      const RowBlock& block = blocks_[task / ranges_per_block_];
      const int64_t number = task % ranges_per_block_;
      const FeatureRange range = {&block, range_begin(block, number),
                                  range_begin(block, number + 1), task};
      if (range.first < range.last) body(worker, range);
    };
    threads_.run(workers_, task_count, std::cref(features_of));
  }

 private:
  // Enough to keep every worker busy to the end, even if other work slows one down.
  int64_t choose_ranges() const {
    const auto block_count = static_cast<int64_t>(blocks_.size());
    return std::max<int64_t>(4, (4 * workers_ + block_count - 1) / block_count);
  }

  const RowBlock& block_of(int64_t workspace_row) const {
    const auto after = std::upper_bound(
        blocks_.begin(), blocks_.end(), workspace_row,
        [](int64_t row, const RowBlock& block) { return row < block.workspace_row; });
    return *std::prev(after);
  }

  // Ranges become smaller and smaller, so that the workers end together.
  int64_t range_begin(const RowBlock& block, int64_t number) const {
    const int64_t features = block.layer->features, n = ranges_per_block_, left = n - number;
    const int64_t panels = (features + panel_features - 1) / panel_features;
    return std::min((panels - left * left * panels / (n * n)) * panel_features, features);
  }

  const std::vector<RowBlock>& blocks_;
  const Workspace& workspace_;
  ThreadPool& threads_;
  const ThreadPool::Awake awake_;  // from one stage to the next
  const int64_t workers_, row_count_, ranges_per_block_;
};

}  // namespace sparse_transcoder::cpu
