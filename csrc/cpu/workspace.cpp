#include "cpu/workspace.h"

#include <ATen/ATen.h>

namespace sparse_transcoder {
namespace {

// Hands out aligned slices: a first pass with no storage measures, a second assigns.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}

  template <typename T>
  void take(T*& slice, int64_t count) {
    slice = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

int64_t carve(Workspace& w, const Plan& plan, char* base) {
  Carver carver(base);
  carver.take(w.hidden, plan.rows * plan.hidden_size);
  carver.take(w.int8, plan.rows * plan.int8_bytes);
  carver.take(w.int16, plan.rows * plan.int16_stride);
  carver.take(w.int16_scale, plan.rows);
  carver.take(w.margin, plan.rows);
  carver.take(w.lists, plan.rows * plan.lanes);
  carver.take(w.keys, plan.rows * plan.lanes * plan.capacity);
  carver.take(w.open, plan.rows * plan.lanes * plan.capacity);
  carver.take(w.scores, plan.lanes * plan.scores());
  carver.take(w.candidates, plan.lanes * plan.panel);
  carver.take(w.masks, plan.lanes * plan.job_rows);
  carver.take(w.survivors, plan.lanes * 3 * plan.survivors());
  carver.take(w.packed, plan.lanes * cpu::panel_features * plan.int16_stride);
  carver.take(w.rotated, plan.lanes * plan.int8_inputs);
  carver.take(w.tally, plan.lanes);
  carver.take(w.merged, plan.lanes * plan.lanes * plan.capacity);
  carver.take(w.merged_open, plan.lanes * plan.lanes * plan.capacity);
  return carver.used();
}

}  // namespace

Workspace::Workspace(const Plan& plan) : plan(plan) {
  bytes = carve(*this, plan, nullptr);
  try {
    storage_ = at::empty({bytes + 64}, at::kByte);
  } catch (const c10::Error&) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, "out of memory: the workspace needs ", bytes,
                     " bytes; a lower chunk_size needs less, got chunk_size ", plan.rows);
  }
  auto address = reinterpret_cast<uintptr_t>(storage_.mutable_data_ptr());
  carve(*this, plan, reinterpret_cast<char*>((address + 63) / 64 * 64));
  std::fill(tally, tally + plan.lanes, Tally{});
}

}  // namespace sparse_transcoder
