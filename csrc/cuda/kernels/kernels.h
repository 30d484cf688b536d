// The steps of the CUDA engine: pointers, sizes, a queue. Torch-free, so that nvcc compiles them
// beside any torch; a build without CUDA kernels links no_cuda.cpp in their place. Every pointer is
// device memory. Steps run asynchronously; each returns the status of its launch (0: fine), which
// error_name explains.
//
// A chunk of rows goes through prepare; then, tile by tile of features, a product (cuBLAS's, or
// product_few_rows) and select; then merge, compute_exact and finish.
#pragma once

#include <cstdint>

#include "types.h"

namespace sparse_transcoder::cuda {

// Where steps are put: a CUDA stream, or one branch of a graph that is being made. The steps of one
// queue run one after the other.
struct Queue {
  void* stream = nullptr;
  void* graph = nullptr;  // where not null, steps are added to this graph and not run
  void* last = nullptr;   // the graph's node that the next step waits for
};

// Where a layer's rows are, [B, T, H] with strides in elements, and where its results go. Kernels
// read it from device memory, so that a graph can be launched again for other tensors.
struct LayerPointers {
  const void* hidden;
  int64_t T, stride[3];
  float* activations;  // [B * T, top_k]
  int64_t* indices;    // [B * T, top_k]
  float* sparsity;     // [B * T]
};

// Rows [first, first + count) of a layer, and how they are normed.
struct PrepareArgs {
  const LayerPointers* layer;
  Dtype dtype;
  int64_t first, count, size;
  const float *input_bias, *ln_weight, *ln_bias;  // [H], or null
};

// How far the screen's scores may be from x . w. The screen multiplies x' and w', which stand for x
// and w, with ||w - w'|| <= residual * norm(w), and adds up with an error of at most
// rounding * ||x'|| ||w'||.
struct ScreenErrors {
  float rounding, residual;
  float max_norm;
};

// A layer's weights and bounds: [F, size] and [F].
struct Weights {
  const void* W_enc;
  Dtype dtype;
  int64_t size;
  FeatureBounds bounds;
  float max_bias;
};

// Two lists for each row and group of features. `deferred` holds features that the screen let
// through: the score, and feature << 1 | ambiguous. `exact` holds keys, as make_key does. All of a
// row's lists lie one after the other.
struct CandidateLists {
  uint64_t* deferred;   // [rows, groups, capacity]
  uint64_t* exact;      // [rows, groups, k + capacity]
  uint64_t* sorted;     // [rows, a power of two >= k]
  int* deferred_count;  // [rows, groups]
  int* exact_count;     // [rows, groups]
  int* active_count;    // [rows, groups] features that are surely active
  uint64_t* kth_best;   // [rows, groups] k keys are at or above this; 0 while that is not known
  int groups, capacity, k;
};

constexpr int list_room = 1024;  // a list's free places after features were dropped from it
constexpr int max_groups = 32;   // that a row's features are split into where rows are few
constexpr int64_t few_rows = 8;  // the most that product_few_rows takes
constexpr int64_t max_layer_pointers = 48;  // per set_layer_pointers: arguments end at 4 KB

// layers[i] = values[i]; values is host memory, read before this returns.
int set_layer_pointers(const LayerPointers* values, int64_t count, LayerPointers* layers,
                       Queue& queue);

// x = norm(h) [count, H] in float32 and, where given, rounded to bfloat16. margins [count]:
// infinite where nothing is known, NaN for a row that is not finite. The screens of this backend
// have an error that is proportional to a feature's norm, so per_residual is 0. Empties the lists.
int prepare(const PrepareArgs& args, const ScreenErrors& errors, float* x, void* rounded,
            Margin* margins, const CandidateLists& lists, Queue& queue);

// scores[r * count + f] = x[r] . w[first + f] in float32 for at most few_rows rows, reading w
// [.., size] once. A sum is off by at most few_rows_rounding(size) * ||x|| ||w||.
int product_few_rows(const float* x, int64_t rows, const void* w, Dtype dtype, int64_t first,
                     int64_t count, int64_t size, float* scores, Queue& queue);

// Proof: a lane adds up at most size / 32 + 8 products, each rounded once with its sum, and five
// more additions join the lanes; each errs by at most 2^-24 of a sum of magnitudes that
// Cauchy-Schwarz bounds.
constexpr float few_rows_rounding(int64_t size) {
  return static_cast<float>(size / 32 + 16) * 0x1p-23f;
}

// Compares scores [rows, count] of features [first, first + count) with the features' bounds and
// lists those that may be active and among the k best. Features that k others surely beat are
// dropped from a list that is full; where too many are left they are computed and the k best kept.
// So no list overflows.
int select(const float* scores, const float* x, const Margin* margins, int64_t rows, int64_t first,
           int64_t count, const Weights& weights, const CandidateLists& lists, Queue& queue);

// Joins each row's lists in its first one, without the features that k others surely beat.
int merge(const Margin* margins, int64_t rows, const Weights& weights, const CandidateLists& lists,
          Queue& queue);

// Replaces each deferred feature by its exact key, or by 0 where it is not active.
int compute_exact(const float* x, const Margin* margins, int64_t rows, const Weights& weights,
                  const CandidateLists& lists, Queue& queue);

// Writes top_k features per row: the k best, then the lowest features that are not among them.
int finish(const LayerPointers* layer, const Margin* margins, int64_t first, int64_t rows,
           int64_t features, int64_t max_active, int64_t top_k, const CandidateLists& lists,
           Queue& queue);

// Whether this build has these kernels.
bool built();

// Of the current device.
int multiprocessors(int* count);
// Host memory that the device reads directly.
int allocate_pinned(void** memory, int64_t bytes);
void free_pinned(void* memory);

// The name of a status and what it means.
const char* error_name(int status);
const char* error_text(int status);

// A new graph, empty.
int make_graph(void** graph);
// Makes *executable, which can be launched any number of times, of a graph, and destroys the graph.
// *executable is null where that fails.
int finish_graph(void* graph, void** executable);
int launch_graph(void* executable, void* stream);
void destroy_graph(void* executable);
// Whether somebody captures the stream's work.
bool is_capturing(void* stream);

}  // namespace sparse_transcoder::cuda
