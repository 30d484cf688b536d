// Worker threads: every task runs once, no worker is on two threads at a time, no call is left
// waiting.
#include "cpu/thread_pool.h"

#include <ATen/Parallel.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <memory>

#include "check.h"

using sparse_transcoder::cpu::ThreadPool;

namespace {

// Runs a call and checks what a body may rely on. The pause makes calls overlap.
void run_checked(ThreadPool& pool, int64_t workers, int64_t tasks, int microseconds = 0) {
  std::vector<std::atomic<int>> done(tasks), busy(workers);
  pool.run(workers, tasks, [&](int64_t worker, int64_t task) {
    EXPECT(worker >= 0 && worker < workers && task >= 0 && task < tasks);
    EXPECT_EQUAL(busy[worker].fetch_add(1), 0);
    if (microseconds > 0) std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
    ++done[task];
    --busy[worker];
  });
  for (const auto& count : done) EXPECT_EQUAL(count.load(), 1);
  for (const auto& count : busy) EXPECT_EQUAL(count.load(), 0);
}

// A call that ends only when so many threads are inside.
void meet(ThreadPool& pool, int workers) {
  std::mutex mutex;
  std::condition_variable all_here;
  int here = 0;
  pool.run(workers, workers, [&](int64_t, int64_t) {
    std::unique_lock lock(mutex);
    if (++here == workers) all_here.notify_all();
    EXPECT(all_here.wait_for(lock, std::chrono::seconds(60), [&] { return here == workers; }));
  });
}

// Whether the body ends in time in a forked child, with no check failed there.
template <typename Body>
bool ends_in_child(Body body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(300);
    body();
    _exit(check::failures() > 0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return status == 0;
}

}  // namespace

TEST(thread_pool_runs_every_task_once) {
  for (const int64_t threads : {0, 1, 3}) {
    ThreadPool pool(threads);
    for (const int64_t workers : {1, 2, 4, 9})
      for (const int64_t tasks : {0, 1, 2, 3, 50, 1000}) run_checked(pool, workers, tasks);
  }
}

#ifndef __SANITIZE_THREAD__  // see main.cpp
// The test program loads the library on its main thread, which runs the tests.
TEST(thread_pool_runs_every_task_once_on_torchs_threads) {
  const int before = at::get_num_threads();
  for (const int torch_threads : {1, 2, 4}) {
    at::set_num_threads(torch_threads);
    for (const int64_t threads : {1, 3, 8}) {
      ThreadPool pool(threads, true);
      for (const int64_t workers : {1, 2, 4, 9})
        for (const int64_t tasks : {0, 1, 2, 50, 1000}) run_checked(pool, workers, tasks);
    }
  }
  at::set_num_threads(before);
}

TEST(thread_pool_uses_all_of_torchs_threads) {
  ThreadPool pool(3, true);
  const int before = at::get_num_threads();
  at::set_num_threads(3);  // fewer than there were
  meet(pool, 3);
  at::set_num_threads(before);
}

TEST(thread_pool_has_torchs_threads_for_one_caller) {
  ThreadPool pool(3, true);
  const auto runs_on_torch = [&pool] {
    std::atomic<int> on_torch{0};
    pool.run(4, 4, [&](int64_t, int64_t) { on_torch += at::in_parallel_region(); });
    EXPECT(on_torch == 0 || on_torch == 4);
    return on_torch == 4;
  };
  const int before = at::get_num_threads();
  at::set_num_threads(2);
  EXPECT(runs_on_torch());
  std::thread([&] { EXPECT(!runs_on_torch()); }).join();
  EXPECT(ends_in_child([&] {  // whose threads of torch are gone
    EXPECT(!runs_on_torch());
    ThreadPool own(3, true);
    run_checked(own, 4, 50);
  }));
  at::set_num_threads(before);
}
#endif

TEST(thread_pool_uses_its_threads) {
  ThreadPool pool(3);
  meet(pool, 4);
}

TEST(thread_pool_serves_many_callers_at_once) {
  ThreadPool pool(3);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 8; ++caller)
    callers.emplace_back([&pool, caller] {
      for (int i = 0; i < 300; ++i)
        run_checked(pool, 1 + (caller + i) % 6, i % 20, i % 7 == 0 ? 50 : 0);
    });
  for (std::thread& caller : callers) caller.join();
}

TEST(thread_pool_does_not_hold_up_a_caller_when_busy) {
  ThreadPool pool(1);
  std::atomic<int> inside{0};
  std::atomic<bool> leave{false};
  std::thread slow([&] {
    pool.run(2, 2, [&](int64_t, int64_t) {
      ++inside;
      while (!leave) std::this_thread::yield();
    });
  });
  while (inside < 2) std::this_thread::yield();  // the only thread is in there
  run_checked(pool, 4, 100);
  leave = true;
  slow.join();
}

TEST(thread_pool_comes_and_goes) {
  for (int i = 0; i < 50; ++i) {
    ThreadPool pool(i % 4);
    if (i % 2) run_checked(pool, 4, i);
  }
}

TEST(thread_pool_finishes_in_a_forked_child) {
  auto pool = std::make_unique<ThreadPool>(3);
  run_checked(*pool, 4, 50, 10);
  EXPECT(ends_in_child([&] {
    for (int i = 0; i < 100; ++i) run_checked(*pool, 4, 20);
  }));
  EXPECT(ends_in_child([&] { pool.reset(); }));
  run_checked(*pool, 4, 50);

  // The fork may also come while the threads are at work.
  std::atomic<bool> leave{false};
  std::thread caller([&] {
    while (!leave) pool->run(4, 8, [](int64_t, int64_t) {});
  });
  bool ends = true;
  for (int i = 0; i < 20 && ends; ++i)
    ends = ends_in_child([&] {
      for (int j = 0; j < 20; ++j) run_checked(*pool, 4, 20);
      pool.reset();
    });
  EXPECT(ends);
  leave = true;
  caller.join();
}

#if !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)  // these need all of the address space
TEST(thread_pool_makes_do_with_fewer_threads) {
  EXPECT(ends_in_child([] {
    int64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    const rlim_t most =
        pages * sysconf(_SC_PAGESIZE) + (200 << 20);  // room for some threads' stacks
    const rlimit limit = {most, most};
    setrlimit(RLIMIT_AS, &limit);
    ThreadPool pool(300);
    run_checked(pool, 301, 1000);
  }));
}
#endif
