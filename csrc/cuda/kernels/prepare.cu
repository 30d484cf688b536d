// Rows made ready for a screen, with their margins.
#include <cmath>

#include "bounds.h"
#include "cuda/kernels/element.cuh"
#include "cuda/kernels/kernels.h"
#include "cuda/kernels/launch.cuh"

namespace sparse_transcoder::cuda {
namespace {

constexpr int batch = 10;  // numbers per thread that are loaded before the first is used

// Calls use(i, load(i)) for the thread's share of [0, size), in ascending order.
template <typename Load, typename Use>
__device__ void for_each(int size, const Load& load, const Use& use) {
  for (int begin = threadIdx.x; begin < size; begin += batch * threads) {
    float values[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      const int i = begin + j * threads;
      values[j] = i < size ? load(i) : 0;
    }
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      const int i = begin + j * threads;
      if (i < size) use(i, values[j]);
    }
  }
}

// Replaces each of the `count` values by its sum over all threads. Halves of the block are added up
// again and again, so the order is fixed.
template <int count>
__device__ void block_sums(double (&values)[count]) {
  __shared__ double parts[count][threads], totals[count];
#pragma unroll
  for (int c = 0; c < count; ++c) parts[c][threadIdx.x] = values[c];
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < count) {
    double sums[warps];
#pragma unroll
    for (int j = 0; j < warps; ++j) sums[j] = parts[warp][32 * j + lane];
#pragma unroll
    for (int width = warps / 2; width > 0; width /= 2)
#pragma unroll
      for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
    double sum = sums[0];
#pragma unroll
    for (int width = 16; width > 0; width /= 2) sum += __shfl_down_sync(all_lanes, sum, width);
    if (lane == 0) totals[warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < count; ++c) values[c] = totals[c];
}

// Replaces x by its LayerNorm. Each thread reads back only what it wrote.
__device__ void layer_norm(float* x, int size, const float* ln_weight, const float* ln_bias) {
  const auto load = [&](int i) { return x[i]; };
  double sum[1] = {0}, squares[1] = {0};
  for_each(size, load, [&](int, float value) { sum[0] += value; });
  block_sums(sum);
  const double mean = sum[0] / size;
  for_each(size, load, [&](int, float value) { squares[0] += (value - mean) * (value - mean); });
  block_sums(squares);
  const double scale = 1 / sqrt(squares[0] / size + 1e-5);
  for_each(size, load, [&](int i, float value) {
    x[i] = float((value - mean) * scale * ln_weight[i] + ln_bias[i]);
  });
}

// |x . w - score| <= |(x - x') . w| + |x' . (w - w')| + rounding ||x'|| ||w'||, each by
// Cauchy-Schwarz, with ||w'|| <= (1 + residual) ||w||. Rounded up. Numbers that are all under the
// normal range lose more, relatively: they count as of that range, as they do in Layer::norm.
__device__ float margin_of(double squares, double error_squares, int size,
                           const ScreenErrors& errors) {
  const double error = sqrt(error_squares),
               norm = fmax(sqrt(squares) + error, min_norm_per_root * sqrt(double(size)));
  const double margin =
      error + norm * (errors.residual + errors.rounding * (1 + double(errors.residual)));
  if (!isfinite(squares)) return NAN;
  if (!(errors.rounding < 0.5f &&
        norm * (double(errors.max_norm) + min_norm_per_root) < max_screened_product))
    return INFINITY;
  return float(margin * round_up + 0x1p-149);
}

__device__ void empty_lists(const CandidateLists& lists) {
  for (int group = threadIdx.x; group < lists.groups; group += threads) {
    const int64_t list = int64_t{blockIdx.x} * lists.groups + group;
    lists.deferred_count[list] = lists.exact_count[list] = lists.active_count[list] = 0;
    lists.kth_best[list] = 0;
  }
}

// One block per row.
template <typename Hidden>
__global__ void __launch_bounds__(threads)
    prepare_kernel(PrepareArgs args, ScreenErrors errors, float* __restrict__ x,
                   __nv_bfloat16* __restrict__ rounded, Margin* __restrict__ margins,
                   CandidateLists lists) {
  const LayerPointers layer = *args.layer;  // a copy: no store below can change it
  const int64_t row = args.first + blockIdx.x, step = layer.stride[2];
  const int size = int(args.size);
  const Hidden* __restrict__ hidden = static_cast<const Hidden*>(layer.hidden) +
                                      row / layer.T * layer.stride[0] +
                                      row % layer.T * layer.stride[1];
  float* out = x + blockIdx.x * args.size;
  __nv_bfloat16* near = rounded ? rounded + blockIdx.x * args.size : nullptr;
  empty_lists(lists);
  double squares[2] = {0, 0};  // of x, and of what rounding takes from it
  const auto measure = [&](int i, float value) {
    squares[0] = fma(double(value), double(value), squares[0]);
    if (near) {
      const __nv_bfloat16 nearest = __float2bfloat16(value);
      const double error = double(value) - widen(nearest);
      near[i] = nearest;
      squares[1] = fma(error, error, squares[1]);
    }
  };
  const auto load = [&](int i) {
    const float value = widen(hidden[i * step]);
    return args.input_bias ? value - args.input_bias[i] : value;
  };
  if (args.ln_weight) {
    for_each(size, load, [&](int i, float value) { out[i] = value; });
    layer_norm(out, size, args.ln_weight, args.ln_bias);
    for_each(size, [&](int i) { return out[i]; }, measure);
  } else {
    for_each(size, load, [&](int i, float value) {
      out[i] = value;
      measure(i, value);
    });
  }
  block_sums(squares);
  if (threadIdx.x == 0) margins[blockIdx.x] = {margin_of(squares[0], squares[1], size, errors), 0};
}

}  // namespace

int prepare(const PrepareArgs& args, const ScreenErrors& errors, float* x, void* rounded,
            Margin* margins, const CandidateLists& lists, Queue& queue) {
  return for_dtype(args.dtype, [&](auto type) {
    return launch(prepare_kernel<decltype(type)>, dim3(unsigned(args.count)), queue, args, errors,
                  x, static_cast<__nv_bfloat16*>(rounded), margins, lists);
  });
}

}  // namespace sparse_transcoder::cuda
