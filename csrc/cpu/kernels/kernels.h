// The inner loops of the CPU backend. They take pointers and sizes and know nothing of torch. Each
// instruction set has one file; the exact loops give the same bits on all of them.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "types.h"

namespace sparse_transcoder::cpu {

// Rows per call of dot and dot_int16, at most.
constexpr int64_t dot_rows = 4;

// Where the int8 screen keeps a rotated row or feature (quantise-inl.h). It holds `inputs` numbers:
// the `size` inputs and zeros after them, rotated into each other in groups of `mixed`.
struct Int8Layout {
  // The sums of longer rows could leave int32.
  static constexpr int64_t max_inputs = 1 << 16;
  int64_t size, inputs, mixed;

  explicit Int8Layout(int64_t size) : size(size), inputs((size + 63) / 64 * 64), mixed(64) {
    // The largest power of two that divides `inputs` and leaves 16 groups, one for each lane of a
    // vector.
    while (!(inputs & mixed) && inputs >= 32 * mixed) mixed *= 2;
  }

  // Bytes of one row: the int8 inputs, then an Int8Row. The size is odd in cache lines so that rows
  // do not fall into one cache set.
  int64_t row_bytes() const { return inputs / 128 * 128 + 64 * (inputs % 128 == 0 ? 1 : 3); }
  // Bytes of one panel: [inputs / 4][64 features][4] uint8 (weight + 128), then an Int8Features.
  int64_t panel_bytes() const { return panel_features * (inputs + 12); }
};

// What turns a row's integers q back into numbers: the rotated row y is about scale * q. With two
// planes it is about the sum of both planes' scale * q.
struct Int8Row {
  float scale;
  int32_t start;      // -128 times the sum of q, because weights are stored as weight + 128
  float error, norm;  // of both planes: at least ||y - scale * q|| and ||scale * q||
};

// The same of a panel's rotated features z. Everything is divided by `mixed`, so that products with
// a row's numbers are products of the row and the feature themselves.
struct Int8Features {
  float scale[panel_features];
  float norm[panel_features];   // at least ||z||
  float error[panel_features];  // at least ||z - scale * q||, plus the rounding of a score per unit
                                // of the row's norm
};

// Memory to bring into the cache while a screen computes. The requests are spread evenly over the
// screen, because a burst of them would hold it up.
class Prefetcher {
 public:
  int64_t lines() const { return lines_; }
  void clear() { count_ = lines_ = next_ = 0, at_ = end_ = nullptr; }
  void add(const void* begin, int64_t bytes) {
    ranges_[count_++] = {static_cast<const char*>(begin), bytes};
    lines_ += (bytes + 63) / 64;
  }
  void fetch(int64_t lines) {
    for (; lines > 0; --lines, at_ += 64) {
      if (at_ >= end_) {
        if (next_ == count_) return;
        at_ = ranges_[next_].begin;
        end_ = at_ + ranges_[next_++].bytes;
      }
      __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  struct Range {
    const char* begin;
    int64_t bytes;
  };
  Range ranges_[1 + 2 * panel_features];  // one panel, and two rows per feature
  int64_t count_ = 0, lines_ = 0, next_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

// A row and a feature. The pair is ambiguous while the feature is too near its gate to be counted
// without being computed.
class Survivor {
 public:
  Survivor(int64_t row, int64_t feature, bool ambiguous)
      : row_(static_cast<int32_t>(row)),
        feature_(static_cast<uint32_t>(feature << 1) | ambiguous) {}

  int64_t row() const { return row_; }  // of its RowBlock
  int64_t feature() const { return feature_ >> 1; }
  bool ambiguous() const { return feature_ & 1; }

 private:
  int32_t row_;
  uint32_t feature_;  // << 1 | ambiguous
};

// Masks of this many rows: whole blocks, to be transposed.
constexpr int64_t mask_count(int64_t rows) { return (rows + 63) / 64 * 64; }

// Bit r of `bits` says whether row + r and the feature are a pair.
struct MaskWord {
  uint64_t bits;
  int32_t row, feature;
};

// What the int8 screen lets through of a panel: bit f of rows[r] says whether row r and the panel's
// feature f are a pair.
struct SurvivorMasks {
  uint64_t* rows;   // [mask_count(row_count)]
  MaskWord* words;  // [mask_count(row_count) + 2] scratch
};

struct ListedSurvivors {
  int64_t count;
  uint64_t features;  // bit f: whether feature f of the panel has a pair
};

// What turns a row of int16 numbers q back: x is about scale * q.
struct Int16Scale {
  float scale;
  float error;  // at least ||x - scale * q||
  float norm;   // at least ||scale * q||
};

// Elements between int16 rows: whole vectors, and an odd number of cache lines.
constexpr int64_t int16_stride(int64_t size) { return (size + 31) / 64 * 64 + 32; }
// Int16 rows are multiplied in parts of nearly equal size, each of whole vectors. The sums of one
// part stay within int32; a larger part would need a coarser scale.
constexpr int64_t int16_part_size(int64_t size) {
  const int64_t parts = (size + 639) / 640;
  return ((size + parts - 1) / parts + 127) / 128 * 128;
}
constexpr int64_t int16_part_count(int64_t size) {
  return (size + int16_part_size(size) - 1) / int16_part_size(size);
}

// One row's scores against the bounds of the features [first, first + count).
struct GateArgs {
  const float* scores;  // [count]
  const FeatureBounds& bounds;
  const float* residual;  // of the same features as the bounds, see Margin
  int64_t first, count;
  Margin margin;
  float min_value;  // the row's k-th best activation so far, less the rounding of the comparison
};

// Rows against one panel in int8.
struct Int8ScreenArgs {
  const Int8Layout& layout;
  const int8_t* rows;  // [row_count, planes, layout.row_bytes()]
  int64_t row_count, planes;
  const uint8_t* panel;
  const float* surely_out_below;  // [64]
};

// Rows times a panel of feature_count <= 64 features in int16. Rows and features are
// int16_stride(size) apart.
struct Int16ProductArgs {
  const int16_t* rows;
  const Int16Scale* row_scale;
  int64_t row_count;
  const int16_t* features;
  const float* feature_scale;
  int64_t feature_count, size;
  int16_t* packed;  // scratch, [64 * int16_stride(size)]
};

// Where one screen becomes faster than another, as benchmarks/crossovers.py measures it.
// docs/performance.md shows the times.
struct Crossovers {
  int64_t int8_rows;         // int8 beats float32 in calls of at most this many rows
  int64_t two_planes_rows;   // a second int8 plane is nearly free in calls of at most this many
                             // rows, because the screen waits for memory
  double max_share_float32;  // of a panel's pairs that survive int8: beyond it a float32 product of
                             // the panel is faster
  double max_share_int16;    // the same for an int16 product
  bool fast_int16;           // int16 beats float32
};

// The loops of one instruction set. Arrays [3] are indexed by Dtype.
struct KernelTable {
  std::string_view name;
  Crossovers crossovers;

  // sums[r] = sum_i x[r][i] * w[i] for up to dot_rows rows, in float64: 32 interleaved partial
  // sums, then a fixed tree. A product of two float32 is exact in float64. So the sums depend
  // neither on the instruction set, nor on fused multiply-add, nor on the other rows of the call.
  void (*dot[3])(const float* const* x, int64_t rows, const void* w, int64_t size, double* sums);

  // scores[r * count + f] = sum_i x[r * size + i] * w[f * size + i] in float32, in any order.
  // x is [rows, size], w is [count, size].
  void (*product[3])(const float* x, int64_t rows, const void* w, int64_t count, int64_t size,
                     float* scores);

  // Writes the features that a screen cannot rule out as (position << 1 | ambiguous), ascending,
  // and returns how many there are. A feature stays when it may be active and either may reach
  // min_value or is ambiguous, that is too near its gate to be counted without being computed. The
  // surely active ones are added to *active_count.
  int64_t (*gate_row)(const GateArgs& args, uint32_t* candidates, int64_t* active_count);

  // out[i] = float(from[i]), exactly.
  void (*widen[3])(const void* from, float* out, int64_t size);

  // Makes one row for the int8 screen, row_bytes() per plane. A second plane holds what the first
  // leaves. rotated [inputs] is scratch.
  void (*quantise_row)(const Int8Layout& layout, const float* x, int64_t planes, int8_t* row,
                       float* rotated);
  // Makes a panel of 64 features for the int8 screen from w [count, size]; the features from
  // `count` on are zeros.
  void (*quantise_panel)(const Int8Layout& layout, const float* w, int64_t count, uint8_t* panel);
  // Bit f of masks[r] says whether row r's dot product with feature f may reach
  // surely_out_below[f].
  void (*screen_int8)(const Int8ScreenArgs& args, uint64_t* masks, Prefetcher& prefetcher);
  // Lists the pairs of a panel whose first feature is `first`, ambiguous, by feature and row.
  // pairs [64 * row_count] is scratch behind them, and so are the masks.
  ListedSurvivors (*list_survivors)(const SurvivorMasks& masks, int64_t row_count, int64_t first,
                                    Survivor* pairs);

  // Fills q [int16_stride(size)]: the numbers, then zeros.
  Int16Scale (*quantise_int16)(const float* x, int64_t size, int16_t* q);
  // sums[r] = x[r] . w for up to dot_rows rows, exactly.
  void (*dot_int16)(const int16_t* const* x, int64_t rows, const int16_t* w, int64_t size,
                    int64_t* sums);
  // scores[r * 64 + f] = row_scale[r] * feature_scale[f] * (row r . feature f). Each part is exact;
  // the parts are added up in float32.
  void (*product_int16)(const Int16ProductArgs& args, float* scores, Prefetcher& prefetcher);

  // Sorts keys, the largest first. They differ and are under 2^63.
  void (*sort_keys)(uint64_t* keys, int64_t count);
};

// The loops that this process uses: those that SPARSE_TRANSCODER_CPU names, or the best that the
// machine can run. Throws std::invalid_argument, in one line, where the machine cannot run what is
// named.
const KernelTable& active_kernels();

// The loops of every instruction set that this machine can run, the portable one first.
const std::vector<KernelTable>& runnable_kernels();

// Each replaces the loops that its instruction set does better than the table's.
void use_portable(KernelTable& kernels);
void use_avx2(KernelTable& kernels);
void use_avx2vnni_vex(KernelTable& kernels);   // VNNI as processors without AVX-512 encode it
void use_avx2vnni_evex(KernelTable& kernels);  // VNNI as processors with AVX-512 encode it
void use_avx512vnni(KernelTable& kernels);
void use_avx512amx(KernelTable& kernels);
void use_neon(KernelTable& kernels);
void use_neondot(KernelTable& kernels);

// Whether this process may use AMX. It asks Linux for that. Called only on machines with AVX-512.
bool has_amx();

}  // namespace sparse_transcoder::cpu
