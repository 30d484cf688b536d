// In place of csrc/cuda/kernels/launch.cuh: a kernel's threads run as CPU threads.
#pragma once

#include <type_traits>

#include "cuda/kernels/element.cuh"
#include "cuda/kernels/kernels.h"
#include "cuda_runtime.h"
#include "streams.h"

namespace sparse_transcoder::cuda {
namespace {

struct Grid {
  Grid(dim3 blocks, unsigned memory_bytes = 0) : blocks(blocks), memory_bytes(memory_bytes) {}
  dim3 blocks;
  unsigned memory_bytes;
};

// Of a kernel's arguments: which chunks are screened in int8.
template <typename Argument>
void note(const Argument&) {}
inline void note(const Int8Rows& int8) {
  if (int8.rows) int8_chunks.push_back(int8.inputs);
}

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), Grid grid, Queue& queue,
           std::type_identity_t<Parameters>... arguments) {
  enqueue(queue, [=] {
    (note(arguments), ...);
    run(grid.blocks, threads, grid.memory_bytes, [=] { kernel(arguments...); });
  });
  return 0;
}

}  // namespace
}  // namespace sparse_transcoder::cuda
