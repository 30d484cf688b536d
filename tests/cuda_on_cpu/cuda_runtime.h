// Enough of CUDA to run a kernel's threads as CPU threads: one block at a time, 256 threads that
// meet at barriers. It shows that the logic of a kernel is right (and, under a sanitizer, that it
// has no race); it says nothing of speed. streams.cpp has the rest.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "cuda/kernels/kernels.h"

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __noinline__
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void require(bool holds, const char* fault) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", fault);
  std::abort();
}

// The threads of a block take turns on one CPU thread, in an order drawn anew each time: one runs
// until it must wait for others. That is as far apart as a device could let them come.
class Block {
 public:
  explicit Block(unsigned threads)
      : fibers_(threads), lanes(threads), all_{threads}, warps_(threads / 32, Barrier{32}) {
    for (Fiber& fiber : fibers_) fiber.stack.resize(stack_bytes);
  }

  void run(const std::function<void()>& kernel, unsigned memory_bytes) {
    kernel_ = &kernel;
    current_ = this;
    memory.resize((memory_bytes + sizeof(Line) - 1) / sizeof(Line));
    std::memset(memory.data(), undefined, memory.size() * sizeof(Line));
    copies.assign(fibers_.size(), {{}});
    std::vector<unsigned> order(fibers_.size());
    for (unsigned t = 0; t < fibers_.size(); ++t) {
      order[t] = t;
      Fiber& fiber = fibers_[t];
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    for (bool left = true, moved = true; left;) {
      require(moved, "threads of a block wait at different barriers");
      left = moved = false;
      std::shuffle(order.begin(), order.end(), random_);
      for (const unsigned t : order) {
        if (fibers_[t].done) continue;
        threadIdx = dim3(t);
        moves_ = false;
        swapcontext(&scheduler_, &fibers_[t].context);
        moved |= moves_ || fibers_[t].done;
        left = true;
      }
    }
  }

  void sync() { wait(all_); }
  void sync_warp() { wait(warps_[threadIdx.x / 32]); }
  // The last thread of the warp to come runs the work; then all go on.
  void sync_warp(const std::function<void()>& work) { wait(warps_[threadIdx.x / 32], &work); }

 private:
  static constexpr size_t stack_bytes = 64 << 10;
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
  };
  struct Barrier {
    unsigned threads, arrived = 0, passed = 0;
  };

  static void enter() {
    Block& block = *current_;
    const unsigned thread = threadIdx.x;
    (*block.kernel_)();
    block.fibers_[thread].done = true;
  }
  void wait(Barrier& barrier, const std::function<void()>* work = nullptr) {
    const unsigned before = barrier.passed, thread = threadIdx.x;
    moves_ = true;
    if (++barrier.arrived == barrier.threads) {
      if (work) (*work)();
      barrier.arrived = 0;
      ++barrier.passed;
      return;
    }
    do {
      swapcontext(&fibers_[thread].context, &scheduler_);
    } while (barrier.passed == before);
    moves_ = true;
  }

  static inline Block* current_ = nullptr;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  std::mt19937 random_;
  bool moves_ = false;

 public:
  std::vector<double> lanes;
  int votes = 0;

  // What a launch asks for beside the kernel's own shared memory.
  struct alignas(128) Line {
    unsigned char bytes[128];
  };
  static constexpr unsigned char undefined = 0xff;  // NaN in floating point
  std::vector<Line> memory;
  // Copies to it that are under way, of each thread, group by group; the last group is open.
  struct Copy {
    void* to;
    const void* from;  // null: zeros
  };
  std::vector<std::vector<std::vector<Copy>>> copies;

 private:
  Barrier all_;
  std::vector<Barrier> warps_;
};
inline Block& block() {
  static Block block(256);
  return block;
}

inline void __syncthreads() { block().sync(); }
inline void __syncwarp() { block().sync_warp(); }

inline int __syncthreads_count(int vote) {
  if (vote) ++block().votes;
  __syncthreads();
  const int count = block().votes;
  __syncthreads();
  block().votes = 0;
  __syncthreads();
  return count;
}
inline int __syncthreads_or(int vote) { return __syncthreads_count(vote) > 0; }

// What every lane of the warp gives, seen by all of them; then take(lane of this thread, values).
template <typename T, typename Take>
auto exchange(T value, const Take& take) {
  static_assert(sizeof(T) <= sizeof(double));
  const unsigned thread = threadIdx.x;
  double* lanes = block().lanes.data() + thread / 32 * 32;
  std::memcpy(lanes + thread % 32, &value, sizeof(value));
  block().sync_warp();
  const auto got = take(static_cast<int>(thread % 32), [&](int lane) {
    T other;
    std::memcpy(&other, lanes + lane, sizeof(other));
    return other;
  });
  block().sync_warp();
  return got;
}

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return exchange(value, [&](int, const auto& of) { return of(from); });
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int width) {
  return exchange(value, [&](int lane, const auto& of) { return of(std::min(lane + width, 31)); });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return exchange(value, [&](int lane, const auto& of) { return of(lane ^ mask); });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int width) {
  return exchange(value, [&](int lane, const auto& of) { return of(std::max(lane - width, 0)); });
}
inline unsigned __ballot_sync(unsigned, int vote) {
  return exchange(vote, [&](int, const auto& of) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= unsigned{of(lane) != 0} << lane;
    return votes;
  });
}
inline int __any_sync(unsigned, int vote) { return __ballot_sync(~0u, vote) != 0; }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(unsigned bits) { return bits ? std::countr_zero(bits) + 1 : 0; }

// Puts work on a queue or a stream; with no stream it runs at once.
void enqueue(sparse_transcoder::cuda::Queue& queue, std::function<void()> work);
void enqueue(void* stream, std::function<void()> work);

inline void run(dim3 grid, unsigned threads, unsigned memory_bytes,
                const std::function<void()>& kernel) {
  gridDim = grid;
  blockDim = dim3(threads);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      block().run(kernel, memory_bytes);
    }
}

inline int atomicAdd(int* target, int value) {
  const int before = *target;
  *target += value;
  return before;
}

inline int atomicMin(int* target, int value) {
  const int before = *target;
  *target = std::min(before, value);
  return before;
}

inline int atomicMax(int* target, int value) {
  const int before = *target;
  *target = std::max(before, value);
  return before;
}

// Four products of signed bytes, added to a sum that wraps around.
inline int __dp4a(int a, int b, int sum) {
  for (int shift = 0; shift < 32; shift += 8)
    sum = int(unsigned(sum) + unsigned(int8_t(a >> shift) * int8_t(b >> shift)));
  return sum;
}

template <typename T>
T __ldcs(const T* from) {
  return *from;
}

template <typename To, typename From>
To reinterpret_bits(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float value) { return reinterpret_bits<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return reinterpret_bits<float>(bits); }
inline double __hiloint2double(int high, int low) {
  return reinterpret_bits<double>(uint64_t{static_cast<unsigned>(high)} << 32 |
                                  static_cast<unsigned>(low));
}

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
using std::isfinite, std::isnan;
