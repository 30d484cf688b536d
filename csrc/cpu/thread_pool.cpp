#include "cpu/thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <system_error>

namespace sparse_transcoder {

struct Lanes::Call {
  const Body& body;
  const int64_t lanes, units;
  std::atomic<int64_t> next{0};
  int64_t joined = 1,
          active =
              0;  // lanes given out, the caller's first; workers inside now. Guarded by the mutex.

  void drain(int64_t lane) {
    const DefaultFloatingPoint environment;
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;)
      body(lane, unit);
  }
};

Lanes::Lanes(int64_t workers) : process_(getpid()), state_(std::make_unique<State>()) {
  try {
    for (int64_t i = 0; i < workers; ++i)
      state_->workers.emplace_back([&state = *state_] { work(state); });
  } catch (const std::system_error&) {
    // The system gives no more threads: fewer workers are slower and nothing else.
  }
}

Lanes::~Lanes() {
  if (forked()) {
    // Its threads and those who wait are the parent's, its mutex may be locked for ever: it cannot
    // be taken apart here.
    state_.release();
    return;
  }
  {
    std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->work.notify_all();
  for (std::thread& worker : state_->workers) worker.join();
}

bool Lanes::forked() const { return getpid() != process_; }

void Lanes::run(int64_t lanes, int64_t units, const Body& body) {
  Call call{body, std::min(lanes, units), units};
  if (call.lanes <= 1 || forked()) return call.drain(0);
  State& state = *state_;
  {
    std::lock_guard lock(state.mutex);
    state.open.push_back(&call);
  }
  for (int64_t lane = 1; lane < call.lanes; ++lane) state.work.notify_one();
  call.drain(0);
  std::unique_lock lock(state.mutex);
  state.open.erase(std::remove(state.open.begin(), state.open.end(), &call), state.open.end());
  state.done.wait(lock, [&call] { return call.active == 0; });
}

void Lanes::work(State& state) {
  std::unique_lock lock(state.mutex);
  while (true) {
    state.work.wait(lock, [&state] { return state.stop || !state.open.empty(); });
    if (state.stop) return;
    Call* call = state.open.front();
    const int64_t lane = call->joined++;
    if (call->joined == call->lanes) state.open.erase(state.open.begin());
    ++call->active;
    lock.unlock();
    call->drain(lane);
    lock.lock();
    // A call with no unit left must not be joined again.
    state.open.erase(std::remove(state.open.begin(), state.open.end(), call), state.open.end());
    if (--call->active == 0) state.done.notify_all();
  }
}

}  // namespace sparse_transcoder
