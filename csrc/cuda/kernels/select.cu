// From scores to the k best. Exact values are computed as on the CPU, bit for bit: a warp's 32
// lanes are the 32 partial sums, a product of two float32 numbers is exact in float64, and the
// shuffles fold in the same order.
//
// An activation and its feature are one integer, ordered as on the CPU. For a
// feature that is not computed yet, two integers bracket its key: they are those of a lower and an
// upper bound of its value, rounded to float32 as it will be, and rounding keeps the order.
#include <climits>
#include <cmath>
#include <type_traits>

#include "bounds.h"
#include "cuda/kernels/element.cuh"
#include "cuda/kernels/kernels.h"
#include "cuda/kernels/launch.cuh"

namespace sparse_transcoder::cuda {
namespace {

// Items that a thread keeps in registers. With more, select_kernel would spill: for compute
// capability 10 and later the compiler makes it of more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int held = 2;
#else
constexpr int held = 8;
#endif
constexpr int max_ranked = 2 * threads;     // keys that are sorted by counting
constexpr int max_in_shared = 4 * threads;  // keys that a block sorts in shared memory
constexpr int lane_scores = 8;              // that a lane compares at a time
constexpr int warp_scores = 32 * lane_scores;
static_assert(list_room >= warp_scores);
static_assert(warp_scores == 256);  // so that 8 bits tell them apart

__device__ uint64_t defer(float score, int64_t feature, bool ambiguous) {
  return uint64_t{__float_as_uint(score)} << 32 | unsigned(feature) << 1 | unsigned(ambiguous);
}
__device__ float score_of(uint64_t deferred) { return __uint_as_float(unsigned(deferred >> 32)); }
__device__ int64_t feature_of(uint64_t deferred) { return unsigned(deferred) >> 1; }
__device__ bool is_ambiguous(uint64_t deferred) { return deferred & 1; }

__device__ uint64_t make_key(float value, int64_t feature) {
  return uint64_t{__float_as_uint(value)} << 32 | unsigned(~unsigned(feature));
}

// What a row's scores tell about exact values. Allowed for besides the margin: what float32 numbers
// under the normal range lose, and the roundings of float64 sums with the bias.
struct Bracket {
  double margin;
  FeatureBounds bounds;
  double underflow;

  __device__ Bracket(float margin, const Weights& weights)
      : margin(margin),
        bounds(weights.bounds),
        underflow(sparse_transcoder::underflow(weights.size)) {}

  __device__ double width(uint64_t deferred) const {
    const int64_t feature = feature_of(deferred);
    return margin * bounds.norm[feature] + fabs(double(bounds.bias[feature])) * 0x1p-50 + underflow;
  }
  __device__ double middle(uint64_t deferred) const {
    return double(score_of(deferred)) + bounds.bias[feature_of(deferred)];
  }

  // At or under the key of a feature that is surely active; 0 for an ambiguous one, which may have
  // none.
  __device__ uint64_t lower(uint64_t deferred) const {
    const float value = float(middle(deferred) - width(deferred));
    return is_ambiguous(deferred) || !(value > 0) ? 0 : uint64_t{__float_as_uint(value)} << 32;
  }
  // Whether the feature's key may reach kth_best. Written so that NaN may.
  __device__ bool reaches(uint64_t deferred, uint64_t kth_best) const {
    return !(float(middle(deferred) + width(deferred)) < __uint_as_float(unsigned(kth_best >> 32)));
  }
};

// A row's list, whose parts (one per group) lie `stride` apart. begin[g] items come before part g.
struct JoinedList {
  const uint64_t* items;
  int64_t stride;
  const int* begin;  // [groups + 1]
  int groups;

  __device__ uint64_t operator[](int i) const {
    int low = 0, high = groups;  // the part is in [low, high)
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (begin[middle] <= i ? low : high) = middle;
    }
    return items[low * stride + i - begin[low]];
  }
};

struct Bin {
  int digit;  // negative where the bins hold fewer numbers than the rank
  int rank;   // within the bin
  int count;
};

// The bin that holds the number of a rank (1: the largest), counted from the highest bin down. Each
// warp finds it for itself; a lane looks at eight bins.
__device__ Bin bin_of_rank(const int* bins, int rank) {
  const int lane = threadIdx.x % 32;
  int counts[8];
#pragma unroll
  for (int b = 0; b < 8; b += 4) {
    const int4 four = *reinterpret_cast<const int4*>(bins + lane * 8 + b);
    counts[b] = four.x, counts[b + 1] = four.y, counts[b + 2] = four.z, counts[b + 3] = four.w;
  }
  int own = 0;
#pragma unroll
  for (int b = 0; b < 8; ++b) own += counts[b];
  int reached = own;  // with the bins of higher lanes
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int more = __shfl_down_sync(all_lanes, reached, distance);
    if (lane + distance < 32) reached += more;
  }
  Bin bin = {-1, rank - (reached - own), 0};
  const bool here = reached >= rank && reached - own < rank;
#pragma unroll
  for (int b = 7; b >= 0; --b) {
    if (bin.digit >= 0) continue;
    if (counts[b] >= bin.rank) {
      bin.digit = lane * 8 + b;
      bin.count = counts[b];
    } else {
      bin.rank -= counts[b];
    }
  }
  const unsigned found = __ballot_sync(all_lanes, here);
  if (found == 0) return {-1, 0, 0};
  const int lane_of_rank = __ffs(found) - 1;
  return {__shfl_sync(all_lanes, bin.digit, lane_of_rank),
          __shfl_sync(all_lanes, bin.rank, lane_of_rank),
          __shfl_sync(all_lanes, bin.count, lane_of_rank)};
}

// The k-th largest of values(0), ... values(count - 1), or a lower bound that exactly k of them
// reach; 0 where fewer than k are not 0. All threads of the block take part. A radix select: digits
// of eight bits from the top.
template <typename Values>
__device__ uint64_t kth_largest(int count, int k, const Values& values) {
  // Three sets of bins take turns: one is filled while the next one is emptied, and a slow warp may
  // still read the one before.
  __shared__ __align__(16) int bins[3][256];
  uint64_t own[held];
#pragma unroll
  for (int j = 0; j < held; ++j) {
    const int i = j * threads + int(threadIdx.x);
    own[j] = i < count ? values(i) : 0;
  }
  bins[0][threadIdx.x] = 0;
  __syncthreads();
  uint64_t prefix = 0;
  int rank = k;
  for (int round = 0, shift = 56;; ++round, shift -= 8) {
    int* filled = bins[round % 3];
    bins[(round + 1) % 3][threadIdx.x] = 0;
    const auto add = [&](uint64_t value) {
      if (value != 0 && (shift == 56 || value >> (shift + 8) == prefix))
        atomicAdd(&filled[value >> shift & 255], 1);
    };
#pragma unroll
    for (int j = 0; j < held; ++j) add(own[j]);
    for (int i = held * threads + int(threadIdx.x); i < count; i += threads) add(values(i));
    __syncthreads();
    const Bin bin = bin_of_rank(filled, rank);
    prefix = bin.digit < 0 ? 0 : prefix << 8 | unsigned(bin.digit);
    if (bin.digit < 0) break;
    rank = bin.rank;
    if (bin.count == rank || shift == 0) {
      prefix <<= shift;
      break;
    }
  }
  __syncthreads();  // the bins are free again
  return prefix;
}

// Writes the items that are kept to `to`, which may be where the first of them lies, and returns
// how many they are. All threads of the block take part.
template <typename Items, typename Keeps>
__device__ int compact(const Items& items, int count, uint64_t* to, const Keeps& keeps) {
  if (count == 0) return 0;
  __shared__ int kept;
  if (threadIdx.x == 0) kept = 0;
  for (int first = 0; first < count; first += held * threads) {
    uint64_t own[held];
    unsigned keep = 0;
#pragma unroll
    for (int j = 0; j < held; ++j) {
      const int i = first + j * threads + int(threadIdx.x);
      if (i < count) own[j] = items[i];
    }
#pragma unroll
    for (int j = 0; j < held; ++j) {
      const int i = first + j * threads + int(threadIdx.x);
      if (i < count && keeps(own[j])) keep |= 1u << j;
    }
    __syncthreads();  // what is written next lies before what has been read
#pragma unroll
    for (int j = 0; j < held; ++j)
      if (keep >> j & 1) to[atomicAdd(&kept, 1)] = own[j];
  }
  __syncthreads();
  const int result = kept;
  __syncthreads();
  return result;
}

// Drops what k others surely beat from both lists and puts the rest together at `deferred` and
// `exact`; *deferred_count and *exact_count, in shared memory, become what is left. Returns the
// largest key that k features are known to reach, or `kth_best`, if that is larger.
template <typename Items>
__device__ uint64_t drop_beaten(const Items& deferred_items, const Items& exact_items,
                                uint64_t* deferred, uint64_t* exact, int* deferred_count,
                                int* exact_count, const Bracket& bracket, int k,
                                uint64_t kth_best) {
  const int deferred_size = *deferred_count, exact_size = *exact_count;
  if (deferred_size + exact_size >= k) {
    const uint64_t reached = kth_largest(deferred_size + exact_size, k, [&](int i) {
      return i < exact_size ? exact_items[i] : bracket.lower(deferred_items[i - exact_size]);
    });
    kth_best = max(kth_best, reached);
  }
  __syncthreads();
  const int deferred_left = compact(deferred_items, deferred_size, deferred, [&](uint64_t item) {
    return is_ambiguous(item) || bracket.reaches(item, kth_best);
  });
  const int exact_left =
      compact(exact_items, exact_size, exact, [&](uint64_t key) { return key >= kth_best; });
  if (threadIdx.x == 0) {
    *deferred_count = deferred_left;
    *exact_count = exact_left;
  }
  __syncthreads();
  return kth_best;
}

// Weights widened to float64 by moving their bits: the result is w * 2^-896, exactly, for zeros and
// numbers under the normal range too. A conversion instruction has a quarter of the throughput.
constexpr double input_scale = 0x1p895;  // makes products half of what they are
constexpr int sign_and_number = int(0x8fffffffu);

// A weight on its way from memory.
__device__ float stored(const float* weight) { return *weight; }
__device__ __half stored(const __half* weight) { return *weight; }
__device__ int stored(const __nv_bfloat16* weight) {  // its sign in all the upper bits
  return *reinterpret_cast<const int16_t*>(weight);
}
__device__ double scaled(float weight) {
  const int bits = int(__float_as_uint(weight));
  return __hiloint2double((bits >> 3) & sign_and_number, int(unsigned(bits) << 29));
}
__device__ double scaled(__half weight) { return scaled(widen(weight)); }
__device__ double scaled(int weight) {
  return __hiloint2double(int(unsigned(weight) << 13) & sign_and_number, 0);
}

// sums[j] = x . w[j] for lane 0 of the calling warp. `count` features are computed together so that
// x is converted once, and `batch` inputs per lane are loaded before the first is used. Every
// product and partial sum is half of its true value until the end: halving is exact, so all
// roundings are the same.
template <int batch, int count, typename Weight>
__device__ void warp_dots(const float* __restrict__ x, const Weight* const (&w)[count], int size,
                          double (&sums)[count]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < count; ++j) sums[j] = 0;
  const auto add = [&](int begin, auto is_whole) {
    using Stored = decltype(stored(w[0]));
    Stored weights[batch][count];
    float inputs[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      const int i = begin + 32 * b;
      const bool inside = decltype(is_whole)::value || i < size;
      inputs[b] = inside ? x[i] : 0;
#pragma unroll
      for (int j = 0; j < count; ++j) weights[b][j] = inside ? stored(w[j] + i) : Stored();
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {  // past the end 0 * 0 is added, which changes no sum
      const double input = inputs[b] * input_scale;
#pragma unroll
      for (int j = 0; j < count; ++j) sums[j] = fma(input, scaled(weights[b][j]), sums[j]);
    }
  };
  int begin = 0;
#pragma unroll 1
  for (; begin + 32 * batch <= size; begin += 32 * batch) add(begin + lane, std::true_type());
  if (begin < size) add(begin + lane, std::false_type());
#pragma unroll
  for (int j = 0; j < count; ++j) {
#pragma unroll
    for (int width = 16; width > 0; width /= 2)
      sums[j] += __shfl_down_sync(all_lanes, sums[j], width);
    sums[j] *= 2;
  }
}

// Computes the warp's share of a list, `together` features at a time in batches of inputs, and
// calls found(i, item, key) on lane 0, with key 0 where the feature is not active.
template <int together, int batch, typename Weight, typename Found>
__device__ void compute_together(const uint64_t* deferred, int count, int warp, int warp_count,
                                 const float* x, const Weights& weights, const Found& found) {
  const auto* W_enc = static_cast<const Weight*>(weights.W_enc);
  for (int begin = warp * together; begin < count; begin += warp_count * together) {
    uint64_t items[together];
    const Weight* w[together];
#pragma unroll
    for (int j = 0; j < together; ++j) {
      items[j] = deferred[min(begin + j, count - 1)];
      w[j] = W_enc + feature_of(items[j]) * weights.size;
    }
    double sums[together];
    warp_dots<batch>(x, w, int(weights.size), sums);
    if (threadIdx.x % 32 != 0) continue;
#pragma unroll
    for (int j = 0; j < together; ++j) {
      if (begin + j >= count) break;
      const int64_t feature = feature_of(items[j]);
      const float value = float(sums[j] + weights.bounds.bias[feature]);
      const bool active = value >= weights.bounds.min_active[feature];
      found(begin + j, items[j], active ? make_key(value, feature) : 0);
    }
  }
}

// Computes a list on warp_count warps, of which the caller is one: as few features together as keep
// all warps busy.
template <typename Weight, typename Found>
__device__ void compute_deferred(const uint64_t* deferred, int count, int warp, int warp_count,
                                 const float* x, const Weights& weights, const Found& found) {
  if (count <= warp_count)
    compute_together<1, 32, Weight>(deferred, count, warp, warp_count, x, weights, found);
  else if (count <= 2 * warp_count)
    compute_together<2, 16, Weight>(deferred, count, warp, warp_count, x, weights, found);
  else
    compute_together<4, 8, Weight>(deferred, count, warp, warp_count, x, weights, found);
}

// What float32 scores are compared with: under the k-th best activation by what the comparison may
// round.
__device__ float score_bound(uint64_t kth_best, const Weights& weights) {
  if (kth_best == 0) return -INFINITY;
  const double value = __uint_as_float(unsigned(kth_best >> 32));
  return float(value - (value + weights.max_bias) * kth_best_rounding - underflow(weights.size));
}

// How far a lane's j-th number of warp_scores lies from its first one: four numbers follow each
// other, which aligned arrays give in one access.
__device__ constexpr int step(int j) { return j / 4 * 128 + j % 4; }

struct LaneNumbers {
  float at[lane_scores];
};

// A lane's numbers, of which the first one lies at `at`; 0 from `end` on.
__device__ LaneNumbers load(const float* __restrict__ from, int at, int end, bool aligned) {
  LaneNumbers numbers = {};
  if (aligned) {
#pragma unroll
    for (int j = 0; j < lane_scores; j += 4) {
      float4 four = {0, 0, 0, 0};
      if (at + step(j) < end) four = *reinterpret_cast<const float4*>(from + (at + step(j)));
      numbers.at[j] = four.x;
      numbers.at[j + 1] = four.y;
      numbers.at[j + 2] = four.z;
      numbers.at[j + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < lane_scores; ++j)
      numbers.at[j] = at + step(j) < end ? from[at + step(j)] : 0;
  }
  return numbers;
}

// The lists of a row and group while a block fills them; their counts, in shared memory. Warps take
// places without waiting for each other. Where the list of deferred features is full, they stop:
// places from deferred_end on are not filled.
struct OpenLists {
  uint64_t *deferred, *exact;
  int capacity, k;
  struct Counts {
    int deferred, deferred_end, exact, active, computed;
    uint64_t kth_best;
  }* counts;

  // Defers the items of the lanes that keep theirs, or none if there is not enough room. All lanes
  // of a warp take part.
  __device__ bool append(bool keep, uint64_t item) const {
    const unsigned kept = __ballot_sync(all_lanes, keep);
    if (kept == 0) return true;
    const int lane = threadIdx.x % 32, added = __popc(kept);
    int first = lane == 0 ? atomicAdd(&counts->deferred, added) : 0;
    first = __shfl_sync(all_lanes, first, 0);
    if (first + added > capacity) {
      if (lane == 0) atomicMin(&counts->deferred_end, first);
      return false;
    }
    if (keep) deferred[first + __popc(kept & ((1u << lane) - 1))] = item;
    return true;
  }
};

// Drops what k others surely beat. Where still fewer than list_room places are free, too many
// features are near the k-th best or near their bounds, and they are computed, with no more numbers
// at a time than select_kernel has registers for. All threads of the block take part.
template <typename Weight>
__device__ void make_room(const OpenLists& lists, const float* x, float margin,
                          const Weights& weights) {
  OpenLists::Counts& counts = *lists.counts;
  if (threadIdx.x == 0 && counts.deferred_end != INT_MAX) {
    counts.deferred = counts.deferred_end;
    counts.deferred_end = INT_MAX;
  }
  __syncthreads();
  const Bracket bracket(margin, weights);
  for (;;) {
    const uint64_t kth_best =
        drop_beaten(lists.deferred, lists.exact, lists.deferred, lists.exact, &counts.deferred,
                    &counts.exact, bracket, lists.k, counts.kth_best);
    const int left = counts.deferred;
    if (threadIdx.x == 0) counts.kth_best = kth_best;
    __syncthreads();  // a thread that goes on may add to the count
    if (left + list_room <= lists.capacity) break;
    compute_together<2, 8, Weight>(lists.deferred, left, threadIdx.x / 32, warps, x, weights,
                                   [&](int, uint64_t item, uint64_t key) {
                                     if (key != 0 && is_ambiguous(item))
                                       atomicAdd(&counts.active, 1);
                                     if (key > counts.kth_best)
                                       lists.exact[atomicAdd(&counts.exact, 1)] = key;
                                   });
    __syncthreads();
    if (threadIdx.x == 0) {
      counts.computed += counts.deferred;
      counts.deferred = 0;
    }
    __syncthreads();
  }
}

// A row as one block of select_kernel sees it.
struct ScoredRow {
  const float* scores;
  int first;  // feature of scores[0]
  float margin;
  FeatureBounds bounds;

  // Whether the feature of a score may be active. Written so that NaN, which a margin or a score
  // that is not finite can give, counts as "may be".
  __device__ bool may_be_active(float score, float norm, float surely_out_below) const {
    return !(fmaf(margin, norm, score) < surely_out_below);
  }

  // Finds those of the warp's next scores whose features may be active; `at` is where the lane's
  // first one lies. The lowest 8 bits of their places go to `found`; returns how many they are.
  __device__ int find(const LaneNumbers& values, int at, int end, bool aligned,
                      uint8_t* found) const {
    const LaneNumbers norms = load(bounds.norm + first, at, end, aligned),
                      out_below = load(bounds.surely_out_below + first, at, end, aligned);
    unsigned active = 0;
#pragma unroll
    for (int j = 0; j < lane_scores; ++j)
      if (may_be_active(values.at[j], norms.at[j], out_below.at[j])) active |= 1u << j;
    if (at + step(lane_scores - 1) >= end) {
#pragma unroll
      for (int j = 0; j < lane_scores; ++j)
        if (at + step(j) >= end) active &= ~(1u << j);
    }
    if (!__any_sync(all_lanes, active != 0)) return 0;
    const unsigned lower_lanes = (1u << threadIdx.x % 32) - 1;
    int total = 0;
#pragma unroll
    for (int j = 0; j < lane_scores; ++j) {
      const unsigned lanes = __ballot_sync(all_lanes, active >> j & 1);
      if (active >> j & 1) found[total + __popc(lanes & lower_lanes)] = uint8_t(at + step(j));
      total += __popc(lanes);
    }
    __syncwarp();
    return total;
  }

  // Lists the features found[done], ... found[total - 1] that may reach `bound`, and counts those
  // that are surely active. Returns total, or where to go on if the list is full.
  __device__ int list(int begin, const uint8_t* found, int done, int total, float bound,
                      const OpenLists& lists) const {
    const int lane = threadIdx.x % 32;
    for (; done < total; done += 32) {
      const int i = done + lane;
      bool surely = false, keep = false;
      uint64_t item = 0;
      if (i < total) {
        const int place = begin + uint8_t(found[i] - begin);
        const int64_t feature = first + place;
        const float score = scores[place], width = margin * bounds.norm[feature];
        surely = score - width >= bounds.surely_in_from[feature];
        keep = !surely || !(score + width < bound - bounds.bias[feature]);
        item = defer(score, feature, !surely);
      }
      if (!lists.append(keep, item)) break;
      const unsigned active = __ballot_sync(all_lanes, surely);
      if (lane == 0 && active != 0) atomicAdd(&lists.counts->active, __popc(active));
    }
    __syncwarp();  // `found` is free again
    return min(done, total);
  }
};

// One block per row and group of `share` of the tile's features.
template <typename Weight>
__global__ void __launch_bounds__(threads, 4)
    select_kernel(const float* __restrict__ scores, const float* x, const Margin* margins,
                  int first, int count, int share, const __grid_constant__ Weights weights,
                  const __grid_constant__ CandidateLists lists) {
  const int row = blockIdx.x, group = blockIdx.y, warp = threadIdx.x / 32;
  const int64_t list = int64_t{row} * lists.groups + group;
  const int group_end = min(count, (group + 1) * share);
  const bool aligned = count % 4 == 0 && first % 4 == 0;
  const float margin = margins[row].per_norm;
  const int deferred_before = lists.deferred_count[list], exact_before = lists.exact_count[list];
  const uint64_t kth_best_before = lists.kth_best[list];
  if (isnan(margin)) return;
  __shared__ uint8_t found[warps][warp_scores];
  __shared__ OpenLists::Counts counts;
  if (threadIdx.x == 0) counts = {deferred_before, INT_MAX, exact_before, 0, 0, kth_best_before};
  const OpenLists open = {lists.deferred + list * lists.capacity,
                          lists.exact + list * (lists.k + lists.capacity), lists.capacity, lists.k,
                          &counts};
  const ScoredRow scored = {scores + int64_t{row} * count, first, margin, weights.bounds};

  const int lane_first = int(threadIdx.x % 32) * 4;  // from where a warp begins
  int begin = group * share + warp * warp_scores, done = 0;
  __syncthreads();
  for (;;) {
    const float bound = score_bound(counts.kth_best, weights);
    // The next scores.
    LaneNumbers ahead = load(scored.scores, begin + lane_first, group_end, aligned);
    while (begin < group_end) {
      const LaneNumbers values = ahead;
      const int next = begin + warps * warp_scores;
      ahead = load(scored.scores, next + lane_first, group_end, aligned);
      const int total = scored.find(values, begin + lane_first, group_end, aligned, found[warp]);
      done = scored.list(begin, found[warp], done, total, bound, open);
      if (done < total) break;
      begin = next;
      done = 0;
    }
    // With nothing left to do, a list that is long gives the next tile a better bound.
    if (!__syncthreads_or(begin < group_end) && counts.deferred <= max(2 * lists.k, list_room / 2))
      break;
    make_room<Weight>(open, x + row * weights.size, margin, weights);
    if (!__syncthreads_or(begin < group_end)) break;
  }
  if (threadIdx.x == 0) {
    lists.deferred_count[list] = counts.deferred;
    lists.exact_count[list] = counts.exact;
    lists.kth_best[list] = counts.kth_best;
    lists.active_count[list] += counts.active;
    atomicAdd(&lists.computed_count[row], counts.computed);
  }
}

// One block per row.
__global__ void __launch_bounds__(threads)
    merge_kernel(const Margin* margins, Weights weights, CandidateLists lists) {
  const float margin = margins[blockIdx.x].per_norm;
  if (isnan(margin)) return;
  const int64_t list = int64_t{blockIdx.x} * lists.groups;
  uint64_t* deferred = lists.deferred + list * lists.capacity;
  uint64_t* exact = lists.exact + list * (lists.k + lists.capacity);
  __shared__ int deferred_begin[max_groups + 1], exact_begin[max_groups + 1];
  __shared__ int deferred_count, exact_count;
  if (threadIdx.x < 32) {  // a lane per group; sums over the lanes up to it
    const int lane = threadIdx.x;
    const bool there = lane < lists.groups;
    const int own_deferred = there ? lists.deferred_count[list + lane] : 0,
              own_exact = there ? lists.exact_count[list + lane] : 0;
    int to_deferred = own_deferred, to_exact = own_exact,
        active = there ? lists.active_count[list + lane] : 0;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int more_deferred = __shfl_up_sync(all_lanes, to_deferred, distance),
                more_exact = __shfl_up_sync(all_lanes, to_exact, distance),
                more_active = __shfl_up_sync(all_lanes, active, distance);
      if (lane >= distance) {
        to_deferred += more_deferred;
        to_exact += more_exact;
        active += more_active;
      }
    }
    deferred_begin[lane + 1] = to_deferred;
    exact_begin[lane + 1] = to_exact;
    if (lane == 0) deferred_begin[0] = exact_begin[0] = 0;
    if (lane == 31) {
      deferred_count = to_deferred;
      exact_count = to_exact;
      lists.active_count[list] = active;
    }
  }
  __syncthreads();
  const JoinedList all_deferred{deferred, lists.capacity, deferred_begin, lists.groups},
      all_exact{exact, lists.k + lists.capacity, exact_begin, lists.groups};
  drop_beaten(all_deferred, all_exact, deferred, exact, &deferred_count, &exact_count,
              Bracket(margin, weights), lists.k, 0);
  if (threadIdx.x == 0) {
    lists.deferred_count[list] = deferred_count;
    lists.exact_count[list] = exact_count;
  }
}

// Blocks (row, part of its list). Neighbouring rows go through their features in about the same
// order, so the cache serves them.
template <typename Weight>
__global__ void __launch_bounds__(threads)
    compute_exact_kernel(const float* __restrict__ x, const Margin* __restrict__ margins,
                         Weights weights, CandidateLists lists, int* candidates) {
  const int64_t row = blockIdx.x, list = row * lists.groups;
  const int count = lists.deferred_count[list];
  if (candidates && blockIdx.y == 0 && threadIdx.x == 0)
    candidates[row] = count + lists.computed_count[row];
  if (isnan(margins[row].per_norm)) return;
  uint64_t* deferred = lists.deferred + list * lists.capacity;
  const int warp = int(blockIdx.y * warps + threadIdx.x / 32), warp_count = int(gridDim.y * warps);
  compute_deferred<Weight>(deferred, count, warp, warp_count, x + row * weights.size, weights,
                           [&](int i, uint64_t item, uint64_t key) {
                             if (key != 0 && is_ambiguous(item))
                               atomicAdd(&lists.active_count[list], 1);
                             deferred[i] = key;
                           });
}

// How many of keys[0], ... keys[count - 1], in shared memory, are larger.
__device__ int rank_of(uint64_t key, const uint64_t* keys, int count) {
  int rank = 0;
  for (int i = 0; i < count; ++i) rank += keys[i] > key;
  return rank;
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

// Sorts `size` keys, descending; no two are equal. Where they are many, places up to the next power
// of two become 0, which no key equals. `scratch` has room for max_ranked keys, in shared memory.
__device__ void sort_keys(uint64_t* keys, int size, uint64_t* scratch) {
  if (size <= max_ranked) {
    for (int i = threadIdx.x; i < size; i += threads) scratch[i] = keys[i];
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += threads)
      keys[rank_of(scratch[i], scratch, size)] = scratch[i];
    __syncthreads();
    return;
  }
  int count = 1;
  while (count < size) count *= 2;
  for (int i = size + int(threadIdx.x); i < count; i += threads) keys[i] = 0;
  __syncthreads();
  bitonic_sort(keys, count);
}

// Puts the k largest of values(0), ... values(count - 1) that are not 0 into `best`, descending,
// and returns how many they are. No two that are not 0 are equal.
template <typename Values>
__device__ int k_largest(int count, int k, const Values& values, uint64_t* best,
                         uint64_t* scratch) {
  if (count <= max_ranked) {
    for (int i = threadIdx.x; i < count; i += threads) scratch[i] = values(i);
    __syncthreads();
    int larger_than_0 = 0;
    for (int i = threadIdx.x; i < count; i += threads) {
      const uint64_t key = scratch[i];
      if (key == 0) continue;
      ++larger_than_0;
      const int rank = rank_of(key, scratch, count);
      if (rank < k) best[rank] = key;
    }
    int total = __syncthreads_count(larger_than_0 > 0);
    total += __syncthreads_count(larger_than_0 > 1);
    return min(total, k);
  }
  const uint64_t smallest = max(kth_largest(count, k, values), uint64_t{1});
  __shared__ int size;
  if (threadIdx.x == 0) size = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += threads) {
    const uint64_t key = values(i);
    if (key >= smallest) best[atomicAdd(&size, 1)] = key;
  }
  __syncthreads();
  const int total = size;
  sort_keys(best, total, scratch);
  return total;
}

// One block per row.
__global__ void __launch_bounds__(threads, 4)
    finish_kernel(const LayerPointers* layer, const Margin* margins, int64_t first,
                  int64_t features, int64_t max_active, int64_t top_k, int64_t sorted_stride,
                  CandidateLists lists) {
  __shared__ uint64_t shared[max_in_shared], scratch[max_ranked];
  const int64_t row = blockIdx.x, list = row * lists.groups;
  const int deferred_count = lists.deferred_count[list], exact_count = lists.exact_count[list];
  const int64_t active = lists.active_count[list];
  float* activations = layer->activations + (first + row) * top_k;
  int64_t* indices = layer->indices + (first + row) * top_k;
  float* sparsity = layer->sparsity + first + row;
  if (isnan(margins[row].per_norm)) {
    for (int64_t i = threadIdx.x; i < top_k; i += threads) {
      activations[i] = NAN;
      indices[i] = i;
    }
    if (threadIdx.x == 0) *sparsity = NAN;
    return;
  }
  if (threadIdx.x == 0) *sparsity = float(double(min(active, max_active)) / double(features));
  const uint64_t* computed = lists.deferred + list * lists.capacity;
  const uint64_t* exact = lists.exact + list * (lists.k + lists.capacity);
  uint64_t* best = sorted_stride <= max_in_shared ? shared : lists.sorted + row * sorted_stride;
  const int winners = k_largest(
      deferred_count + exact_count, lists.k,
      [&](int i) { return i < exact_count ? exact[i] : computed[i - exact_count]; }, best, scratch);
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
  sort_keys(best, winners, scratch);
  for (int64_t rank = threadIdx.x; rank < top_k - winners; rank += threads) {
    int low = 0, high = winners;  // how many winners lie under this rank's feature
    while (low < high) {
      const int middle = (low + high) / 2;
      if (int64_t{unsigned(~best[middle])} - middle <= rank)
        low = middle + 1;
      else
        high = middle;
    }
    activations[winners + rank] = 0;
    indices[winners + rank] = rank + low;
  }
}

int64_t power_of_two(int64_t min) {
  int64_t power = 1;
  while (power < min) power *= 2;
  return power;
}

// Blocks per row that compute its list: together with those of the other rows they fill a device.
unsigned blocks_per_row(int64_t rows) {
  constexpr int64_t blocks = 1024, max_per_row = 32;
  return unsigned(rows >= blocks ? 1 : rows * max_per_row <= blocks ? max_per_row : blocks / rows);
}

}  // namespace

int select(const float* scores, const float* x, const Margin* margins, int64_t rows, int64_t first,
           int64_t count, const Weights& weights, const CandidateLists& lists, Queue& queue) {
  // Features per group: a multiple of four, so that groups begin where accesses are aligned.
  const int64_t share = (count + 4 * lists.groups - 1) / (4 * lists.groups) * 4;
  return for_dtype(weights.dtype, [&](auto type) {
    return launch(select_kernel<decltype(type)>, dim3(unsigned(rows), unsigned(lists.groups)),
                  queue, scores, x, margins, int(first), int(count), int(share), weights, lists);
  });
}

int merge(const Margin* margins, int64_t rows, const Weights& weights, const CandidateLists& lists,
          Queue& queue) {
  return launch(merge_kernel, dim3(unsigned(rows)), queue, margins, weights, lists);
}

int compute_exact(const float* x, const Margin* margins, int64_t rows, const Weights& weights,
                  const CandidateLists& lists, int* candidates, Queue& queue) {
  return for_dtype(weights.dtype, [&](auto type) {
    return launch(compute_exact_kernel<decltype(type)>, dim3(unsigned(rows), blocks_per_row(rows)),
                  queue, x, margins, weights, lists, candidates);
  });
}

int finish(const LayerPointers* layer, const Margin* margins, int64_t first, int64_t rows,
           int64_t features, int64_t max_active, int64_t top_k, const CandidateLists& lists,
           Queue& queue) {
  return launch(finish_kernel, dim3(unsigned(rows)), queue, layer, margins, first, features,
                max_active, top_k, power_of_two(lists.k), lists);
}

}  // namespace sparse_transcoder::cuda
