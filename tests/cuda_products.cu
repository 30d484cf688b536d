// The product on tensor cores as a function of a shared library, for tests on a device.
#include "cuda/kernels/graph.cu"
#include "cuda/kernels/product_tensor.cu"

extern "C" int product_tensor_bf16(const void* x, int64_t rows, const void* w, int64_t count,
                                   int64_t size, float* scores) {
  sparse_transcoder::cuda::Queue queue;
  return sparse_transcoder::cuda::product_tensor_bf16(x, rows, w, 0, count, size, scores, queue);
}
