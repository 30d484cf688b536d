// The screen's product where rows are few: every weight is read once, as fast as memory gives it.
#include <cstring>

#include "cuda/kernels/element.cuh"
#include "cuda/kernels/kernels.h"
#include "cuda/kernels/launch.cuh"

namespace sparse_transcoder::cuda {
namespace {

constexpr int warp_features = 4;  // that share what a warp reads of x

constexpr int part = 4;  // inputs per lane that are multiplied at a time

// A lane's next `width` weights of one feature, as they are stored: read in one access that leaves
// the caches to x, and widened only when they are used.
template <typename Weight, int width>
struct Packed {
  static_assert(sizeof(Weight) * width == 16);
  uint4 word;

  __device__ void load(const Weight* from) { word = __ldcs(reinterpret_cast<const uint4*>(from)); }
  __device__ Weight operator[](int i) const {
    Weight values[width];
    memcpy(values, &word, sizeof(word));
    return values[i];
  }
  // Moves the second half of the weights to the front.
  __device__ void drop_part() { word = {word.z, word.w, 0, 0}; }
};

template <typename Weight>
struct Packed<Weight, 1> {
  Weight value;

  __device__ void load(const Weight* from) { value = *from; }
  __device__ Weight operator[](int) const { return value; }
  __device__ void drop_part() {}
};

template <int count>
__device__ void load_inputs(const float* from, float (&to)[count]) {
  if constexpr (count == 4) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    memcpy(to, &four, sizeof(four));
  } else {
    static_assert(count == 1);
    to[0] = from[0];
  }
}

// Three blocks per multiprocessor where that leaves enough registers: then enough loads are under
// way to keep the memory busy.
constexpr int blocks_at_once(int max_rows) { return max_rows > 1 ? 3 : 4; }

// One warp for warp_features features. Each lane takes `width` inputs at a time. Rows from
// row_count on and features from `count` on repeat the last one and are not written.
template <typename Weight, int max_rows, int width>
__global__ void __launch_bounds__(threads, blocks_at_once(max_rows))
    product_few_rows_kernel(const float* __restrict__ x, int row_count,
                            const Weight* __restrict__ w, int64_t count, int64_t size,
                            float* __restrict__ scores) {
  constexpr int inputs_at_once = width < part ? width : part;
  const int lane = threadIdx.x % 32;
  // What all warps of the block share is 64 bits wide and needs no register of a lane.
  const int64_t block_first = int64_t{blockIdx.x} * (warps * warp_features);
  w += block_first * size;
  scores += block_first;
  const int first = int(threadIdx.x / 32) * warp_features, left = int(count - block_first);
  if (first >= left) return;
  const Weight* feature = w + first * int(size);
  const int last = min(warp_features, left - first) - 1;
  float sums[warp_features][max_rows] = {};
#pragma unroll(max_rows == 1 ? 2 : 1)
  for (int i = lane * width; i < int(size); i += 32 * width) {
    Packed<Weight, width> packed[warp_features];
#pragma unroll
    for (int f = 0; f < warp_features; ++f)
      packed[f].load(feature + (min(f, last) * int(size) + i));
#pragma unroll 1
    for (int begin = 0; begin < width; begin += inputs_at_once) {
      float weights[warp_features][inputs_at_once];
#pragma unroll
      for (int f = 0; f < warp_features; ++f)
#pragma unroll
        for (int j = 0; j < inputs_at_once; ++j) weights[f][j] = widen(packed[f][j]);
#pragma unroll
      for (int f = 0; f < warp_features; ++f) packed[f].drop_part();
#pragma unroll
      for (int r = 0; r < max_rows; ++r) {
        float inputs[inputs_at_once];
        load_inputs(x + (min(r, row_count - 1) * int(size) + i + begin), inputs);
#pragma unroll
        for (int j = 0; j < inputs_at_once; ++j)
#pragma unroll
          for (int f = 0; f < warp_features; ++f)
            sums[f][r] = fmaf(inputs[j], weights[f][j], sums[f][r]);
      }
    }
  }
#pragma unroll
  for (int f = 0; f < warp_features; ++f)
#pragma unroll
    for (int r = 0; r < max_rows; ++r) {
      float sum = sums[f][r];
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2)
        sum += __shfl_down_sync(all_lanes, sum, distance);
      if (lane == 0 && r < row_count && f <= last) scores[r * count + first + f] = sum;
    }
}

template <typename Weight, int width>
int multiply(const float* x, int rows, const Weight* w, int64_t count, int64_t size, float* scores,
             Queue& queue) {
  const auto kernel = rows == 1   ? product_few_rows_kernel<Weight, 1, width>
                      : rows == 2 ? product_few_rows_kernel<Weight, 2, width>
                      : rows <= 4 ? product_few_rows_kernel<Weight, 4, width>
                                  : product_few_rows_kernel<Weight, 8, width>;
  constexpr int64_t block_features = warps * warp_features;
  const dim3 grid(unsigned((count + block_features - 1) / block_features));
  return launch(kernel, grid, queue, x, rows, w, count, size, scores);
}

}  // namespace

int product_few_rows(const float* x, int64_t rows, const void* w, Dtype dtype, int64_t first,
                     int64_t count, int64_t size, float* scores, Queue& queue) {
  return for_dtype(dtype, [&](auto type) {
    using Weight = decltype(type);
    constexpr int width = 16 / sizeof(Weight);
    const auto* weights = static_cast<const Weight*>(w) + first * size;
    if (size % width == 0 && reinterpret_cast<uintptr_t>(weights) % 16 == 0)
      return multiply<Weight, width>(x, int(rows), weights, count, size, scores, queue);
    return multiply<Weight, 1>(x, int(rows), weights, count, size, scores, queue);
  });
}

}  // namespace sparse_transcoder::cuda
