// CPU lanes: worker threads that an engine's calls share.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace sparse_transcoder {

class Lanes {
 public:
  // Called as body(lane, unit); must not throw. A lane is never on two threads at once.
  using Body = std::function<void(int64_t lane, int64_t unit)>;

  explicit Lanes(int64_t workers);
  ~Lanes();

  // Calls body for every unit in [0, units) on at most `lanes` threads, the caller's among them, and returns when all are done.
  // Many callers may be inside at once: workers join whichever call has a lane free. A caller never waits for a worker that has
  // not joined, so a call also finishes where there are none (in a forked child).
  void run(int64_t lanes, int64_t units, const Body& body);

 private:
  struct Call;
  void work();

  std::mutex mutex_;
  std::condition_variable work_, done_;
  std::vector<Call*> open_;  // calls that another worker may join
  bool stop_ = false;
  const int process_;
  std::vector<std::thread> workers_;
};

}  // namespace sparse_transcoder
