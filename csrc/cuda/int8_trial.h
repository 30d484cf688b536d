// Whether the int8 screen of a layer pays: what "auto" learns from call to call.
#pragma once

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>

#include "cuda/kernels/kernels.h"
#include "cuda/products.h"

namespace sparse_transcoder::cuda {

// The margin of int8 is wide. Where features crowd within it at their gates, computing these
// candidates from the stored weights takes longer than reading weights of half the bytes saves. It
// never changes a result, so that what the device has not written yet, or was overwritten, does no
// harm. Methods may be called from many threads at once.
class Int8Trial {
 public:
  // After calls that did not pay the bfloat16 screen takes over, until the next multiple of
  // `period` calls. So layers that are called together come back together.
  explicit Int8Trial(int64_t features, int64_t period = 256)
      : saved_(features / 3), period_(period), candidates_(pinned(at::zeros({rows}, at::kInt))) {}

  // Counts a call, and says whether it is to be screened in int8.
  bool next() {
    const int64_t call = calls_.fetch_add(1, std::memory_order_relaxed);
    if (call < back_at_.load(std::memory_order_relaxed)) return false;
    int* counts = candidates();
    int64_t sum = 0, largest = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const std::atomic_ref written(counts[row]);
      const int64_t count = written.load(std::memory_order_relaxed);
      if (count != 0) written.store(0, std::memory_order_relaxed);
      sum += count;
      largest = std::max(largest, count);
    }
    const int64_t spent = std::max(sum, row_share * largest), most = patience * saved_,
                  lost = std::clamp<int64_t>(lost_.load(std::memory_order_relaxed) + spent - saved_,
                                             0, most);
    lost_.store(lost, std::memory_order_relaxed);
    if (lost < most) return true;
    back_at_.store((call / period_ + 1) * period_, std::memory_order_relaxed);
    return false;
  }

  // [rows] in host memory: where the device writes how many candidates of a row it computes. A call
  // has at most so many rows.
  int* candidates() const { return candidates_.mutable_data_ptr<int>(); }
  static constexpr int64_t rows = max_tensor_rows;

 private:
  // Of 5120 x 40960 bfloat16 weights an int8 call of up to 32 rows saves 66 us on an H100, and a
  // candidate takes 4 to 5.5 ns where 8 rows or more share the device. So a call saves what a third
  // as many candidates as features take. One row alone takes as long as 8 equal ones.
  static constexpr int64_t row_share = 8;
  // What may be lost before int8 is left, in calls that save: less than leaving it costs where the
  // next calls would have paid, and more than one crowded row alone loses.
  static constexpr int64_t patience = 16;

  const int64_t saved_, period_;  // saved_ and lost_ in candidates
  const at::Tensor candidates_;
  std::atomic<int64_t> calls_ = 0, back_at_ = 0, lost_ = 0;
};

}  // namespace sparse_transcoder::cuda
