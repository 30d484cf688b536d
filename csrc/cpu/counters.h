// What a worker did in a call, for explain.
#pragma once

#include <chrono>
#include <cstdint>

namespace sparse_transcoder {

struct Layer;

namespace cpu {

enum Phase { prepare_phase, screen_phase, rescreen_phase, compute_phase, finish_phase };

// Explanation says what each of these is.
struct Counters {
  int64_t pairs[3];  // by ScreenType
  int64_t survivors, ambiguous, computed, fallback_rows;
  double ms[5];               // by Phase
  const Layer* contradicted;  // of this layer some results contradict each other; usually null
};

// Adds the time since the last call to a phase. It never looks at the clock unless it is running.
class Stopwatch {
 public:
  Stopwatch(Counters& counters, bool running) : counters_(counters), running_(running) {
    last_ = now();
  }
  void add_to(Phase phase) {
    if (!running_) return;
    const Clock::time_point time = now();
    counters_.ms[phase] += std::chrono::duration<double, std::milli>(time - last_).count();
    last_ = time;
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point now() const { return running_ ? Clock::now() : Clock::time_point(); }
  Counters& counters_;
  const bool running_;
  Clock::time_point last_;
};

}  // namespace cpu
}  // namespace sparse_transcoder
