#include "cpu/finish_rows.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <functional>
#include <limits>

#include "cpu/collectors.h"

namespace sparse_transcoder::cpu {
namespace {

constexpr float quiet_nan = std::numeric_limits<float>::quiet_NaN();

// Takes what is computed late to the row's merged reservoir.
struct MergedCollector : RowCollector {
  void add(int64_t row, int64_t feature, float value) const {
    reservoir(workspace, block, row, worker).add(make_key(value, feature));
  }
};

// What is deferred of some rows, and is computed feature by feature.
class DeferredPairs {
 public:
  DeferredPairs(const Workspace& workspace, const RowBlock& block, int64_t worker)
      : workspace_(workspace),
        block_(block),
        buffers_(workspace.workers[worker]),
        exact_(workspace, block, worker),
        merged_{{workspace, block, 0}},
        pairs_{buffers_.survivors},
        sorted_{buffers_.survivors + workspace.plan.survivor_capacity()} {}

  void add(int64_t row, int64_t feature) {
    if (pairs_.size == workspace_.plan.survivor_capacity()) compute();
    pairs_.push({row, feature, false});
  }

  // The activations go to the reservoirs of worker 0.
  void compute() {
    if (pairs_.size == 0) return;
    sort_by_feature();
    exact_.compute(pairs_, true, merged_);
  }

 private:
  void sort_by_feature() {
    for (int shift = 0; block_.layer->features >> shift > 0; shift += SurvivorList::digit_bits) {
      pairs_.move_by(sorted_, buffers_.positions, SurvivorList::digits, [&](const Survivor& pair) {
        return pair.feature() >> shift & (SurvivorList::digits - 1);
      });
      std::swap(pairs_, sorted_);
    }
  }

  const Workspace& workspace_;
  const RowBlock& block_;
  const WorkerBuffers& buffers_;
  const ExactDot exact_;
  const MergedCollector merged_;
  SurvivorList pairs_, sorted_;
};

// Moves the keys of all workers' reservoirs to that of worker 0, and what is deferred to
// `deferred`.
void merge_row(const Workspace& workspace, const RowBlock& block, int64_t row, int64_t worker,
               DeferredPairs& deferred) {
  const WorkerBuffers& buffers = workspace.workers[worker];
  Reservoir all = {buffers.merged_keys, buffers.merged_deferred, block.k,
                   workspace.plan.workers * workspace.plan.capacity};
  for (int64_t i = 0; i < workspace.plan.workers; ++i) {
    const Reservoir& one = reservoir(workspace, block, row, i);
    std::copy_n(one.keys, one.size, all.keys + all.size);
    std::copy_n(one.deferred, one.deferred_count, all.deferred + all.deferred_count);
    all.size += one.size;
    all.deferred_count += one.deferred_count;
  }
  all.shrink_to_k();
  all.drop_beaten();
  Reservoir& best = reservoir(workspace, block, row, 0);
  std::copy_n(all.keys, all.size, best.keys);
  best.size = all.size;
  best.kth_best = all.kth_best;
  best.deferred_count = 0;
  for (int64_t i = 0; i < all.deferred_count; ++i) deferred.add(row, all.deferred[i].feature);
}

// One row of the output.
struct Ranks {
  float* activations;
  int64_t* indices;
  int64_t count;
};

// Fills the ranks from `rank` on with the lowest features that no earlier rank has. They are under
// out.count. is_ranked: a bit for each of these, scratch.
void fill_ranks(const Ranks& out, int64_t rank, uint64_t* is_ranked) {
  std::fill_n(is_ranked, (out.count + 63) / 64, uint64_t{0});
  for (int64_t i = 0; i < rank; ++i)
    if (const int64_t feature = out.indices[i]; feature < out.count)
      is_ranked[feature / 64] |= uint64_t{1} << feature % 64;
  for (int64_t word = 0; rank < out.count; ++word)
    for (uint64_t left = ~is_ranked[word]; left != 0 && rank < out.count; left &= left - 1) {
      out.activations[rank] = 0;
      out.indices[rank++] = 64 * word + __builtin_ctzll(left);
    }
}

void write_not_finite(const Ranks& out) {
  std::fill_n(out.activations, out.count, quiet_nan);
  for (int64_t rank = 0; rank < out.count; ++rank) out.indices[rank] = rank;
}

// Writes one merged row of request.out.
void finish_row(const Workspace& workspace, const RowBlock& block, int64_t row, int64_t worker) {
  const Output& output = block.request->out;
  const int64_t k = block.request->k_out, output_row = block.first_row + row;
  const Ranks out = {output.activations + output_row * k, output.indices + output_row * k, k};
  float& sparsity = output.sparsity[output_row];
  if (!margin(workspace, block, row).is_finite()) {
    write_not_finite(out);
    sparsity = quiet_nan;
    if (output.active) output.active[output_row] = -1;
    return;
  }
  Reservoir& best = reservoir(workspace, block, row, 0);
  best.shrink_to_k();
  active_kernels().sort_keys(best.keys, best.size);
  for (int64_t rank = 0; rank < best.size; ++rank) {
    out.activations[rank] = key_value(best.keys[rank]);
    out.indices[rank] = key_feature(best.keys[rank]);
  }
  if (best.size < k) fill_ranks(out, best.size, workspace.workers[worker].is_ranked);
  const int64_t active = active_count(workspace, block, row);
  sparsity = static_cast<float>(static_cast<double>(active) / block.layer->features);
  if (output.active) output.active[output_row] = active;
}

}  // namespace

int64_t active_count(const Workspace& workspace, const RowBlock& block, int64_t row) {
  int64_t count = 0;
  for (int64_t worker = 0; worker < workspace.plan.workers; ++worker)
    count += reservoir(workspace, block, row, worker).active_count;
  return std::min(count, block.layer->max_active);
}

void merge_rows(const Workspace& workspace, const RowBlock& block, int64_t first, int64_t last,
                int64_t worker) {
  DeferredPairs deferred(workspace, block, worker);
  for (int64_t row = first; row < last; ++row) merge_row(workspace, block, row, worker, deferred);
  deferred.compute();
}

void finish_rows(const Batch& batch, const Workspace& workspace) {
  batch.for_rows([&](int64_t worker, const RowBlock& block, int64_t first, int64_t last) {
    Stopwatch watch(*workspace.workers[worker].counters, workspace.timed);
    merge_rows(workspace, block, first, last, worker);
    watch.add_to(compute_phase);
    for (int64_t row = first; row < last; ++row) finish_row(workspace, block, row, worker);
    watch.add_to(finish_phase);
  });
}

void finish_sparse_row(const Workspace& workspace, const RowBlock& block, int64_t row,
                       int64_t worker) {
  const SparseFeatures& out = block.request->sparse;
  const int64_t* row_begin = out.row_begin.const_data_ptr<int64_t>() + block.first_row + row;
  const int64_t count = row_begin[1] - row_begin[0];
  int64_t* features = out.features.mutable_data_ptr<int64_t>() + row_begin[0];
  float* activations = out.activations.mutable_data_ptr<float>() + row_begin[0];
  int64_t found = 0;
  if (!margin(workspace, block, row).is_finite()) {
    found = 1;
    if (count > 0) {
      features[0] = 0;
      activations[0] = quiet_nan;
    }
  } else if (block.k > 0) {
    Reservoir& best = reservoir(workspace, block, row, 0);
    best.shrink_to_k();
    std::sort(best.keys, best.keys + best.size,
              [](uint64_t a, uint64_t b) { return key_feature(a) < key_feature(b); });
    found = best.size;
    for (int64_t i = 0; i < std::min(found, count); ++i) {
      features[i] = key_feature(best.keys[i]);
      activations[i] = key_value(best.keys[i]);
    }
  } else {
    for (int64_t i = 0; i < workspace.plan.workers; ++i)
      found += reservoir(workspace, block, row, i).written;
  }
  if (found != count) workspace.workers[worker].counters->contradicted = block.layer;
}

void finish_entries(const Workspace& workspace, const RowBlock& block, int64_t row, int64_t worker,
                    const SparseWriter& out) {
  const int64_t first = out.row_begin[row], count = out.row_begin[row + 1] - first;
  Reservoir& best = reservoir(workspace, block, row, 0);
  int64_t found = best.written;
  if (!margin(workspace, block, row).is_finite()) {
    out.write(first, 0, quiet_nan);
    found = 1;
  } else if (block.k > 0) {
    best.shrink_to_k();
    std::sort(best.keys, best.keys + best.size,
              [](uint64_t a, uint64_t b) { return key_feature(a) < key_feature(b); });
    found = best.size;
    for (int64_t i = 0; i < std::min(found, count); ++i)
      out.write(first + i, key_feature(best.keys[i]), key_value(best.keys[i]));
  }
  if (found != count) workspace.workers[worker].counters->contradicted = block.layer;
}

}  // namespace sparse_transcoder::cpu
