// Stored numbers in device code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "types.h"

namespace sparse_transcoder::cuda {
namespace {

constexpr int threads = 256;  // per block, of every kernel
constexpr int warps = threads / 32;
constexpr unsigned all_lanes = 0xffffffffu;

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }

// Runs a callable with a value of the type that dtype names.
template <typename Run>
int for_dtype(Dtype dtype, const Run& run) {
  if (dtype == Dtype::float32) return run(float());
  if (dtype == Dtype::bfloat16) return run(__nv_bfloat16());
  return run(__half());
}

}  // namespace
}  // namespace sparse_transcoder::cuda
