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

// Puts a grid of blocks of `threads` threads on the queue. The arguments become the kernel's own
// parameter types.
template <typename... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, Queue& queue,
           typename Same<Parameters>::type... arguments) {
  void* pointers[] = {&arguments...};
  auto* function = reinterpret_cast<void*>(kernel);
  if (!queue.graph)
    return cudaLaunchKernel(function, grid, dim3(threads), pointers, 0,
                            static_cast<cudaStream_t>(queue.stream));
  cudaKernelNodeParams node = {};
  node.func = function;
  node.gridDim = grid;
  node.blockDim = dim3(threads);
  node.kernelParams = pointers;
  const auto last = static_cast<cudaGraphNode_t>(queue.last);
  cudaGraphNode_t added = nullptr;
  const int status = cudaGraphAddKernelNode(&added, static_cast<cudaGraph_t>(queue.graph), &last,
                                            last ? 1 : 0, &node);
  if (status == cudaSuccess) queue.last = added;
  return status;
}

}  // namespace
}  // namespace sparse_transcoder::cuda
