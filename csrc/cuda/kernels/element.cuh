// Stored numbers in device code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "types.h"

namespace sparse_transcoder::cuda {
namespace {

constexpr int threads = 256;  // of every block

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }

// Calls run with a value of the type that dtype names.
template <typename Run>
int for_dtype(Dtype dtype, const Run& run) {
  if (dtype == Dtype::float32) run(float());
  if (dtype == Dtype::bfloat16) run(__nv_bfloat16());
  if (dtype == Dtype::float16) run(__half());
  return cudaGetLastError();
}

}  // namespace
}  // namespace sparse_transcoder::cuda
