#include "cpu/thread_pool.h"

#include <ATen/ATen.h>
#include <ATen/TensorIterator.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <system_error>

#include "floating_point.h"

namespace sparse_transcoder::cpu {
namespace {

// Returns when a condition holds, or after a moment.
template <typename Condition>
void wait_awake(const Condition& holds) {
  constexpr std::chrono::microseconds moment(50);
  const auto end = std::chrono::steady_clock::now() + moment;
  while (!holds() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
}

// What torch cuts among its threads for so many workers: many elements for each, so that every
// thread gets some, however many threads there are.
std::unique_ptr<at::TensorIterator> elements(int64_t workers) {
  at::Tensor memory = at::empty({64 * workers}, at::kByte);
  return std::make_unique<at::TensorIterator>(at::TensorIterator::nullary_op(memory));
}

const std::thread::id loader = std::this_thread::get_id();
bool is_child = false;  // whether this process was forked since: torch's threads did not follow
[[maybe_unused]] const int watches_forks =
    pthread_atfork(nullptr, nullptr, [] { is_child = true; });

}  // namespace

struct ThreadPool::Call {
  const Body& body;
  const int64_t workers, task_count;
  std::atomic<int64_t> next_task{0};
  // The mutex is held where these two change.
  int64_t joined = 1;              // workers that were ever inside; the caller is the first
  std::atomic<int64_t> inside{0};  // threads of the pool that are inside now

  void work_as(int64_t worker) {
    const DefaultFloatingPoint environment;
    for (int64_t task; (task = next_task.fetch_add(1, std::memory_order_relaxed)) < task_count;)
      body(worker, task);
  }
};

ThreadPool::ThreadPool(int64_t threads, bool with_torch)
    : process_(getpid()),
      on_torch_(with_torch ? elements(threads + 1) : nullptr),
      state_(std::make_unique<State>()) {
  try {
    for (int64_t i = 0; i < threads; ++i)
      state_->threads.emplace_back([&state = *state_] { work(state); });
  } catch (const std::system_error&) {
    // The system gives no more threads. Fewer are slower and nothing else.
  }
}

ThreadPool::~ThreadPool() {
  if (forked()) {
    // The threads and those who wait for them are the parent's, and the mutex may be locked for
    // ever. So the state cannot be taken apart here.
    state_.release();
    return;
  }
  {
    std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->work.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
}

bool ThreadPool::forked() const { return getpid() != process_; }

void ThreadPool::run(int64_t workers, int64_t task_count, const Body& body) {
  Call call{body, std::min(workers, task_count), task_count};
  if (call.workers <= 1 || forked()) return call.work_as(0);
  if (on_torch_ && !is_child && std::this_thread::get_id() == loader) return run_on_torch(call);
  State& state = *state_;
  {
    std::lock_guard lock(state.mutex);
    state.calls.push_back(&call);
    state.wanted = true;
  }
  for (int64_t worker = 1; worker < call.workers; ++worker) state.work.notify_one();
  call.work_as(0);
  std::unique_lock lock(state.mutex);
  state.remove(&call);
  if (call.inside > 0) {
    lock.unlock();
    wait_awake([&call] { return call.inside == 0; });
    lock.lock();
  }
  state.done.wait(lock, [&call] { return call.inside == 0; });
}

void ThreadPool::run_on_torch(Call& call) {
  std::atomic<int64_t> joined{0};
  on_torch_->for_each(
      [&](char**, const int64_t*, int64_t, int64_t) {  // a thread's elements, all at once
        if (const int64_t worker = joined++; worker < call.workers) call.work_as(worker);
      },
      1);
}

void ThreadPool::State::remove(const Call* call) {
  calls.erase(std::remove(calls.begin(), calls.end(), call), calls.end());
  wanted = !calls.empty();
}

void ThreadPool::work(State& state) {
  std::unique_lock lock(state.mutex);
  while (true) {
    state.work.wait(lock, [&state] { return state.stop || !state.calls.empty(); });
    if (state.stop) return;
    Call* call = state.calls.front();
    const int64_t worker = call->joined++;
    if (call->joined == call->workers) state.remove(call);
    ++call->inside;
    lock.unlock();
    call->work_as(worker);
    lock.lock();
    state.remove(call);  // with no task left it must not be joined again
    if (--call->inside == 0) state.done.notify_all();
    if (state.awake > 0) {
      lock.unlock();
      wait_awake([&state] { return state.wanted || state.awake == 0; });
      lock.lock();
    }
  }
}

}  // namespace sparse_transcoder::cpu
