// Graphs: the steps of a call, added once and launched many times on other tensors, whose addresses
// lie in device memory. No stream is ever captured, so no other thread's work can get in the way.
#include <cuda_runtime.h>

#include "cuda/kernels/kernels.h"
#include "cuda/kernels/launch.cuh"

namespace sparse_transcoder::cuda {
namespace {

struct LayerPointersBatch {
  LayerPointers values[max_layer_pointers];
};

__global__ void __launch_bounds__(threads)
    set_layer_pointers_kernel(LayerPointersBatch batch, int count, LayerPointers* layers) {
  if (threadIdx.x < count) layers[threadIdx.x] = batch.values[threadIdx.x];
}

int ask_device(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const int status = cudaGetDevice(&device);
  return status != cudaSuccess ? status : cudaDeviceGetAttribute(value, attribute, device);
}

}  // namespace

int set_layer_pointers(const LayerPointers* values, int64_t count, LayerPointers* layers,
                       Queue& queue) {
  LayerPointersBatch batch = {};
  for (int64_t i = 0; i < count; ++i) batch.values[i] = values[i];
  return launch(set_layer_pointers_kernel, dim3(1), queue, batch, int(count), layers);
}

bool built() { return true; }

int multiprocessors(int* count) { return ask_device(cudaDevAttrMultiProcessorCount, count); }

int shared_memory(int* bytes) {
  return ask_device(cudaDevAttrMaxSharedMemoryPerMultiprocessor, bytes);
}

int has_tensor_cores(bool* has) {
  int major = 0;
  const int status = ask_device(cudaDevAttrComputeCapabilityMajor, &major);
  *has = major >= 8;
  // Also on such a device, kernels may be those that were compiled for an older one.
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, set_layer_pointers_kernel) == cudaSuccess)
    *has &= attributes.ptxVersion >= 80;
  else
    cudaGetLastError();  // not left for another caller to find
  return status;
}

int allocate_pinned(void** memory, int64_t bytes) {
  const int status = cudaHostAlloc(memory, size_t(bytes), cudaHostAllocDefault);
  if (status != cudaSuccess) cudaGetLastError();  // not left for another caller to find
  return status;
}
void free_pinned(void* memory) { cudaFreeHost(memory); }

const char* error_name(int status) { return cudaGetErrorName(cudaError_t(status)); }
const char* error_text(int status) { return cudaGetErrorString(cudaError_t(status)); }

int make_graph(void** graph) { return cudaGraphCreate(reinterpret_cast<cudaGraph_t*>(graph), 0); }

int finish_graph(void* graph, void** executable) {
  cudaGraphExec_t ready = nullptr;
  const int status = cudaGraphInstantiateWithFlags(&ready, static_cast<cudaGraph_t>(graph), 0);
  *executable = status == cudaSuccess ? ready : nullptr;
  cudaGraphDestroy(static_cast<cudaGraph_t>(graph));
  return status;
}

int launch_graph(void* executable, void* stream) {
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable),
                         static_cast<cudaStream_t>(stream));
}

void destroy_graph(void* executable) {
  cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable));
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone;
  // An error says that another thread captures, and that the legacy stream would get in its way:
  // this stream is not captured.
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &state) != cudaSuccess)
    cudaGetLastError();
  return state != cudaStreamCaptureStatusNone;
}

}  // namespace sparse_transcoder::cuda
