// The inner loops of the CPU engine. Torch-free: raw pointers and sizes. One file an instruction
// set; the exact ones give the same bits on all.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace sparse_transcoder::cpu {

constexpr int64_t dot_rows = 4;  // that a feature's exact and int16 products are made for at a time
constexpr int64_t panel_features =
    64;  // of the int8 and int16 screens: one bit each in a 64-bit mask

// How the int8 screen lays out a row or a feature, rotated (quantise.h): `inputs` numbers, zeros
// after the first `size` before their rotation, `mixed` of which are rotated into each other.
struct Int8Layout {
  static constexpr int64_t most_inputs = 1 << 16;  // sums stay within int32
  int64_t size, inputs, mixed;

  explicit Int8Layout(int64_t size) : size(size), inputs((size + 63) / 64 * 64), mixed(64) {
    // The largest power of two that divides the inputs and leaves 16 of them side by side: a
    // vector.
    while (!(inputs & mixed) && inputs >= 32 * mixed) mixed *= 2;
  }

  // Of a row: int8 inputs, then Int8Row. An odd number of cache lines, so that rows do not share
  // their place in the caches.
  int64_t row_bytes() const { return inputs / 128 * 128 + 64 * (inputs % 128 == 0 ? 1 : 3); }
  // Of a panel: [inputs / 4][64 features][4] uint8 (weight + 128), then Int8Features.
  int64_t panel_bytes() const { return panel_features * (inputs + 12); }
};

// The rotated row y is about scale * q, two planes of q being added.
struct Int8Row {
  float scale;
  int32_t start;         // -128 times the sum of q: weights are stored as weight + 128
  float residual, norm;  // with both planes: >= ||y - scale * q||, >= ||scale * q||
};

// So are rotated features z; all is divided by `mixed`, so that products with a row's are of x . w.
struct Int8Features {
  float scale[panel_features];
  float norm[panel_features];      // >= ||z||
  float residual[panel_features];  // >= ||z - scale * q||, and the rounding of a score in units of
                                   // the row's norm
};

// Memory to bring into the cache while a screen computes, evenly over its course: a burst would
// hold it up.
class Ahead {
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
  Range ranges_[1 + 2 * panel_features];  // a panel, and two rows a feature
  int64_t count_ = 0, lines_ = 0, next_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

// A row of int16: x is about scale * q.
struct Int16Scale {
  float scale;
  float residual;  // >= ||x - scale * q||
  float norm;      // >= ||scale * q||
};

// Elements between int16 rows: whole vectors, an odd number of cache lines.
constexpr int64_t int16_stride(int64_t size) { return (size + 31) / 64 * 64 + 32; }
// Inputs whose products add up within int32: the more, the coarser the scale. Parts of a row,
// nearly alike, of whole vectors.
constexpr int64_t int16_depth(int64_t size) {
  const int64_t parts = (size + 639) / 640;
  return ((size + parts - 1) / parts + 127) / 128 * 128;
}

struct CpuKernels {
  const char* name;
  // Measured by benchmarks/crossovers.py; docs/screening.md shows what they rest on.
  int64_t int8_rows;        // rows of a call up to which the int8 screen beats the float32 product
  int64_t two_planes_rows;  // up to which a second plane of int8 costs next to nothing, as the
                            // screen waits for memory
  double dense_share;       // of the pairs: when more survive int8, the float32 product beats it
  bool fast_int16;          // the int16 screen beats the float32 product

  // sums[r] = sum_i x[r][i] * w[i] in float64 for up to dot_rows rows: exact products, 32
  // interleaved partial sums, then a fixed tree. Independent of the instruction set, of fused
  // multiply-add, because a product of two float32 is exact in float64, and of the rows beside.
  void (*dot[3])(const float* const* x, int64_t rows, const void* w, int64_t size, double* sums);

  // scores[r * count + f] = sum_i x[r * size + i] * w[f * size + i] in float32, in any order; x
  // [rows, size], w [count, size].
  void (*product[3])(const float* x, int64_t rows, const void* w, int64_t count, int64_t size,
                     float* scores);

  // Features of one row that a screen cannot rule out, as (position << 1 | ambiguous) in ascending
  // order; returns how many. A feature is kept when it may be active and either may reach `bound`
  // (the row's running k-th best) or is ambiguous: too near its gate to be counted unseen. Those
  // surely active add to *certain.
  int64_t (*candidates)(const float* scores, const FeatureBounds& gate, const float* residual,
                        int64_t count, Margin margin, float bound, uint32_t* out, int64_t* certain);

  // out[i] = float(w[i]), exactly.
  void (*widen[3])(const void* w, float* out, int64_t size);

  // One row for the int8 screen, row_bytes() a plane: with two planes the second holds what the
  // first leaves. rotated [inputs] is scratch.
  void (*quantise_row)(const Int8Layout& layout, const float* x, int64_t planes, int8_t* row,
                       float* rotated);
  // 64 features for the int8 screen; those from `count` on are zeros. w [count, size].
  void (*quantise_panel)(const Int8Layout& layout, const float* w, int64_t count, uint8_t* panel);
  // masks[r] bit f: row r's dot product with feature f of the panel may reach low[f].
  void (*screen_int8)(const Int8Layout& layout, const int8_t* rows, int64_t count, int64_t planes,
                      const uint8_t* panel, const float* low, uint64_t* masks, Ahead& ahead);

  // q [int16_stride(size)], zeros after `size`.
  Int16Scale (*quantise_int16)(const float* x, int64_t size, int16_t* q);
  // sums[r] = x[r] . w for up to dot_rows rows, exact.
  void (*dot_int16)(const int16_t* const* x, int64_t rows, const int16_t* w, int64_t size,
                    int64_t* sums);
  // scores[r * 64 + f] = scale[r] * w_scale[f] * (x[r] . w[f]), parts of int16_depth(size) inputs
  // added up in float32, for a panel of count <= 64 features; rows int16_stride(size) apart; packed
  // [64 * int16_stride(size)] is scratch.
  void (*product_int16)(const int16_t* x, const Int16Scale* scale, int64_t rows, const int16_t* w,
                        const float* w_scale, int64_t count, int64_t size, int16_t* packed,
                        float* scores, Ahead& ahead);
};

// The best that this machine can run, chosen once.
// SPARSE_TRANSCODER_CPU=portable|avx2|avx2vnni|avx512vnni forces one (for tests).
const CpuKernels& cpu_kernels();

// All that this machine can run, the portable one first.
const std::vector<const CpuKernels*>& runnable_cpu_kernels();

// Each replaces what its instruction set does better than what the table holds.
void use_portable(CpuKernels& kernels);
void use_avx2(CpuKernels& kernels);
void use_avx2vnni(CpuKernels& kernels);       // as AVX-VNNI encodes it
void use_avx2vnni_evex(CpuKernels& kernels);  // as AVX-512 does
void use_avx512vnni(CpuKernels& kernels);

}  // namespace sparse_transcoder::cpu
