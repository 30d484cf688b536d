#include "cpu/finish_rows.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <functional>
#include <limits>

#include "cpu/collectors.h"

namespace sparse_transcoder::cpu {
namespace {

constexpr float quiet_nan = std::numeric_limits<float>::quiet_NaN();

// The k best of all workers' reservoirs, in no order.
Reservoir merge_reservoirs(const Workspace& workspace, const RowBlock& block, int64_t row,
                           int64_t worker) {
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
  all.drop_beaten();
  TopKCollector(workspace, block, worker).compute_deferred(row, all);
  all.shrink_to_k();
  return all;
}

// One row of the output.
struct Ranks {
  float* activations;
  int64_t* indices;
  int64_t count;
};

// Fills the ranks from `rank` on with the lowest features that no earlier rank has. winners is
// scratch for the earlier ones.
void fill_ranks(const Ranks& out, int64_t rank, int64_t* winners) {
  const int64_t winner_count = rank;
  std::copy_n(out.indices, winner_count, winners);
  std::sort(winners, winners + winner_count);
  for (int64_t feature = 0, next = 0; rank < out.count; ++feature) {
    if (next < winner_count && winners[next] == feature) {
      ++next;
      continue;
    }
    out.activations[rank] = 0;
    out.indices[rank++] = feature;
  }
}

void write_not_finite(const Ranks& out) {
  std::fill_n(out.activations, out.count, quiet_nan);
  for (int64_t rank = 0; rank < out.count; ++rank) out.indices[rank] = rank;
}

// Active features of a row that is finite.
int64_t active_count(const Workspace& workspace, const RowBlock& block, int64_t row) {
  int64_t count = 0;
  for (int64_t worker = 0; worker < workspace.plan.workers; ++worker)
    count += reservoir(workspace, block, row, worker).active_count;
  return std::min(count, block.layer->max_active);
}

}  // namespace

void finish_row(const Workspace& workspace, const RowBlock& block, int64_t row, int64_t worker) {
  const Features& features = block.request->out;
  const int64_t k = block.request->k_out, output_row = block.first_row + row;
  const Ranks out = {features.activations.mutable_data_ptr<float>() + output_row * k,
                     features.indices.mutable_data_ptr<int64_t>() + output_row * k, k};
  float& sparsity = features.sparsity.mutable_data_ptr<float>()[output_row];
  if (!margin(workspace, block, row).is_finite()) {
    write_not_finite(out);
    sparsity = quiet_nan;
    return;
  }
  const Reservoir best = merge_reservoirs(workspace, block, row, worker);
  std::sort(best.keys, best.keys + best.size, std::greater<>());
  for (int64_t rank = 0; rank < best.size; ++rank) {
    out.activations[rank] = key_value(best.keys[rank]);
    out.indices[rank] = key_feature(best.keys[rank]);
  }
  if (best.size < k) fill_ranks(out, best.size, workspace.workers[worker].winners);
  const auto active = static_cast<double>(active_count(workspace, block, row));
  sparsity = static_cast<float>(active / block.layer->features);
}

int64_t entry_count(const Workspace& workspace, const RowBlock& block, int64_t row) {
  if (!margin(workspace, block, row).is_finite()) return 1;
  const int64_t count = active_count(workspace, block, row);
  return block.k > 0 ? std::min(count, block.k) : count;
}

void finish_sparse_row(const Workspace& workspace, const RowBlock& block, int64_t row,
                       int64_t worker, const SparseWriter& out) {
  const int64_t first = out.row_begin[row], count = out.row_begin[row + 1] - first;
  if (!margin(workspace, block, row).is_finite()) {
    out.write(first, 0, quiet_nan);
  } else if (block.k > 0 && count > 0) {
    const Reservoir best = merge_reservoirs(workspace, block, row, worker);
    std::sort(best.keys, best.keys + best.size,
              [](uint64_t a, uint64_t b) { return key_feature(a) < key_feature(b); });
    for (int64_t i = 0; i < std::min(best.size, count); ++i)
      out.write(first + i, key_feature(best.keys[i]), key_value(best.keys[i]));
  }
}

}  // namespace sparse_transcoder::cpu
