// The steps of the CUDA engine: pointers, sizes, a queue. Torch-free, so that nvcc compiles them
// beside any torch; a build without CUDA kernels links no_cuda.cpp in their place. Every pointer is
// device memory. Steps run asynchronously; each returns the status of its launch (0: fine), which
// error_name explains.
//
// A chunk of rows goes through prepare; then, tile by tile of features, a product (cuBLAS's, or one
// of the four here) and select; then merge, compute_exact and finish.
#pragma once

#include <cstdint>

#include "bounds.h"
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
  // 0, or int8_share: then a feature's norm in FeatureBounds is its int8 copy's error plus
  // int8_share times its norm, and a row's margin is per unit of that ("The screens of CUDA").
  float share = 0;
};

// The int8 screen multiplies rotated rows and weights. R flips signs and then multiplies
// int8_mixed inputs at a time, with zeros after the last ones, by Hadamard's matrix.
constexpr int int8_mixed = 128;
constexpr int64_t max_int8_inputs = 1 << 16;
constexpr int64_t int8_inputs(int64_t size) {
  return (size + int8_mixed - 1) / int8_mixed * int8_mixed;
}
// A row in memory: integers q of up to 16 bits, 256 high + low, as all high bytes, all low bytes,
// and then their scale in float32. Distances are constants, which cost a kernel no register, and
// five cache lines apart, so that rows do not share their place in the cache.
constexpr int int8_plane_bytes = max_int8_inputs + 5 * 128;
constexpr int int8_row_bytes = 2 * int8_plane_bytes + 5 * 128;
// Of a feature's norm that counts beside its error, so that one number per row is enough. The
// roundings of a row to 16 bits and of its score are usually smaller, and an int8 copy's error is
// about 2^-7 of the norm.
constexpr float int8_share = 0x1p-13f;
// A score of int8 copies is rounded three times, by 2^-24 of ||s q|| ||t p|| <= 4 ||y|| ||z|| each.
constexpr float int8_rounding = 0x1p-20f;
// A row or a feature with a smaller scale is taken as zeros, and so is a row whose sums could leave
// float32: all of it is error.
constexpr float min_int8_scale = 0x1p-100f, max_int8_scale = 0x1p96f;

// Where rows are quantised to.
struct Int8Rows {
  int8_t* rows = nullptr;  // [count, int8_row_bytes], or null
  int inputs = 0;
  float max_norm = 0;  // of the integers p of a feature
};

// Whether R flips the sign of input i.
SPARSE_TRANSCODER_ON_BOTH constexpr bool flips_sign(uint32_t i) {
  const uint32_t mixed = i * 0x9e3779b1u;
  return ((mixed ^ mixed >> 15) * 0x85ebca77u & 0x80000000u) != 0;
}

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
  int* computed_count;  // [rows] deferred features that select computed, for want of room
  int groups, capacity, k;
};

constexpr int list_room = 1024;          // a list's free places after features were dropped from it
constexpr int max_groups = 32;           // that a row's features are split into where rows are few
constexpr int64_t few_rows = 8;          // the most that product_few_rows and product_int8 take
constexpr int64_t max_tensor_rows = 64;  // the most that the products on tensor cores take
constexpr int64_t max_layer_pointers = 48;  // per set_layer_pointers: arguments end at 4 KB

// layers[i] = values[i]; values is host memory, read before this returns.
int set_layer_pointers(const LayerPointers* values, int64_t count, LayerPointers* layers,
                       Queue& queue);

// x = norm(h) [count, H] in float32 and, where given, rounded to bfloat16. margins [count]:
// infinite where nothing is known, NaN for a row that is not finite. The screens of this backend
// have an error that is proportional to one number per feature, so per_residual is 0. Where int8
// says so, rows are also rotated and quantised. Empties the lists.
int prepare(const PrepareArgs& args, const ScreenErrors& errors, float* x, void* rounded,
            const Int8Rows& int8, Margin* margins, const CandidateLists& lists, Queue& queue);

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

// The same from int8 copies, of w [.., inputs] and its scale [..]: float(q . p) times both scales.
// It also reads rows up to few_rows, whatever they hold.
int product_int8(const int8_t* rows, int64_t row_count, const int8_t* w, const float* scale,
                 int64_t first, int64_t count, int64_t inputs, float* scores, Queue& queue);

// The same scores as product_int8's, bit for bit, for at most max_tensor_rows rows. This one and
// the next are for devices with has_tensor_cores.
int product_tensor_int8(const int8_t* rows, int64_t row_count, const int8_t* w, const float* scale,
                        int64_t first, int64_t count, int64_t inputs, float* scores, Queue& queue);

// scores as product_few_rows gives them, of bfloat16 x [rows, size] and w [.., size], for at most
// max_tensor_rows rows. Both are aligned to 16 bytes, and size is a multiple of tensor_inputs. A
// sum is off by at most tensor_rounding(size) * ||x|| ||w||.
int product_tensor_bf16(const void* x, int64_t rows, const void* w, int64_t first, int64_t count,
                        int64_t size, float* scores, Queue& queue);
constexpr int64_t tensor_inputs = 8;
// Proof: an instruction adds up 16 products from zero, which loses at most 20 * 2^-22 of their sum
// of magnitudes (see product_rounding of chunk.cpp), and (size + 15) / 16 additions round once
// each. The rest pays for the conversion to float.
constexpr float tensor_rounding(int64_t size) {
  const double terms = static_cast<double>(size / 16 + 84) * 0x1p-24;
  return static_cast<float>(terms / (1 - (terms < 0.5 ? terms : 0.5)));
}
constexpr int tensor_features = 128;  // of a block of either

// Compares scores [rows, count] of features [first, first + count) with the features' bounds and
// lists those that may be active and among the k best. Features that k others surely beat are
// dropped from a list that is full; where too many are left they are computed and the k best kept.
// So no list overflows.
int select(const float* scores, const float* x, const Margin* margins, int64_t rows, int64_t first,
           int64_t count, const Weights& weights, const CandidateLists& lists, Queue& queue);

// Joins each row's lists in its first one, without the features that k others surely beat.
int merge(const Margin* margins, int64_t rows, const Weights& weights, const CandidateLists& lists,
          Queue& queue);

// Replaces each deferred feature by its exact key, or by 0 where it is not active. candidates
// [rows]: where not null, how many features of a row this and select compute. It may be pinned host
// memory, since nothing waits for it.
int compute_exact(const float* x, const Margin* margins, int64_t rows, const Weights& weights,
                  const CandidateLists& lists, int* candidates, Queue& queue);

// Writes top_k features per row: the k best, then the lowest features that are not among them.
int finish(const LayerPointers* layer, const Margin* margins, int64_t first, int64_t rows,
           int64_t features, int64_t max_active, int64_t top_k, const CandidateLists& lists,
           Queue& queue);

// Whether this build has these kernels.
bool built();

// Of the current device; shared memory is that of a multiprocessor.
int multiprocessors(int* count);
int shared_memory(int* bytes);
// Whether the products on tensor cores run on the current device: from compute capability 8.0 on,
// where this build has kernels for that.
int has_tensor_cores(bool* has);
// Host memory that the device reads and writes directly.
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
