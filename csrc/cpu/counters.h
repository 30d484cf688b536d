// What a worker did in a call, for explain.
#pragma once

#include <chrono>
#include <cstdint>

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

// Adds the time since the last call to a phase. It looks at the clock after every panel, so the
// clock is a cheap one: that of a thread's CPU time (a system call) took two fifths of a call of
// one row. It never looks unless it is running.
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
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double, std::milli>(time).count();
  }

  Counters& counters_;
  const bool running_;
  double last_ms_;
};

}  // namespace cpu
}  // namespace sparse_transcoder
