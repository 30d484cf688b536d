// Rows made ready for a screen, with their margins; and the screen's product where rows are few.
#include <cfloat>
#include <cmath>
#include <cstring>

#include "cuda/kernels/element.cuh"
#include "cuda/kernels/kernels.h"

namespace sparse_transcoder::cuda {
namespace {

// The sum of every thread's value, to all threads; in a fixed order.
__device__ double block_sum(double value) {
  __shared__ double sums[threads];
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int width = threads / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
    __syncthreads();
  }
  const double total = sums[0];
  __syncthreads();
  return total;
}

// One block a row.
template <typename Hidden>
__global__ void __launch_bounds__(threads)
    prepare_kernel(Rows rows, Screen screen, float* x, __nv_bfloat16* rounded, float* margin,
                   Lists lists) {
  const Io& io = *rows.io;
  const int64_t row = rows.first + blockIdx.x, size = rows.size;
  const auto* h =
      static_cast<const Hidden*>(io.hidden) + row / io.T * io.stride[0] + row % io.T * io.stride[1];
  float* out = x + blockIdx.x * size;
  for (int64_t i = threadIdx.x; i < size; i += threads) {
    const float value = widen(h[i * io.stride[2]]);
    out[i] = rows.input_bias ? value - rows.input_bias[i] : value;
  }
  if (rows.ln_weight) {  // each thread reads back only what it wrote
    double sum = 0, squares = 0;
    for (int64_t i = threadIdx.x; i < size; i += threads) sum += out[i];
    const double mean = block_sum(sum) / size;
    for (int64_t i = threadIdx.x; i < size; i += threads)
      squares += (out[i] - mean) * (out[i] - mean);
    const double scale = 1 / sqrt(block_sum(squares) / size + 1e-5);
    for (int64_t i = threadIdx.x; i < size; i += threads)
      out[i] = float((out[i] - mean) * scale * rows.ln_weight[i] + rows.ln_bias[i]);
  }
  double squares = 0, off_squares = 0;
  for (int64_t i = threadIdx.x; i < size; i += threads) {
    const double value = out[i];
    squares = fma(value, value, squares);
    if (rounded) {
      rounded[blockIdx.x * size + i] = __float2bfloat16(out[i]);
      const double off = value - widen(rounded[blockIdx.x * size + i]);
      off_squares = fma(off, off, off_squares);
    }
  }
  squares = block_sum(squares);
  off_squares = block_sum(off_squares);
  if (threadIdx.x == 0) {
    // |x.w - score| <= |(x - x').w| + |x'.(w - w')| + roundoff ||x'|| ||w'||, each by
    // Cauchy-Schwarz, with
    // ||w'|| <= (1 + residual) ||w||. Rounded up. Numbers that are all under the normal range lose
    // more, relatively: they count as of that range, as they do in Layer::norm.
    const double off = sqrt(off_squares),
                 norm = fmax(sqrt(squares) + off, double(FLT_MIN) * sqrt(double(size)));
    const double slack =
        off + norm * (screen.residual + screen.roundoff * (1 + double(screen.residual)));
    margin[blockIdx.x] =
        !isfinite(squares) ? NAN
        : !(screen.roundoff < 0.5f && norm * (double(screen.largest_norm) + FLT_MIN) < 1e37)
            ? INFINITY
            : float(slack * (1 + 0x1p-20) + 0x1p-149);
  }
  for (int group = threadIdx.x; group < lists.groups; group += threads) {
    const int64_t list = int64_t{blockIdx.x} * lists.groups + group;
    lists.open_size[list] = lists.keys_size[list] = lists.certain[list] = 0;
    lists.least[list] = 0;
  }
}

template <int bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<2> {
  using type = unsigned short;
};

template <int width>
__device__ void load(const float* from, float (&to)[width]) {
  if constexpr (width % 4 == 0) {
#pragma unroll
    for (int i = 0; i < width; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      memcpy(to + i, &four, sizeof(four));
    }
  } else {
    for (int i = 0; i < width; ++i) to[i] = from[i];
  }
}

constexpr int warp_features = 4;  // share what a warp reads of x

// One warp for warp_features features. Each lane takes `width` inputs at a time, weights in one
// access that leaves the caches to x. Rows from `rows` on and features from `count` on repeat the
// last one and are not written.
template <typename Weight, int most_rows, int width>
__global__ void __launch_bounds__(threads)
    multiply_few_kernel(const float* x, int rows, const Weight* w, int64_t count, int64_t size,
                        float* scores) {
  using Word = typename Word<sizeof(Weight) * width>::type;
  const int lane = threadIdx.x % 32;
  const int64_t first = (int64_t{blockIdx.x} * (threads / 32) + threadIdx.x / 32) * warp_features;
  if (first >= count) return;
  const Weight* features[warp_features];
  for (int f = 0; f < warp_features; ++f) features[f] = w + min(first + f, count - 1) * size;
  float sums[warp_features][most_rows] = {};
  for (int64_t i = lane * width; i < size; i += 32 * width) {
    Weight values[warp_features][width];
#pragma unroll
    for (int f = 0; f < warp_features; ++f) {
      const Word word = __ldcs(reinterpret_cast<const Word*>(features[f] + i));
      memcpy(values[f], &word, sizeof(word));
    }
#pragma unroll
    for (int r = 0; r < most_rows; ++r) {
      float inputs[width];
      load(x + min(r, rows - 1) * size + i, inputs);
#pragma unroll
      for (int j = 0; j < width; ++j)
#pragma unroll
        for (int f = 0; f < warp_features; ++f)
          sums[f][r] = fmaf(inputs[j], widen(values[f][j]), sums[f][r]);
    }
  }
#pragma unroll
  for (int f = 0; f < warp_features; ++f)
#pragma unroll
    for (int r = 0; r < most_rows; ++r) {
      float sum = sums[f][r];
      for (int distance = 16; distance > 0; distance /= 2)
        sum += __shfl_down_sync(0xffffffffu, sum, distance);
      if (lane == 0 && r < rows && first + f < count) scores[r * count + first + f] = sum;
    }
}

template <typename Weight, int width>
void multiply_few_rows(const float* x, int rows, const Weight* w, int64_t count, int64_t size,
                       float* scores, void* stream) {
  const auto kernel = rows == 1   ? multiply_few_kernel<Weight, 1, width>
                      : rows == 2 ? multiply_few_kernel<Weight, 2, width>
                      : rows <= 4 ? multiply_few_kernel<Weight, 4, width>
                                  : multiply_few_kernel<Weight, 8, width>;
  constexpr int64_t block_features = threads / 32 * warp_features;
  const dim3 grid(unsigned((count + block_features - 1) / block_features));
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(x, rows, w, count, size, scores);
}

}  // namespace

int prepare(const Rows& rows, const Screen& screen, float* x, void* rounded, float* margin,
            const Lists& lists, void* stream) {
  return for_dtype(rows.dtype, [&](auto type) {
    const auto kernel = prepare_kernel<decltype(type)>;
    const dim3 grid(unsigned(rows.count));
    kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(
        rows, screen, x, static_cast<__nv_bfloat16*>(rounded), margin, lists);
  });
}

int multiply_few(const float* x, int64_t rows, const void* w, Dtype dtype, int64_t first,
                 int64_t count, int64_t size, float* scores, void* stream) {
  return for_dtype(dtype, [&](auto type) {
    using Weight = decltype(type);
    constexpr int width = 4;
    const auto* weights = static_cast<const Weight*>(w) + first * size;
    if (size % width == 0 && reinterpret_cast<uintptr_t>(weights) % (width * sizeof(Weight)) == 0)
      multiply_few_rows<Weight, width>(x, int(rows), weights, count, size, scores, stream);
    else
      multiply_few_rows<Weight, 1>(x, int(rows), weights, count, size, scores, stream);
  });
}

}  // namespace sparse_transcoder::cuda
