// CPU lanes: worker threads that an engine's calls share.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "floating_point.h"

namespace sparse_transcoder {

class Lanes {
 public:
  // Called as body(lane, unit); must not throw. A lane is never on two threads at once.
  using Body = std::function<void(int64_t lane, int64_t unit)>;

  explicit Lanes(int64_t workers);
  ~Lanes();

  // Calls body for every unit in [0, units) on at most `lanes` threads, the caller's among them,
  // and returns when all are done. Many callers may be inside at once: workers join whichever call
  // has a lane free. A caller never waits for a worker that has not joined, so a call also finishes
  // where there are none. Threads do not follow a fork: in a child the caller works alone. Every
  // lane has the default floating-point environment, whatever the caller's.
  void run(int64_t lanes, int64_t units, const Body& body);

 private:
  struct Call;
  struct State {
    std::mutex mutex;
    std::condition_variable work, done;
    std::vector<Call*> open;  // calls that another worker may join
    bool stop = false;
    std::vector<std::thread> workers;
  };
  static void work(State& state);
  bool forked() const;

  const int process_;
  std::unique_ptr<State> state_;
};

}  // namespace sparse_transcoder
