// One block a row (and a group of features). Exact values are computed as on the CPU, bit for bit: a warp's 32 lanes are the 32
// partial sums, a product of two float32 is exact in float64, and the shuffles fold in the same order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>

#include "cuda.h"

namespace sparse_transcoder::kernels::cuda {
namespace {

constexpr int threads = 256;

__device__ float widen(float value) { return value; }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ float widen(__half value) { return __half2float(value); }

__device__ double warp_fold(double sum) {
  for (int width = 16; width > 0; width /= 2) sum += __shfl_down_sync(0xffffffffu, sum, width);
  return sum;
}

// Lane 0 of the calling warp gets sum_i x[i] * w[i].
template <typename Weight>
__device__ double warp_dot(const float* x, const Weight* w, int64_t size) {
  double sum = 0;
  for (int64_t i = threadIdx.x % 32; i < size; i += 32) sum = fma(double(x[i]), double(widen(w[i])), sum);
  return warp_fold(sum);
}

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

// Sorts count keys, descending, in place; count is a power of two. All threads of the block take part.
__device__ void bitonic_sort(uint64_t* keys, int count) {
  for (int width = 2; width <= count; width *= 2)
    for (int step = width / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const int j = i ^ step;
        if (j > i) {
          const bool descending = (i & width) == 0;
          const uint64_t a = keys[i], b = keys[j];
          if (descending ? a < b : a > b) {
            keys[i] = b;
            keys[j] = a;
          }
        }
      }
      __syncthreads();
    }
}

// Sorts the first `size` keys descending; slots up to the next power of two are overwritten with 0, which no kept key equals.
__device__ void sort_list(uint64_t* keys, int size) {
  int count = 1;
  while (count < size) count *= 2;
  for (int i = size + threadIdx.x; i < count; i += blockDim.x) keys[i] = 0;
  __syncthreads();
  bitonic_sort(keys, count);
}

template <typename Hidden>
__global__ void __launch_bounds__(threads)
    prepare_kernel(HiddenRows rows, float roundoff, float largest_norm, float* x, float* margin, Lists lists) {
  const int64_t row = rows.first + blockIdx.x, size = rows.size;
  const auto* h = static_cast<const Hidden*>(rows.hidden) + row / rows.T * rows.stride[0] + row % rows.T * rows.stride[1];
  float* out = x + blockIdx.x * size;
  for (int64_t i = threadIdx.x; i < size; i += threads) {
    const float value = widen(h[i * rows.stride[2]]);
    out[i] = rows.input_bias ? value - rows.input_bias[i] : value;
  }
  if (rows.ln_weight) {  // each thread reads back only what it wrote
    double sum = 0, squares = 0;
    for (int64_t i = threadIdx.x; i < size; i += threads) sum += out[i];
    const double mean = block_sum(sum) / size;
    for (int64_t i = threadIdx.x; i < size; i += threads) squares += (out[i] - mean) * (out[i] - mean);
    const double scale = 1 / sqrt(block_sum(squares) / size + 1e-5);
    for (int64_t i = threadIdx.x; i < size; i += threads)
      out[i] = float((out[i] - mean) * scale * rows.ln_weight[i] + rows.ln_bias[i]);
  }
  double squares = 0;
  for (int64_t i = threadIdx.x; i < size; i += threads) squares = fma(double(out[i]), double(out[i]), squares);
  squares = block_sum(squares);
  if (threadIdx.x == 0) {
    const double norm = fmax(sqrt(squares) * (1 + 0x1p-20), double(FLT_MIN));
    margin[blockIdx.x] = !isfinite(squares)                                      ? NAN
                         : roundoff > 0.5f || norm * double(largest_norm) > 1e37 ? INFINITY
                                                                                 : float(norm * roundoff * (1 + 0x1p-20));
  }
  for (int group = threadIdx.x; group < lists.groups; group += threads) {
    const int64_t list = int64_t{blockIdx.x} * lists.groups + group;
    lists.size[list] = 0;
    lists.least[list] = 0;
    lists.certain[list] = 0;
  }
}

template <typename Weight>
__global__ void __launch_bounds__(threads)
    select_kernel(const float* scores, const float* x, const float* margins, Panel panel, Lists lists) {
  const int row = blockIdx.x, group = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float margin = margins[row];
  if (isnan(margin)) return;
  const int64_t list = int64_t{row} * lists.groups + group;
  uint64_t* keys = lists.keys + list * lists.capacity;
  const float* score = scores + row * panel.count;
  const float* hidden = x + row * panel.size;
  const auto* weights = static_cast<const Weight*>(panel.weights);
  const Gate& gate = panel.gate;

  __shared__ unsigned candidates[segment];
  __shared__ int found, size, certain;
  __shared__ uint64_t least;
  if (threadIdx.x == 0) {
    size = lists.size[list];
    least = lists.least[list];
    certain = 0;
  }
  const int64_t share = (panel.count + lists.groups - 1) / lists.groups;
  const int64_t last = min(panel.count, (group + 1) * share);
  for (int64_t first = group * share; first < last; first += segment) {
    if (threadIdx.x == 0) found = 0;
    __syncthreads();
    float bound = -INFINITY;
    if (least != 0) {
      const double value = __uint_as_float(unsigned(least >> 32));
      bound = float(value - (value + panel.largest_bias) * 0x1p-20 - panel.size * 0x1p-125);
    }
    int sure_count = 0;
    for (int64_t i = first + threadIdx.x; i < min(last, first + segment); i += threads) {
      const float slack = margin * gate.norm[i];
      const float upper = score[i] + slack;
      const bool sure = score[i] - slack >= gate.high[i];
      sure_count += sure;
      // NaN, the margin of a row too large to screen, counts as "may be".
      if (!(upper < gate.low[i]) && (!sure || !(upper < bound - gate.bias[i])))
        candidates[atomicAdd(&found, 1)] = unsigned(i - first) << 1 | !sure;
    }
    if (sure_count) atomicAdd(&certain, sure_count);
    __syncthreads();
    for (int c = warp; c < found; c += threads / 32) {
      const int64_t i = first + (candidates[c] >> 1);
      const double exact = warp_dot(hidden, weights + i * panel.size, panel.size);
      if (lane == 0) {
        const float value = float(exact + gate.bias[i]);
        if (value >= gate.gate[i]) {
          if (candidates[c] & 1) atomicAdd(&certain, 1);
          const uint64_t key = uint64_t{__float_as_uint(value)} << 32 | unsigned(~(panel.first + i));
          if (key > least) keys[atomicAdd(&size, 1)] = key;
        }
      }
    }
    __syncthreads();
    if (size + segment > lists.capacity) {
      sort_list(keys, size);
      if (threadIdx.x == 0) {
        size = lists.k;
        least = keys[lists.k - 1];
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    lists.size[list] = size;
    lists.least[list] = least;
    lists.certain[list] += certain;
  }
}

__global__ void __launch_bounds__(threads) finish_kernel(Lists lists, const float* margins, int64_t features, int64_t most_active,
                                                         int64_t top_k, float* activations, int64_t* indices, float* sparsity) {
  const int64_t row = blockIdx.x;
  activations += row * top_k;
  indices += row * top_k;
  if (isnan(margins[row])) {
    for (int64_t i = threadIdx.x; i < top_k; i += threads) {
      activations[i] = NAN;
      indices[i] = i;
    }
    if (threadIdx.x == 0) sparsity[row] = NAN;
    return;
  }
  uint64_t* keys = lists.keys + row * lists.groups * lists.capacity;
  const int64_t first_list = row * lists.groups;
  int64_t active = 0;
  int size = lists.size[first_list];
  active += lists.certain[first_list];
  for (int group = 1; group < lists.groups; ++group) {  // merge into the first list, whose capacity holds two cut ones
    uint64_t* more = keys + int64_t{group} * lists.capacity;
    const int added = lists.size[first_list + group];
    active += lists.certain[first_list + group];
    if (size > lists.k) sort_list(keys, size);
    if (added > lists.k) sort_list(more, added);
    size = min(size, lists.k);
    const int kept = min(added, lists.k);
    for (int i = threadIdx.x; i < kept; i += threads) keys[size + i] = more[i];
    size += kept;
    __syncthreads();
  }
  sort_list(keys, size);
  const int winners = min(size, lists.k);
  for (int i = threadIdx.x; i < winners; i += threads) {
    activations[i] = __uint_as_float(unsigned(keys[i] >> 32));
    indices[i] = unsigned(~keys[i]);
  }
  if (threadIdx.x == 0) sparsity[row] = float(double(min(active, most_active)) / double(features));
  if (winners == top_k) return;
  __syncthreads();
  // Winners by ascending index: the complement sorts them so; slot j of the rest is the feature with j lower ones that did not
  // win.
  for (int i = threadIdx.x; i < winners; i += threads) keys[i] = unsigned(keys[i]);
  __syncthreads();
  sort_list(keys, winners);
  for (int64_t slot = threadIdx.x; slot < top_k - winners; slot += threads) {
    int64_t feature = slot;
    for (int i = 0; i < winners && int64_t{unsigned(~keys[i])} <= feature; ++i) ++feature;
    activations[winners + slot] = 0;
    indices[winners + slot] = feature;
  }
}

template <typename Run>
int for_dtype(Dtype dtype, const Run& run) {
  if (dtype == Dtype::float32) run(float());
  if (dtype == Dtype::bfloat16) run(__nv_bfloat16());
  if (dtype == Dtype::float16) run(__half());
  return cudaGetLastError();
}

}  // namespace

int prepare(const HiddenRows& rows, float roundoff, float largest_norm, float* x, float* margin, const Lists& lists,
            void* stream) {
  return for_dtype(rows.dtype, [&](auto type) {
    const auto kernel = prepare_kernel<decltype(type)>;
    kernel<<<unsigned(rows.count), threads, 0, static_cast<cudaStream_t>(stream)>>>(rows, roundoff, largest_norm, x, margin,
                                                                                    lists);
  });
}

int select(const float* scores, const float* x, const float* margin, int64_t rows, const Panel& panel, const Lists& lists,
           void* stream) {
  const dim3 grid(unsigned(rows), unsigned(lists.groups));
  return for_dtype(panel.dtype, [&](auto type) {
    const auto kernel = select_kernel<decltype(type)>;
    kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(scores, x, margin, panel, lists);
  });
}

int finish(const Lists& lists, const float* margin, int64_t rows, int64_t features, int64_t most_active, int64_t top_k,
           float* activations, int64_t* indices, float* sparsity, void* stream) {
  const auto kernel = finish_kernel;
  kernel<<<unsigned(rows), threads, 0, static_cast<cudaStream_t>(stream)>>>(lists, margin, features, most_active, top_k,
                                                                            activations, indices, sparsity);
  return cudaGetLastError();
}

}  // namespace sparse_transcoder::kernels::cuda
