// In place of csrc/cuda/kernels/launch.cuh: a kernel's threads run as CPU threads.
#pragma once

#include <type_traits>

#include "cuda/kernels/element.cuh"
#include "cuda/kernels/kernels.h"
#include "cuda_runtime.h"

namespace sparse_transcoder::cuda {
namespace {

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, Queue& queue,
           std::type_identity_t<Parameters>... arguments) {
  enqueue(queue, [=] { run(grid, threads, [=] { kernel(arguments...); }); });
  return 0;
}

}  // namespace
}  // namespace sparse_transcoder::cuda
