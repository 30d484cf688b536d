// Every buffer of a call, planned once when the engine is built and borrowed by calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/select.h"

namespace sparse_transcoder {

// What the buffers depend on; nothing here grows with the number of tokens.
struct Plan {
  int64_t rows;          // rows in flight, over all jobs of a wave
  int64_t lanes;         // workers; each row keeps one list per group of features, at most one group a lane
  int64_t block, panel;  // rows and features screened at a time
  int64_t hidden_size;   // the largest
  int64_t top_k;         // the largest
  int64_t capacity;      // keys a list holds
};

// Buffers of one CPU call. Rows are addressed by their slot, 0 <= slot < plan.rows.
struct Workspace {
  explicit Workspace(const Plan& plan);

  Plan plan;
  float* hidden;            // [rows, hidden_size] normed float32 rows
  float* margin;            // [rows] score error per unit of ||w||; NaN marks a row that is not finite
  kernels::TopList* lists;  // [rows, lanes]
  uint64_t* keys;           // [rows, lanes, capacity] what the lists hold
  float* scores;            // [lanes, block, panel]
  uint32_t* candidates;     // [lanes, panel]
  uint64_t* merged;         // [lanes, lanes * capacity]
  int64_t bytes;

 private:
  at::Tensor storage_;
};

// Workspaces not in use. Borrowing makes a new one only when every other is out.
template <typename T>
class Pool {
 public:
  using Handle = std::unique_ptr<T, std::function<void(T*)>>;

  explicit Pool(std::function<std::unique_ptr<T>()> make) : make_(std::move(make)) { borrow(); }

  Handle borrow() {
    std::unique_ptr<T> item;
    {
      std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        item = std::move(idle_.back());
        idle_.pop_back();
      }
    }
    if (!item) {
      item = make_();
      std::lock_guard lock(mutex_);
      bytes_ += item->bytes;
    }
    return Handle(item.release(), [this](T* returned) {
      std::lock_guard lock(mutex_);
      idle_.emplace_back(returned);
    });
  }

  int64_t bytes() const {
    std::lock_guard lock(mutex_);
    return bytes_;
  }

 private:
  std::function<std::unique_ptr<T>()> make_;
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<T>> idle_;
  int64_t bytes_ = 0;
};

}  // namespace sparse_transcoder
