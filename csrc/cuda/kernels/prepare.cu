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

// y = R x for the inputs begin + 32 j + lane. Each of the seven steps rounds every number once.
__device__ void rotate(const float* x, int size, int begin, float (&y)[4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int i = begin + 32 * j + lane;
    const float value = i < size ? x[i] : 0;
    y[j] = flips_sign(unsigned(i)) ? -value : value;
  }
#pragma unroll
  for (int half = 1; half < 4; half *= 2)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & half) continue;
      const float sum = y[j] + y[j + half], difference = y[j] - y[j + half];
      y[j] = sum;
      y[j + half] = difference;
    }
#pragma unroll
  for (int half = 1; half < 32; half *= 2)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float other = __shfl_xor_sync(all_lanes, y[j], half);
      y[j] = lane & half ? other - y[j] : y[j] + other;
    }
}
static_assert(int8_mixed == 128);

// Rotates and quantises a row whose squares add up to `squares`: y = R x is about scale * q.
// Returns at least ||x - x'||, where R x' = scale * q. All threads of the block take part.
//
// |q| <= 127 * 256 for two bytes, and ||q|| * max_norm < 2^31, so that by Cauchy-Schwarz no sum
// leaves int32: rounding to integers adds at most sqrt(inputs) / 2 <= 2^7 to ||q||, and max_norm is
// at most 127 * 2^8.
__device__ double quantise(const float* x, int size, double squares, const Int8Rows& int8) {
  constexpr double rotation_rounding = 14 * unit_roundoff;  // twice that of seven additions
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int8_t* high = int8.rows + blockIdx.x * int8_row_bytes;
  int8_t* low = high + int8_plane_bytes;
  __shared__ int max_bits;  // of magnitudes, which order like their bits; NaN is the largest
  if (threadIdx.x == 0) max_bits = 0;
  __syncthreads();
  int bits = 0;
#pragma unroll 2
  for (int begin = warp * int8_mixed; begin < int8.inputs; begin += warps * int8_mixed) {
    float y[4];
    rotate(x, size, begin, y);
#pragma unroll
    for (int j = 0; j < 4; ++j) bits = max(bits, int(__float_as_uint(y[j]) & 0x7fffffffu));
  }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2)
    bits = max(bits, __shfl_xor_sync(all_lanes, bits, distance));
  if (lane == 0) atomicMax(&max_bits, bits);
  __syncthreads();
  const float max_y = __uint_as_float(unsigned(max_bits)),
              shortest = float(sqrt(int8_mixed * squares) * int8.max_norm * 0x1.02p-31),
              scale = max_y / (127 * 256) < shortest ? shortest : max_y / (127 * 256);
  const bool usable = scale >= min_int8_scale && scale <= max_int8_scale;
  const float inverse = 1 / scale;
  double error_squares[1] = {0};
#pragma unroll 2
  for (int begin = warp * int8_mixed; begin < int8.inputs; begin += warps * int8_mixed) {
    float y[4];
    rotate(x, size, begin, y);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = begin + 32 * j + lane, q = usable ? int(rintf(y[j] * inverse)) : 0,
                upper = (q + 128) >> 8;
      const double error = double(y[j]) - double(scale) * q;
      high[i] = int8_t(upper);
      low[i] = int8_t(q - upper * 256);
      error_squares[0] = fma(error, error, error_squares[0]);
    }
  }
  if (threadIdx.x == 0) *reinterpret_cast<float*>(low + int8_plane_bytes) = usable ? scale : 0;
  block_sums(error_squares);
  if (!usable) return sqrt(squares);
  return sqrt(error_squares[0] / int8_mixed) + rotation_rounding * sqrt(squares);
}

// |x . w - score| <= |(x - x') . w| + |x' . (w - w')| + rounding ||x'|| ||w'||, each by
// Cauchy-Schwarz, with ||w'|| <= (1 + residual) ||w||. Rounded up. Numbers that are all under the
// normal range lose more, relatively: they count as of that range, as they do in Layer::norm.
//
// Of int8 copies it is error ||w|| + norm (||w - w'|| + rounding ||w||), and so at most `margin`
// times ||w - w'|| + share ||w||.
__device__ float margin_of(double squares, double error, int size, const ScreenErrors& errors) {
  const double norm = fmax(sqrt(squares) + error, min_norm_per_root * sqrt(double(size)));
  double margin =
      error + norm * (errors.residual + errors.rounding * (1 + double(errors.residual)));
  if (errors.share > 0) margin = fmax(margin / errors.share, norm);
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
  if (threadIdx.x == 0) lists.computed_count[blockIdx.x] = 0;
}

// One block per row.
template <typename Hidden>
__global__ void __launch_bounds__(threads, 4)
    prepare_kernel(PrepareArgs args, ScreenErrors errors, float* __restrict__ x,
                   __nv_bfloat16* __restrict__ rounded, Int8Rows int8, Margin* __restrict__ margins,
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
  const double error = int8.rows ? quantise(out, size, squares[0], int8) : sqrt(squares[1]);
  if (threadIdx.x == 0) margins[blockIdx.x] = {margin_of(squares[0], error, size, errors), 0};
}

}  // namespace

int prepare(const PrepareArgs& args, const ScreenErrors& errors, float* x, void* rounded,
            const Int8Rows& int8, Margin* margins, const CandidateLists& lists, Queue& queue) {
  return for_dtype(args.dtype, [&](auto type) {
    return launch(prepare_kernel<decltype(type)>, dim3(unsigned(args.count)), queue, args, errors,
                  x, static_cast<__nv_bfloat16*>(rounded), int8, margins, lists);
  });
}

}  // namespace sparse_transcoder::cuda
