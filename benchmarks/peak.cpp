// What this machine multiplies at most, for the shares in docs/performance.md: peak THREADS prints
// JSON, in 1e9 operations per second of all threads together, a multiplication and an addition
// being two.
//
//   int8_peak    the instruction of the int8 screen, on registers alone
//   int16_peak   that of the int16 products
//   float64_peak the fused multiply-add of the exact dot product
//   int8_tile    the int8 screen itself, on rows and a panel of 384 inputs, which lie in L1
//
// The engine's own kernels are compiled in. It is built for AVX-512 VNNI.
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <thread>
#include <vector>

#include "cpu/kernels/avx512vnni.cpp"

using namespace sparse_transcoder;
using namespace sparse_transcoder::cpu;

namespace {

constexpr int repeats = 20000;
constexpr int64_t inputs = 384, rows = 12;

// 24 sums hide the latency. Registers are named, because compilers would copy the sums.
#define EACH(of)                                                                                 \
  of(0) of(1) of(2) of(3) of(4) of(5) of(6) of(7) of(8) of(9) of(10) of(11) of(12) of(13) of(14) \
      of(15) of(16) of(17) of(18) of(19) of(20) of(21) of(22) of(23)
#define NAME(n) "xmm" #n,
#define CLEAR(n) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n"
#define ADD(n) INSTRUCTION " %%zmm31, %%zmm31, %%zmm" #n "\n"
#define PEAK(name, lanes)                                                  \
  double name() {                                                          \
    int64_t left = repeats;                                                \
    asm volatile(EACH(CLEAR) CLEAR(31) "1:\n" EACH(ADD) "dec %0\njnz 1b\n" \
                 : "+r"(left)                                              \
                 :                                                         \
                 : EACH(NAME) "xmm31", "cc");                              \
    return 2.0 * lanes * 24 * repeats;                                     \
  }

#define INSTRUCTION "vpdpbusd"
PEAK(int8_peak, 64)
#undef INSTRUCTION
#define INSTRUCTION "vpdpwssd"
PEAK(int16_peak, 32)
#undef INSTRUCTION
#define INSTRUCTION "vfmadd231pd"
PEAK(float64_peak, 8)

double int8_tile() {
  const Int8Layout layout(inputs);
  thread_local std::vector<int8_t> x(rows * layout.row_bytes() + 64);
  thread_local std::vector<uint8_t> panel(layout.panel_bytes() + 64);
  thread_local float none[panel_features];
  std::fill(none, none + panel_features, std::numeric_limits<float>::infinity());
  uint64_t masks[rows];
  Prefetcher prefetcher;
  prefetcher.clear();
  const auto aligned = [](auto* p) { return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64; };
  constexpr int calls = repeats / 50;
  for (int i = 0; i < calls; ++i) {
    screen_int8({layout, aligned(x.data()), rows, 1, aligned(panel.data()), none}, masks,
                prefetcher);
    asm volatile("" : : "r"(masks) : "memory");
  }
  return 2.0 * inputs * rows * panel_features * calls;
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Gives the calling thread the t-th processor: some kernels pack threads onto few of them.
void take_processor(int t) {
  cpu_set_t all, mine;
  if (sched_getaffinity(0, sizeof(all), &all) != 0) return;
  CPU_ZERO(&mine);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &all) && t-- == 0) CPU_SET(cpu, &mine);
  sched_setaffinity(0, sizeof(mine), &mine);
}

// The better of two tenths of a second, in which all threads run.
double rate(double (*work)(), int threads) {
  double best = 0;
  for (int attempt = 0; attempt < 2; ++attempt) {
    std::atomic<int> ready = 0;
    std::vector<double> rates(threads);
    std::vector<std::thread> running;
    for (int t = 0; t < threads; ++t)
      running.emplace_back([&, t] {
        take_processor(t);
        work();
        for (++ready; ready < threads;) {
        }
        const double start = seconds();
        double done = 0, now;
        do {
          done += work();
          now = seconds();
        } while (now - start < 0.1);
        rates[t] = done / (now - start);
      });
    double sum = 0;
    for (int t = 0; t < threads; ++t) {
      running[t].join();
      sum += rates[t];
    }
    best = std::max(best, sum);
  }
  return best / 1e9;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  // Those of the screen last, right before what they are compared with.
  const double int16 = rate(int16_peak, threads), float64 = rate(float64_peak, threads);
  const double int8 = rate(int8_peak, threads), tile = rate(int8_tile, threads);
  std::printf(
      "{\"int8_peak_gops\": %.0f, \"int16_peak_gops\": %.0f, \"float64_peak_gflops\": %.0f, "
      "\"int8_tile_gops\": %.0f}\n",
      int8, int16, float64, tile);
}
