// From scores to the k best. Exact values are computed as on the CPU, bit for bit: a warp's 32
// lanes are the 32 partial sums, a product of two float32 is exact in float64, and the shuffles
// fold in the same order.
//
// An activation and its feature are one integer, ordered as cpu::make_key orders them. Of a feature
// that is not computed yet two integers are known that bracket it: its key is that of a value
// between `lower` and `upper`, rounded to float32 as it will be, and rounding keeps the order.
#include <cmath>

#include "cuda/kernels/element.cuh"
#include "cuda/kernels/kernels.h"

namespace sparse_transcoder::cuda {
namespace {

constexpr int in_shared = 1024;  // keys that a block sorts in shared memory

__device__ uint64_t pack(float score, int64_t feature, bool ambiguous) {
  return uint64_t{__float_as_uint(score)} << 32 | unsigned(feature) << 1 | unsigned(ambiguous);
}
__device__ float score_of(uint64_t open) { return __uint_as_float(unsigned(open >> 32)); }
__device__ int64_t feature_of(uint64_t open) { return unsigned(open) >> 1; }
__device__ bool is_ambiguous(uint64_t open) { return open & 1; }

__device__ uint64_t make_key(float value, int64_t feature) {
  return uint64_t{__float_as_uint(value)} << 32 | unsigned(~unsigned(feature));
}

// What a row's screen means for a feature: how far score + bias may be from the exact value.
// Allowed for besides the margin: what float32 numbers under the normal range lose, and the
// roundings of float64 sums with the bias.
struct Bracket {
  double margin;
  FeatureBounds gate;
  double underflow;

  __device__ Bracket(float margin, const Weights& weights)
      : margin(margin), gate(weights.gate), underflow((weights.size + 128) * 0x1p-124) {}

  __device__ double slack(uint64_t open) const {
    const int64_t feature = feature_of(open);
    return margin * gate.norm[feature] + fabs(double(gate.bias[feature])) * 0x1p-50 + underflow;
  }
  __device__ double middle(uint64_t open) const {
    return double(score_of(open)) + gate.bias[feature_of(open)];
  }

  // Under the key of a feature that is surely active; 0 for an ambiguous one, which may have none.
  __device__ uint64_t lower(uint64_t open) const {
    const float value = float(middle(open) - slack(open));
    return is_ambiguous(open) || !(value > 0) ? 0 : uint64_t{__float_as_uint(value)} << 32;
  }
  // Whether it may reach `least`. Written so that NaN may.
  __device__ bool reaches(uint64_t open, uint64_t least) const {
    return !(float(middle(open) + slack(open)) < __uint_as_float(unsigned(least >> 32)));
  }
};

// A row's list, whose parts (one a group) lie `stride` apart; begin[g] of its items are before part
// g.
struct Span {
  const uint64_t* items;
  int64_t stride;
  const int* begin;  // [groups + 1]

  __device__ uint64_t operator[](int i) const {
    int group = 0;
    while (i >= begin[group + 1]) ++group;
    return items[group * stride + i - begin[group]];
  }
};

// The k-th largest of values(0), ... values(count - 1), or a lower bound that exactly k of them
// reach; 0 where fewer than k are not 0. All threads of the block take part. Radix select: digits
// of eight bits from the top.
template <typename Values>
__device__ uint64_t kth_largest(int count, int k, const Values& values) {
  __shared__ int bins[256];
  __shared__ int digit, rank, in_bin;
  uint64_t prefix = 0;
  if (threadIdx.x == 0) rank = k;
  for (int shift = 56; shift >= 0; shift -= 8) {
    bins[threadIdx.x] = 0;
    if (threadIdx.x == 0) digit = -1;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += threads) {
      const uint64_t value = values(i);
      if (value != 0 && (shift == 56 || value >> (shift + 8) == prefix))
        atomicAdd(&bins[value >> shift & 255], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // a lane for eight bins: how many are in its bins and those above
      const int lane = threadIdx.x, wanted = rank;
      int own = 0;
      for (int b = 0; b < 8; ++b) own += bins[lane * 8 + b];
      int reached = own;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int more = __shfl_down_sync(0xffffffffu, reached, distance);
        if (lane + distance < 32) reached += more;
      }
      if (reached >= wanted && reached - own < wanted) {
        int left = wanted - (reached - own), b = lane * 8 + 7;
        for (; bins[b] < left; --b) left -= bins[b];
        digit = b;
        rank = left;
        in_bin = bins[b];
      }
    }
    __syncthreads();
    if (digit < 0) return 0;
    prefix = prefix << 8 | unsigned(digit);
    const bool whole_bin = in_bin == rank;
    __syncthreads();
    if (whole_bin) return prefix << shift;
  }
  return prefix;
}

// Writes the items that are kept to `to`, which may be where the first of them lies; returns how
// many.
template <typename Items, typename Keeps>
__device__ int compact(const Items& items, int count, uint64_t* to, const Keeps& keeps) {
  __shared__ int kept;
  if (threadIdx.x == 0) kept = 0;
  __syncthreads();
  for (int first = 0; first < count; first += threads) {
    const int i = first + int(threadIdx.x);
    const uint64_t item = i < count ? items[i] : 0;
    const bool keep = i < count && keeps(item);
    __syncthreads();  // what is written next lies before what has been read
    if (keep) to[atomicAdd(&kept, 1)] = item;
    __syncthreads();
  }
  const int result = kept;
  __syncthreads();
  return result;
}

// Drops what k others surely beat from both lists and puts the rest together at `open` and `keys`;
// *open_size and *keys_size, in shared memory, become what is left. Returns the least key that k
// features reach, or `least`, if that is larger.
template <typename Items>
__device__ uint64_t thin(const Items& open_items, const Items& key_items, uint64_t* open,
                         uint64_t* keys, int* open_size, int* keys_size, const Bracket& bracket,
                         int k, uint64_t least) {
  const int opens = *open_size, exact = *keys_size;
  if (opens + exact >= k) {
    const uint64_t bound = kth_largest(opens + exact, k, [&](int i) {
      return i < exact ? key_items[i] : bracket.lower(open_items[i - exact]);
    });
    least = max(least, bound);
  }
  __syncthreads();
  const int open_left = compact(open_items, opens, open, [&](uint64_t item) {
    return is_ambiguous(item) || bracket.reaches(item, least);
  });
  const int keys_left = compact(key_items, exact, keys, [&](uint64_t key) { return key >= least; });
  if (threadIdx.x == 0) {
    *open_size = open_left;
    *keys_size = keys_left;
  }
  __syncthreads();
  return least;
}

// sums[j] = x . w[j] for lane 0 of the calling warp, `count` features at a time so that x is
// converted once.
template <int count, typename Weight>
__device__ void warp_dots(const float* x, const Weight* const (&w)[count], int64_t size,
                          double (&sums)[count]) {
  for (int j = 0; j < count; ++j) sums[j] = 0;
#pragma unroll(16 / count)
  for (int64_t i = threadIdx.x % 32; i < size; i += 32) {
    const double input = x[i];
#pragma unroll
    for (int j = 0; j < count; ++j) sums[j] = fma(input, double(widen(w[j][i])), sums[j]);
  }
#pragma unroll
  for (int j = 0; j < count; ++j)
    for (int width = 16; width > 0; width /= 2)
      sums[j] += __shfl_down_sync(0xffffffffu, sums[j], width);
}

// Computes every item of a list that is this warp's (begin, begin + step, ..) and calls found(i,
// item, key), with key 0 where the feature is not active, on lane 0.
template <typename Weight, typename Found>
__device__ void compute(const uint64_t* open, int count, int begin, int step, const float* x,
                        const Weights& weights, const Found& found) {
  constexpr int together = 4;
  const auto* rows = static_cast<const Weight*>(weights.rows);
  for (int i = begin; i < count; i += together * step) {
    const Weight* w[together];
    for (int j = 0; j < together; ++j)
      w[j] = rows + feature_of(open[i + j * step < count ? i + j * step : i]) * weights.size;
    double sums[together];
    if (i + step < count) {
      warp_dots(x, w, weights.size, sums);
    } else {  // alone
      const Weight* const one[1] = {w[0]};
      double sum[1];
      warp_dots(x, one, weights.size, sum);
      sums[0] = sum[0];
    }
    if (threadIdx.x % 32 != 0) continue;
    for (int j = 0; j < together && i + j * step < count; ++j) {
      const uint64_t item = open[i + j * step];
      const int64_t feature = feature_of(item);
      const float value = float(sums[j] + weights.gate.bias[feature]);
      found(i + j * step, item,
            value >= weights.gate.min_active[feature] ? make_key(value, feature) : 0);
    }
  }
}

// What float32 scores are compared with: under the k-th best activation by what the comparison may
// round.
__device__ float bound_of(uint64_t least, const Weights& weights) {
  if (least == 0) return -INFINITY;
  const double value = __uint_as_float(unsigned(least >> 32));
  return float(value - (value + weights.largest_bias) * 0x1p-20 - (weights.size + 128) * 0x1p-124);
}

// One block a row and group of the panel's features.
template <typename Weight>
__global__ void __launch_bounds__(threads)
    select_kernel(const float* scores, const float* x, const float* margins, int64_t first,
                  int64_t count, Weights weights, Lists lists) {
  const int row = blockIdx.x, group = blockIdx.y;
  const float margin = margins[row];
  if (isnan(margin)) return;
  const int64_t list = int64_t{row} * lists.groups + group;
  uint64_t* open = lists.open + list * lists.capacity;
  uint64_t* keys = lists.keys + list * (lists.k + lists.capacity);
  const Bracket bracket(margin, weights);
  const FeatureBounds& gate = weights.gate;

  __shared__ int open_size, keys_size, certain;
  if (threadIdx.x == 0) {
    open_size = lists.open_size[list];
    keys_size = lists.keys_size[list];
    certain = 0;
  }
  uint64_t least = lists.least[list];
  float bound = bound_of(least, weights);
  int sure_count = 0;
  const int64_t share = (count + lists.groups - 1) / lists.groups;
  const int64_t end = min(count, (group + 1) * share);
  const float* score = scores + row * count;
  __syncthreads();
  bool full =
      lists.open_size[list] + segment > lists.capacity;  // open_size may be changing already
  const auto thin_here = [&] {
    least = thin(open, keys, open, keys, &open_size, &keys_size, bracket, lists.k, least);
    bound = bound_of(least, weights);
  };
  for (int64_t begin = group * share; begin < end; begin += segment) {
    if (full) {
      thin_here();
      const bool crowded = open_size + segment > lists.capacity;
      __syncthreads();  // a thread that goes on adds to open_size
      if (crowded) {    // too many near the bound or their gates: compute them
        compute<Weight>(open, open_size, threadIdx.x / 32, threads / 32, x + row * weights.size,
                        weights, [&](int, uint64_t item, uint64_t key) {
                          if (key != 0 && is_ambiguous(item)) atomicAdd(&certain, 1);
                          if (key > least) keys[atomicAdd(&keys_size, 1)] = key;
                        });
        __syncthreads();
        if (threadIdx.x == 0) open_size = 0;
        __syncthreads();
        thin_here();
      }
    }
    constexpr int each = segment / threads;
    int filled = 0;
    float values[each], norms[each], lows[each];
#pragma unroll
    for (int j = 0; j < each; ++j) {
      const int64_t i = begin + j * threads + threadIdx.x;
      const bool inside = i < end;
      values[j] = inside ? __ldcs(score + i) : -INFINITY;
      norms[j] = inside ? gate.norm[first + i] : 0;
      lows[j] = inside ? gate.surely_out_below[first + i] : INFINITY;
    }
#pragma unroll
    for (int j = 0; j < each; ++j) {
      const int64_t i = begin + j * threads + threadIdx.x, feature = first + i;
      const float slack = margin * norms[j], upper = values[j] + slack;
      // Written so that NaN, which a margin or a score that is not finite can give, counts as "may
      // be".
      if (i < end && !(upper < lows[j])) {
        const bool sure = values[j] - slack >= gate.surely_in_from[feature];
        sure_count += sure;
        if (!sure || !(upper < bound - gate.bias[feature])) {
          const int slot = atomicAdd(&open_size, 1);
          open[slot] = pack(values[j], feature, !sure);
          filled = slot + 1;
        }
      }
    }
    // Not read from open_size: another thread may be adding to it again.
    full = __syncthreads_or(filled + segment > lists.capacity);
  }
  if (open_size > max(2 * lists.k, segment / 2)) thin_here();  // the next panel's bound
  if (sure_count) atomicAdd(&certain, sure_count);
  __syncthreads();
  if (threadIdx.x == 0) {
    lists.open_size[list] = open_size;
    lists.keys_size[list] = keys_size;
    lists.least[list] = least;
    lists.certain[list] += certain;
  }
}

// One block a row.
__global__ void __launch_bounds__(threads)
    merge_kernel(const float* margins, Weights weights, Lists lists) {
  const float margin = margins[blockIdx.x];
  if (isnan(margin)) return;
  const int64_t list = int64_t{blockIdx.x} * lists.groups;
  uint64_t* open = lists.open + list * lists.capacity;
  uint64_t* keys = lists.keys + list * (lists.k + lists.capacity);
  __shared__ int open_begin[most_groups + 1], keys_begin[most_groups + 1], open_size, keys_size;
  if (threadIdx.x == 0) {
    int certain = 0;
    open_begin[0] = keys_begin[0] = 0;
    for (int group = 0; group < lists.groups; ++group) {
      open_begin[group + 1] = open_begin[group] + lists.open_size[list + group];
      keys_begin[group + 1] = keys_begin[group] + lists.keys_size[list + group];
      certain += lists.certain[list + group];
    }
    open_size = open_begin[lists.groups];
    keys_size = keys_begin[lists.groups];
    lists.certain[list] = certain;
  }
  __syncthreads();
  const Span opens{open, lists.capacity, open_begin},
      exact{keys, lists.k + lists.capacity, keys_begin};
  thin(opens, exact, open, keys, &open_size, &keys_size, Bracket(margin, weights), lists.k, 0);
  if (threadIdx.x == 0) {
    lists.open_size[list] = open_size;
    lists.keys_size[list] = keys_size;
  }
}

// Blocks (row, part of its list). Neighbouring rows go through their features in about the same
// order: the cache serves them.
template <typename Weight>
__global__ void __launch_bounds__(threads)
    rescore_kernel(const float* x, const float* margins, Weights weights, Lists lists) {
  const int64_t row = blockIdx.x, list = row * lists.groups;
  if (isnan(margins[row])) return;
  uint64_t* open = lists.open + list * lists.capacity;
  const int warp = int(blockIdx.y * (threads / 32) + threadIdx.x / 32),
            warps = int(gridDim.y * (threads / 32));
  compute<Weight>(open, lists.open_size[list], warp, warps, x + row * weights.size, weights,
                  [&](int i, uint64_t item, uint64_t key) {
                    if (key != 0 && is_ambiguous(item)) atomicAdd(&lists.certain[list], 1);
                    open[i] = key;
                  });
}

// Sorts count keys, descending, in place; count is a power of two. All threads of the block take
// part.
__device__ void bitonic_sort(uint64_t* keys, int count) {
  for (int width = 2; width <= count; width *= 2)
    for (int step = width / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < count; i += threads) {
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

// Sorts `size` keys descending; slots up to the next power of two become 0, which no key equals.
__device__ void sort_keys(uint64_t* keys, int size) {
  int count = 1;
  while (count < size) count *= 2;
  for (int i = size + int(threadIdx.x); i < count; i += threads) keys[i] = 0;
  __syncthreads();
  bitonic_sort(keys, count);
}

// One block a row.
__global__ void __launch_bounds__(threads)
    finish_kernel(const Io* io, const float* margins, int64_t first, int64_t features,
                  int64_t most_active, int64_t top_k, int64_t sorted_stride, Lists lists) {
  __shared__ uint64_t shared[in_shared];
  const int64_t row = blockIdx.x, list = row * lists.groups;
  float* activations = io->activations + (first + row) * top_k;
  int64_t* indices = io->indices + (first + row) * top_k;
  float* sparsity = io->sparsity + first + row;
  if (isnan(margins[row])) {
    for (int64_t i = threadIdx.x; i < top_k; i += threads) {
      activations[i] = NAN;
      indices[i] = i;
    }
    if (threadIdx.x == 0) *sparsity = NAN;
    return;
  }
  const uint64_t* computed = lists.open + list * lists.capacity;
  const uint64_t* keys = lists.keys + list * (lists.k + lists.capacity);
  const int open_size = lists.open_size[list], keys_size = lists.keys_size[list];
  const int64_t active = lists.certain[list];
  if (threadIdx.x == 0) *sparsity = float(double(min(active, most_active)) / double(features));

  uint64_t* best = sorted_stride <= in_shared ? shared : lists.sorted + row * sorted_stride;
  const auto key = [&](int i) { return i < keys_size ? keys[i] : computed[i - keys_size]; };
  const uint64_t least = max(kth_largest(open_size + keys_size, lists.k, key), uint64_t{1});
  __shared__ int winners;
  if (threadIdx.x == 0) winners = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < open_size + keys_size; i += threads)
    if (key(i) >= least) best[atomicAdd(&winners, 1)] = key(i);
  __syncthreads();
  sort_keys(best, winners);
  for (int i = threadIdx.x; i < winners; i += threads) {
    activations[i] = __uint_as_float(unsigned(best[i] >> 32));
    indices[i] = unsigned(~best[i]);
  }
  if (winners == top_k) return;
  __syncthreads();
  // By ascending feature: its complement sorts them so. Of the features under winner j, all but j
  // did not win.
  for (int i = threadIdx.x; i < winners; i += threads) best[i] = unsigned(best[i]);
  __syncthreads();
  sort_keys(best, winners);
  for (int64_t slot = threadIdx.x; slot < top_k - winners; slot += threads) {
    int low = 0, high = winners;  // how many winners lie under the slot's feature
    while (low < high) {
      const int middle = (low + high) / 2;
      if (int64_t{unsigned(~best[middle])} - middle <= slot)
        low = middle + 1;
      else
        high = middle;
    }
    activations[winners + slot] = 0;
    indices[winners + slot] = slot + low;
  }
}

int64_t power_of_two(int64_t least) {
  int64_t power = 1;
  while (power < least) power *= 2;
  return power;
}

}  // namespace

int select(const float* scores, const float* x, const float* margin, int64_t rows, int64_t first,
           int64_t count, const Weights& weights, const Lists& lists, void* stream) {
  const dim3 grid(unsigned(rows), unsigned(lists.groups));
  return for_dtype(weights.dtype, [&](auto type) {
    const auto kernel = select_kernel<decltype(type)>;
    kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(scores, x, margin, first, count,
                                                                    weights, lists);
  });
}

int merge(const float* margin, int64_t rows, const Weights& weights, const Lists& lists,
          void* stream) {
  const auto kernel = merge_kernel;
  const dim3 grid(unsigned(rows), 1);
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(margin, weights, lists);
  return cudaGetLastError();
}

int rescore(const float* x, const float* margin, int64_t rows, const Weights& weights,
            const Lists& lists, void* stream) {
  const dim3 grid(unsigned(rows), unsigned(lists.groups));
  return for_dtype(weights.dtype, [&](auto type) {
    const auto kernel = rescore_kernel<decltype(type)>;
    kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(x, margin, weights, lists);
  });
}

int finish(const Io* io, const float* margin, int64_t first, int64_t rows, int64_t features,
           int64_t most_active, int64_t top_k, const Lists& lists, void* stream) {
  const auto kernel = finish_kernel;
  const dim3 grid(unsigned(rows), 1);
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(
      io, margin, first, features, most_active, top_k, power_of_two(lists.k), lists);
  return cudaGetLastError();
}

}  // namespace sparse_transcoder::cuda
