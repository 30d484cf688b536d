// What a worker did in a call, for explain.
#pragma once

#include <cstdint>
#include <ctime>

#include "cpu/screen.h"

namespace sparse_transcoder {

struct Layer;

namespace cpu {

enum Phase { prepare_phase, screen_phase, rescreen_phase, compute_phase, finish_phase };

// Explanation says what each of these is.
struct Counters {
  int64_t pairs[screen_type_count];
  int64_t survivors, ambiguous, computed, fallback_rows;
  double ms[5];               // by Phase
  const Layer* contradicted;  // of this layer some results contradict each other; usually null
};

// Adds the thread's CPU time since the last call to a phase, so that other programs on the machine
// do not count. It never looks at the clock unless it is running.
class Stopwatch {
 public:
  Stopwatch(Counters& counters, bool running)
      : counters_(counters), running_(running), last_ms_(now_ms()) {}

  void add_to(Phase phase) {
    if (!running_) return;
    const double time_ms = now_ms();
    counters_.ms[phase] += time_ms - last_ms_;
    last_ms_ = time_ms;
  }

 private:
  double now_ms() const {
    if (!running_) return 0;
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return 1e3 * static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_nsec);
  }

  Counters& counters_;
  const bool running_;
  double last_ms_;
};

}  // namespace cpu
}  // namespace sparse_transcoder
