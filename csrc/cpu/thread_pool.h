// Worker threads that the calls of one engine share.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace at {
struct TensorIterator;
}

namespace sparse_transcoder::cpu {

class ThreadPool {
 public:
  // Called as body(worker, task). It must not throw. Workers are numbered from 0 in each call, and
  // no number is on two threads at once.
  using Body = std::function<void(int64_t worker, int64_t task)>;

  // Starts this many threads, or as many as the system gives.
  //
  // with_torch: calls of the thread that loaded this library, usually a process's main thread, run
  // on torch's threads instead. These stay awake for some milliseconds after a model's pass, and
  // others would have to share the processors with them. Calls of other threads do not, because
  // torch starts as many threads again for each of its callers.
  explicit ThreadPool(int64_t threads, bool with_torch = false);
  ~ThreadPool();

  // Calls body for every task in [0, task_count) on at most `workers` threads, the caller's among
  // them, and returns when all are done. Many callers may be inside at once: a thread joins
  // whichever call still wants workers. A caller never waits for a thread that has not joined, so a
  // call also ends where there are none. Threads do not follow a fork: in a child the caller works
  // alone. Every worker has the default floating-point environment, whatever the caller's is.
  void run(int64_t workers, int64_t task_count, const Body& body);

  // While one of these lives, run is about to be called again. Threads then wait awake for a
  // moment, because waking one takes as long as some calls do.
  class Awake {
   public:
    explicit Awake(ThreadPool& pool) : count_(pool.state_->awake) { ++count_; }
    ~Awake() { --count_; }
    Awake(const Awake&) = delete;
    Awake& operator=(const Awake&) = delete;

   private:
    std::atomic<int64_t>& count_;
  };

 private:
  struct Call;
  struct State {
    void remove(const Call* call);

    std::mutex mutex;
    std::condition_variable work, done;
    std::vector<Call*> calls;         // those that another thread may join
    std::atomic<bool> wanted{false};  // whether there are any
    std::atomic<int64_t> awake{0};
    bool stop = false;
    std::vector<std::thread> threads;
  };
  static void work(State& state);
  void run_on_torch(Call& call);
  bool forked() const;

  const int process_;
  const std::unique_ptr<at::TensorIterator> on_torch_;  // null without torch
  std::unique_ptr<State> state_;
};

}  // namespace sparse_transcoder::cpu
