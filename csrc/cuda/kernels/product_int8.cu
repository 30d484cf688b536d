// The int8 screen's product: every weight is one byte that is read once, as fast as memory gives
// it.
#include "cuda/kernels/element.cuh"
#include "cuda/kernels/kernels.h"
#include "cuda/kernels/launch.cuh"

namespace sparse_transcoder::cuda {
namespace {

constexpr int width = 16;  // inputs per lane that are multiplied at a time

// Features that share what a warp reads of rows: as many as leave registers for three blocks per
// multiprocessor, which keep the memory busy.
template <int max_rows>
constexpr int features_of_warp = max_rows > 4 ? 3 : 4;

// The sum of 16 products and `sum`, modulo 2^32.
__device__ int dot(const uint4& a, const uint4& b, int sum) {
  sum = __dp4a(int(a.x), int(b.x), sum);
  sum = __dp4a(int(a.y), int(b.y), sum);
  sum = __dp4a(int(a.z), int(b.z), sum);
  return __dp4a(int(a.w), int(b.w), sum);
}

// One warp for warp_features features. Features from `count` on repeat the last one. What is summed
// up for them, and for rows from row_count on, is not written. Sums wrap around on the way; what
// those of rows end at does not.
template <int max_rows>
__global__ void __launch_bounds__(threads, 3)
    product_int8_kernel(const int8_t* __restrict__ rows, int row_count,
                        const int8_t* __restrict__ w, const float* __restrict__ scale,
                        int64_t count, int inputs, float* __restrict__ scores) {
  constexpr int warp_features = features_of_warp<max_rows>;
  const int lane = threadIdx.x % 32;
  const int64_t block_first = int64_t{blockIdx.x} * (warps * warp_features);
  w += block_first * inputs;
  scale += block_first;
  scores += block_first;
  const int first = int(threadIdx.x / 32) * warp_features, left = int(count - block_first);
  if (first >= left) return;
  const int8_t* feature = w + first * inputs;
  const int last = min(warp_features, left - first) - 1;
  int sums[warp_features][max_rows] = {};
#pragma unroll(max_rows == 1 ? 2 : 1)
  for (int i = lane * width; i < inputs; i += 32 * width) {
    uint4 weights[warp_features];
#pragma unroll
    for (int f = 0; f < warp_features; ++f)
      weights[f] = __ldcs(reinterpret_cast<const uint4*>(feature + (min(f, last) * inputs + i)));
#pragma unroll
    for (int r = 0; r < max_rows; ++r) {
      const int8_t* row = rows + (r * int8_row_bytes + i);
      const uint4 high = *reinterpret_cast<const uint4*>(row),
                  low = *reinterpret_cast<const uint4*>(row + int8_plane_bytes);
#pragma unroll
      for (int f = 0; f < warp_features; ++f) {
        const unsigned both = unsigned(sums[f][r]) + (unsigned(dot(high, weights[f], 0)) << 8);
        sums[f][r] = dot(low, weights[f], int(both));
      }
    }
  }
#pragma unroll
  for (int r = 0; r < max_rows; ++r) {
    const float row_scale =
        *reinterpret_cast<const float*>(rows + (r * int8_row_bytes + 2 * int8_plane_bytes));
#pragma unroll
    for (int f = 0; f < warp_features; ++f) {
      unsigned sum = unsigned(sums[f][r]);
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2)
        sum += __shfl_down_sync(all_lanes, sum, distance);
      // In this order nothing on the way is too small or too large for float32.
      if (lane == 0 && r < row_count && f <= last)
        scores[first + f] = float(int(sum)) * row_scale * scale[first + f];
    }
    scores += count;
  }
}

template <int max_rows>
int multiply(const int8_t* rows, int row_count, const int8_t* w, const float* scale, int64_t count,
             int inputs, float* scores, Queue& queue) {
  constexpr int64_t block_features = warps * features_of_warp<max_rows>;
  const dim3 grid(unsigned((count + block_features - 1) / block_features));
  return launch(product_int8_kernel<max_rows>, grid, queue, rows, row_count, w, scale, count,
                inputs, scores);
}

}  // namespace

int product_int8(const int8_t* rows, int64_t row_count, const int8_t* w, const float* scale,
                 int64_t first, int64_t count, int64_t inputs, float* scores, Queue& queue) {
  const auto multiply_rows = row_count == 1   ? multiply<1>
                             : row_count == 2 ? multiply<2>
                             : row_count <= 4 ? multiply<4>
                                              : multiply<8>;
  return multiply_rows(rows, int(row_count), w + first * inputs, scale + first, count, int(inputs),
                       scores, queue);
}

}  // namespace sparse_transcoder::cuda
