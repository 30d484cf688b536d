// The one way to start a kernel. The tests' CPU simulation has a file of this name in its place.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kernels/element.cuh"
#include "cuda/kernels/kernels.h"

namespace sparse_transcoder::cuda {
namespace {

template <typename Type>
struct Same {
  using type = Type;
};

// Blocks of `threads` threads, with so many bytes of block_memory each.
struct Grid {
  Grid(dim3 blocks, unsigned memory_bytes = 0) : blocks(blocks), memory_bytes(memory_bytes) {}
  dim3 blocks;
  unsigned memory_bytes;
};

// Puts a grid on the queue. The arguments become the kernel's own parameter types.
template <typename... Parameters>
int launch(void (*kernel)(Parameters...), Grid grid, Queue& queue,
           typename Same<Parameters>::type... arguments) {
  void* pointers[] = {&arguments...};
  auto* function = reinterpret_cast<void*>(kernel);
  int status = cudaSuccess;
  if (grid.memory_bytes > 48 << 10)  // what a kernel may have without asking
    status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  int(grid.memory_bytes));
  if (status != cudaSuccess) return status;
  if (!queue.graph)
    return cudaLaunchKernel(function, grid.blocks, dim3(threads), pointers, grid.memory_bytes,
                            static_cast<cudaStream_t>(queue.stream));
  cudaKernelNodeParams node = {};
  node.func = function;
  node.gridDim = grid.blocks;
  node.blockDim = dim3(threads);
  node.sharedMemBytes = grid.memory_bytes;
  node.kernelParams = pointers;
  const auto last = static_cast<cudaGraphNode_t>(queue.last);
  cudaGraphNode_t added = nullptr;
  status = cudaGraphAddKernelNode(&added, static_cast<cudaGraph_t>(queue.graph), &last,
                                  last ? 1 : 0, &node);
  if (status == cudaSuccess) queue.last = added;
  return status;
}

}  // namespace
}  // namespace sparse_transcoder::cuda
