#include "cpu/workspace.h"

#include <ATen/ATen.h>

namespace sparse_transcoder::cpu {
namespace {

constexpr int64_t alignment = 64;

// Hands out aligned slices of one storage. Without a storage it measures.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <typename T>
  void take(T*& slice, int64_t count) {
    slice = reinterpret_cast<T*>(base_ + used_);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    used_ += (bytes + alignment - 1) / alignment * alignment;
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

void place(WorkerBuffers& worker, const Plan& plan, Arena& arena) {
  arena.take(worker.scores, plan.score_count());
  arena.take(worker.products, plan.product_count());
  arena.take(worker.candidates, plan.tile_features);
  arena.take(worker.positions, SurvivorList::digits);
  arena.take(worker.masks.rows, mask_count(plan.max_block_rows));
  arena.take(worker.masks.words, mask_count(plan.max_block_rows) + 2);
  arena.take(worker.survivors, 3 * plan.survivor_capacity());
  arena.take(worker.int16_panel, panel_features * plan.int16_stride);
  arena.take(worker.rotated, plan.int8_inputs);
  arena.take(worker.merged_keys, plan.workers * plan.capacity);
  arena.take(worker.merged_deferred, plan.workers * plan.capacity);
  arena.take(worker.is_ranked, plan.max_ranks / 64 + 1);
  arena.take(worker.entries, plan.entry_capacity());
  arena.take(worker.entry_count, 1);
  arena.take(worker.counters, 1);
}

// Places every buffer in the storage at `base`, and returns the bytes that they take.
int64_t place(Workspace& workspace, const Plan& plan, char* base) {
  Arena arena(base);
  const int64_t reservoirs = plan.max_rows * plan.workers;
  arena.take(workspace.normed, plan.max_rows * plan.hidden_size);
  arena.take(workspace.int8, plan.max_rows * plan.int8_row_bytes);
  arena.take(workspace.int16, plan.max_rows * plan.int16_stride);
  arena.take(workspace.int16_scales, plan.max_rows);
  arena.take(workspace.margins, plan.max_rows);
  arena.take(workspace.reservoirs, reservoirs);
  arena.take(workspace.keys, reservoirs * plan.capacity);
  arena.take(workspace.deferred, reservoirs * plan.capacity);
  for (WorkerBuffers& worker : workspace.workers) place(worker, plan, arena);
  return arena.used();
}

}  // namespace

Workspace::Workspace(const Plan& plan) : plan(plan), workers(plan.workers) {
  bytes = place(*this, plan, nullptr);
  try {
    storage_ = at::empty({bytes + alignment}, at::kByte);
  } catch (const c10::Error&) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, "out of memory: the workspace needs ", bytes,
                     " bytes; a lower chunk_size needs less, got chunk_size ", plan.max_rows);
  }
  const auto address = reinterpret_cast<uintptr_t>(storage_.mutable_data_ptr());
  place(*this, plan, reinterpret_cast<char*>((address + alignment - 1) / alignment * alignment));
  for (const WorkerBuffers& worker : workers) *worker.counters = {};
}

}  // namespace sparse_transcoder::cpu
