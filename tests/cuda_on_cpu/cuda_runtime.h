// Enough of CUDA to run a kernel's threads as CPU threads: one block at a time, 256 threads that meet at barriers. It shows that
// the logic of a kernel is right (and, under a sanitizer, that it has no race); it says nothing of speed.
#pragma once

#include <array>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(count)

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
using cudaStream_t = void*;
inline int cudaGetLastError() { return 0; }

inline thread_local dim3 threadIdx, blockIdx, blockDim;
inline dim3 gridDim;

struct Block {
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<double> lanes;
  std::atomic<int> votes = 0;

  explicit Block(unsigned threads) : all(threads), lanes(threads) {
    for (unsigned i = 0; i < threads / 32; ++i) warps.push_back(std::make_unique<std::barrier<>>(32));
  }
};
inline Block* block = nullptr;

inline void __syncthreads() { block->all.arrive_and_wait(); }

inline int __syncthreads_or(int vote) {
  if (vote) block->votes = 1;
  __syncthreads();
  const int any = block->votes;
  __syncthreads();
  block->votes = 0;
  __syncthreads();
  return any;
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int width) {
  const unsigned thread = threadIdx.x, lane = thread % 32;
  std::barrier<>& warp = *block->warps[thread / 32];
  block->lanes[thread] = value;  // float and int are exact in double
  warp.arrive_and_wait();
  const T got = lane + width < 32 ? static_cast<T>(block->lanes[thread + width]) : value;
  warp.arrive_and_wait();
  return got;
}

template <typename Kernel>
void launch(dim3 grid, unsigned threads, const Kernel& kernel) {
  Block state(threads);
  block = &state;
  gridDim = grid;
  std::vector<std::thread> team;
  for (unsigned t = 0; t < threads; ++t)
    team.emplace_back([&, t] {
      threadIdx = dim3(t), blockDim = dim3(threads);
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y);
          kernel();
          __syncthreads();
        }
    });
  for (std::thread& thread : team) thread.join();
}

inline int atomicAdd(int* target, int value) { return __atomic_fetch_add(target, value, __ATOMIC_SEQ_CST); }

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

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
using std::isfinite, std::isnan;
