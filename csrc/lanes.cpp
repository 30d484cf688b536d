#include "lanes.h"

#include <unistd.h>

#include <algorithm>
#include <system_error>

namespace sparse_transcoder {

struct Lanes::Call {
  const Body& body;
  const int64_t lanes, units;
  std::atomic<int64_t> next{0};
  int64_t joined = 1, active = 0;  // lanes given out, the caller's first; workers inside now. Guarded by the mutex.

  void drain(int64_t lane) {
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) body(lane, unit);
  }
};

Lanes::Lanes(int64_t workers) : process_(getpid()) {
  try {
    for (int64_t i = 0; i < workers; ++i) workers_.emplace_back([this] { work(); });
  } catch (const std::system_error&) {
    // The system gives no more threads: fewer workers are slower and nothing else.
  }
}

Lanes::~Lanes() {
  if (getpid() != process_) {  // a forked child has no workers to wait for
    for (std::thread& worker : workers_) worker.detach();
    return;
  }
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Lanes::run(int64_t lanes, int64_t units, const Body& body) {
  Call call{body, std::min(lanes, units), units};
  if (call.lanes > 1) {
    {
      std::lock_guard lock(mutex_);
      open_.push_back(&call);
    }
    for (int64_t lane = 1; lane < call.lanes; ++lane) work_.notify_one();
  }
  call.drain(0);
  if (call.lanes > 1) {
    std::unique_lock lock(mutex_);
    open_.erase(std::remove(open_.begin(), open_.end(), &call), open_.end());
    done_.wait(lock, [&call] { return call.active == 0; });
  }
}

void Lanes::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    work_.wait(lock, [this] { return stop_ || !open_.empty(); });
    if (stop_) return;
    Call* call = open_.front();
    const int64_t lane = call->joined++;
    if (call->joined == call->lanes) open_.erase(open_.begin());
    ++call->active;
    lock.unlock();
    call->drain(lane);
    lock.lock();
    // A call with no unit left must not be joined again.
    open_.erase(std::remove(open_.begin(), open_.end(), call), open_.end());
    if (--call->active == 0) done_.notify_all();
  }
}

}  // namespace sparse_transcoder
