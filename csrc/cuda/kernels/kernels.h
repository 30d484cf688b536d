// The steps of the CUDA engine: pointers, sizes, a stream. Torch-free, so that nvcc compiles them
// beside any torch; a build without CUDA kernels links
// no_cuda.cpp in their place. Every pointer is
// device memory. Launches are asynchronous; each returns what cudaGetLastError says (0: fine).
//
// A chunk of rows goes through prepare; then, panel by panel of features, a product (cuBLAS's, or
// multiply_few) and select; then merge, rescore and finish.
#pragma once

#include <cstdint>

#include "types.h"

namespace sparse_transcoder::cuda {

// Where a layer's rows are, [B, T, H] with strides in elements, and where its results go. Kernels
// read it from device memory: work that was captured can be replayed on other tensors.
struct Io {
  const void* hidden;
  int64_t T, stride[3];
  float* activations;  // [B * T, top_k]
  int64_t* indices;    // [B * T, top_k]
  float* sparsity;     // [B * T]
};

// Rows [first, first + count) of a layer, and how they are normed.
struct Rows {
  const Io* io;
  Dtype dtype;
  int64_t first, count, size;
  const float *input_bias, *ln_weight, *ln_bias;  // [H], or null
};

// How far scores may be from x . w, by the arithmetic that makes them: products of x' and w', which
// stand for x and w, with
// ||w - w'|| <= residual * norm(w) and a sum that is off by at most roundoff * ||x'|| ||w'||.
struct Screen {
  float roundoff, residual;
  float largest_norm;
};

// A layer's weights and gates: [F, size] and [F].
struct Weights {
  const void* rows;
  Dtype dtype;
  int64_t size;
  FeatureBounds gate;
  float largest_bias;
};

// Two lists for each row and group of features. `open`: what a screen let through, score and
// feature << 1 | ambiguous; `keys`: exact, as cpu::make_key. All of a row's lists are one after the
// other.
struct Lists {
  uint64_t* open;    // [rows, groups, capacity]
  uint64_t* keys;    // [rows, groups, k + capacity]
  uint64_t* sorted;  // [rows, a power of two >= k]
  int* open_size;    // [rows, groups]
  int* keys_size;    // [rows, groups]
  int* certain;      // [rows, groups] active features counted so far
  uint64_t* least;   // [rows, groups] k keys are at or above this; 0 while that is not known
  int groups, capacity, k;
};

constexpr int segment =
    1024;  // features gated between two looks at a list's size: it must have room for them
constexpr int most_groups = 32;  // into which a row's features are split where rows are few
constexpr int64_t few_rows = 8;  // that multiply_few takes
constexpr int64_t most_io = 48;  // that set_io takes: a kernel's arguments are limited to 4 KB

// io[i] = values[i]; values is host memory, read before this returns.
int set_io(const Io* values, int64_t count, Io* io, void* stream);

// x = norm(h) [count, H] in float32 and, where given, rounded to bfloat16; margin [count]: |score -
// x . w| <= margin * norm(w), infinite where nothing is known, NaN for a row that is not finite.
// Empties the lists.
int prepare(const Rows& rows, const Screen& screen, float* x, void* rounded, float* margin,
            const Lists& lists, void* stream);

// scores[r * count + f] = x[r] . w[first + f] in float32 for at most few_rows rows: w [.., size] is
// read once. The sum is off by at most few_roundoff(size).
int multiply_few(const float* x, int64_t rows, const void* w, Dtype dtype, int64_t first,
                 int64_t count, int64_t size, float* scores, void* stream);

// Proof: a lane adds up at most size / 32 + 8 products, each rounded once with its sum, and five
// more additions join the lanes; each errs by at most 2^-24 of a sum of magnitudes that
// Cauchy-Schwarz bounds.
constexpr float few_roundoff(int64_t size) { return static_cast<float>(size / 32 + 16) * 0x1p-23f; }

// Gates scores [rows, count] of features [first, first + count). A list that is full is thinned:
// features that k others surely beat go; where too many are left they are computed and the k best
// kept. So no list overflows.
int select(const float* scores, const float* x, const float* margin, int64_t rows, int64_t first,
           int64_t count, const Weights& weights, const Lists& lists, void* stream);

// Joins each row's lists in its first one, thinned by what all of them know.
int merge(const float* margin, int64_t rows, const Weights& weights, const Lists& lists,
          void* stream);

// Replaces what is open by exact keys, or by 0 where a feature is not active.
int rescore(const float* x, const float* margin, int64_t rows, const Weights& weights,
            const Lists& lists, void* stream);

// Writes top_k slots a row: the k best, then the lowest features that are not among them.
int finish(const Io* io, const float* margin, int64_t first, int64_t rows, int64_t features,
           int64_t most_active, int64_t top_k, const Lists& lists, void* stream);

// Whether this build has these kernels.
bool built();

// Of the current device.
int multiprocessors(int* count);

// Work enqueued on these `count` streams, which are made here, is recorded from here on and runs
// only when launched.
int begin_capture(void** streams, int64_t count);
// Joins and destroys the streams. *graph: what was recorded, to be launched any number of times;
// null where that fails.
int end_capture(void** streams, int64_t count, void** graph);
int launch_graph(void* graph, void* stream);
void destroy_graph(void* graph);
// Whether somebody records the stream's work.
bool is_capturing(void* stream);

}  // namespace sparse_transcoder::cuda
