// The steps of the CUDA engine: pointers, sizes, a stream. Torch-free, so that nvcc compiles them beside any torch; where torch
// has no CUDA, no_cuda.cpp is linked in their place. Every pointer is device memory. Launches are asynchronous; each returns what
// cudaGetLastError says (0: fine).
#pragma once

#include <cstdint>

#include "cpu.h"

namespace sparse_transcoder::kernels::cuda {

// Rows [first, first + count) of hidden [B, T, H] with its strides in elements, and how they are normed.
struct HiddenRows {
  const void* hidden;
  Dtype dtype;
  int64_t first, count, T, stride[3], size;
  const float *input_bias, *ln_weight, *ln_bias;  // [H], or null
};

// A list of keys per row and group, as kernels::TopList, in arrays. capacity is a power of two and at least k + segment.
struct Lists {
  uint64_t* keys;   // [rows, groups, capacity]
  int* size;        // [rows, groups]
  uint64_t* least;  // [rows, groups]
  int* certain;     // [rows, groups]
  int groups, capacity, k;
};

constexpr int segment = 1024;  // features gated between two looks at a list's size

// Weights and gates of a layer's features [first, first + count), and the bound's slack.
struct Panel {
  const void* weights;  // of feature `first`, [count, size]
  Dtype dtype;
  int64_t first, count, size;
  Gate gate;
  float largest_bias;
};

// x = norm(h) in float32 [count, H]; margin = max(min_normal, ||x||) * roundoff, infinite where `roundoff` cannot bound the
// product, NaN for a row that is not finite; empties the lists.
int prepare(const HiddenRows& rows, float roundoff, float largest_norm, float* x, float* margin, const Lists& lists,
            void* stream);

// Gates scores [rows, panel.count], computes survivors exactly from x and the panel's weights, and keeps the best in the lists.
int select(const float* scores, const float* x, const float* margin, int64_t rows, const Panel& panel, const Lists& lists,
           void* stream);

// Merges each row's lists and writes top_k slots: winners, then the lowest features that are not among them.
int finish(const Lists& lists, const float* margin, int64_t rows, int64_t features, int64_t most_active, int64_t top_k,
           float* activations, int64_t* indices, float* sparsity, void* stream);

}  // namespace sparse_transcoder::kernels::cuda
