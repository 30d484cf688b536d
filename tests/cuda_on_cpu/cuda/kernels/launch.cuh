// In place of csrc/cuda/kernels/launch.cuh: a kernel's threads run as CPU threads.
#pragma once

#include <type_traits>

#include "cuda/kernels/element.cuh"
#include "cuda/kernels/kernels.h"
#include "cuda_runtime.h"

namespace sparse_transcoder::cuda {
namespace {

struct Grid {
  Grid(dim3 blocks, unsigned memory_bytes = 0) : blocks(blocks), memory_bytes(memory_bytes) {}
  dim3 blocks;
  unsigned memory_bytes;
};

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), Grid grid, Queue& queue,
           std::type_identity_t<Parameters>... arguments) {
  enqueue(queue,
          [=] { run(grid.blocks, threads, grid.memory_bytes, [=] { kernel(arguments...); }); });
  return 0;
}

}  // namespace
}  // namespace sparse_transcoder::cuda
