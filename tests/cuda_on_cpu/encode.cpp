// The CUDA path's sequence of steps, as encode_cuda.cpp makes it, callable from Python. Scores are products whose operands are
// truncated to TF32's 10 bits, so that the margin is put to use.
#include <algorithm>
#include <vector>

#include "kernels/cuda.h"

using namespace sparse_transcoder::kernels;

namespace {
float truncate(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  bits &= 0xffffe000u;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
}  // namespace

extern "C" void encode(const void* hidden, int hidden_dtype, int64_t batch, int64_t tokens, int64_t size, const void* weights,
                       int weight_dtype, const float* wide_weights, int64_t features, const float* const* vectors,
                       const float* const* norms, float largest_norm, float largest_bias, float roundoff, int64_t chunk,
                       int64_t panel, int groups, int k, int64_t most_active, int64_t top_k, float* activations, int64_t* indices,
                       float* sparsity) {
  int capacity = 1;
  while (capacity < std::max(2 * k, k + cuda::segment)) capacity *= 2;
  std::vector<uint64_t> keys(chunk * groups * capacity), least(chunk * groups);
  std::vector<int> sizes(chunk * groups), certain(chunk * groups);
  std::vector<float> x(chunk * size), margin(chunk), scores(chunk * panel);
  const cuda::Lists lists = {keys.data(), sizes.data(), least.data(), certain.data(), groups, capacity, k};
  const int64_t rows = batch * tokens, bytes = weight_dtype == 0 ? 4 : 2;
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t count = std::min(chunk, rows - first);
    cuda::prepare(
        {hidden, Dtype(hidden_dtype), first, count, tokens, {tokens * size, size, 1}, size, norms[0], norms[1], norms[2]},
        roundoff, largest_norm, x.data(), margin.data(), lists, nullptr);
    for (int64_t f = 0; f < features; f += panel) {
      const int64_t width = std::min(panel, features - f);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t j = 0; j < width; ++j) {
          float sum = 0;
          for (int64_t i = 0; i < size; ++i) sum += truncate(x[r * size + i]) * truncate(wide_weights[(f + j) * size + i]);
          scores[r * width + j] = sum;
        }
      const Gate gate = {vectors[0] + f, vectors[1] + f, vectors[2] + f, vectors[3] + f, vectors[4] + f};
      cuda::select(
          scores.data(), x.data(), margin.data(), count,
          {static_cast<const char*>(weights) + f * size * bytes, Dtype(weight_dtype), f, width, size, gate, largest_bias}, lists,
          nullptr);
    }
    cuda::finish(lists, margin.data(), count, features, most_active, top_k, activations + first * top_k, indices + first * top_k,
                 sparsity + first, nullptr);
  }
}
