// Objects that calls borrow.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace sparse_transcoder {

// Borrowing makes a new object only when every other is out. T has a member `bytes`.
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

  // Of every object that was ever made.
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
