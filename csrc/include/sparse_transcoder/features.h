// What a call returns.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string_view>

namespace sparse_transcoder {

// The result for hidden [B, T, H]; without B for hidden [T, H]. K = min(top_k, F).
struct Features {
  at::Tensor activations;  // [B, T, K] float32, descending; 0 at ranks that no feature fills
  at::Tensor indices;      // [B, T, K] int64, distinct; ties: lower index first
  at::Tensor sparsity;     // [B, T] float32, fraction of the F features that are active
};

// Every active feature of N = B * T rows, in the compressed sparse row layout; M features in all.
struct SparseFeatures {
  at::Tensor row_begin;    // [N + 1] int64: row n has entries row_begin[n] to row_begin[n + 1]
  at::Tensor features;     // [M] int64, ascending in a row
  at::Tensor activations;  // [M] float32; a row that is not finite has one entry, NaN at feature 0
};

// How a sink gets its rows.
struct SparseFormat {
  at::ScalarType features = at::kLong;  // or kUInt32, or kUInt16 where F is at most 65,536
  // or kHalf: rounded to the nearest, but a kept feature never becomes 0 (it is 2^-24 at least),
  // and one above 65,504 becomes that and is counted.
  at::ScalarType activations = at::kFloat;
  bool only_top_k = false;  // the top_k strongest of each row, not all active features
};

// Consecutive rows of one layer, on their way to a sink. They are the sink's to keep.
struct SparseRows {
  int64_t layer, first_row;
  SparseFeatures features;  // row_begin starts at 0
  int64_t clamped;          // activations above the largest float16
};
using SparseSink = std::function<void(SparseRows)>;

// Bytes held by an Engine, beside the weights that its caller gave it.
struct Memory {
  // The weights, shared with the caller; and copies of encoders: of rows that are not contiguous,
  // and for Options::device_weight_bytes.
  int64_t weight_bytes;
  int64_t gate_bytes;       // per-feature vectors: norms, gates
  int64_t screening_bytes;  // low-precision copies; 0 with Screening::off
  // All pooled workspaces, which grow only when calls overlap, and buffers for streamed weights. On
  // CUDA torch keeps workspaces for cuBLAS besides: one per calling thread and stream.
  int64_t workspace_bytes;
};

// What a call did, summed over its chunks: how many (row, feature) pairs each stage let through,
// and its time, summed over workers.
struct Explanation {
  std::string_view instruction_set;  // see cpu_instruction_set
  int64_t workers;                   // threads that the call could use
  int64_t rows, features;            // of all layers together
  int64_t fallback_rows;             // too large to screen: every feature of theirs is computed
  int64_t pairs_int8, pairs_int16, pairs_float32;  // screened in each arithmetic
  int64_t survivors;                               // of the int8 screen
  int64_t ambiguous;                               // too near their gate to be counted unseen
  int64_t computed;                                // computed exactly
  double prepare_ms, screen_ms, rescreen_ms, compute_ms, finish_ms;
};

}  // namespace sparse_transcoder
