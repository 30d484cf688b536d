// Captured work: recorded once, launched many times on other tensors, whose addresses lie in device
// memory.
#include <cuda_runtime.h>

#include "cuda/kernels/kernels.h"

namespace sparse_transcoder::cuda {
namespace {

struct IoBatch {
  Io io[most_io];
};

__global__ void set_io_kernel(IoBatch batch, int count, Io* io) {
  if (threadIdx.x < count) io[threadIdx.x] = batch.io[threadIdx.x];
}

// What comes next on the second stream waits for what is on the first.
int follow(void* first, void* second) {
  cudaEvent_t event = nullptr;
  int status = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  if (status != cudaSuccess) return status;
  status = cudaEventRecord(event, static_cast<cudaStream_t>(first));
  if (status == cudaSuccess)
    status = cudaStreamWaitEvent(static_cast<cudaStream_t>(second), event, 0);
  cudaEventDestroy(event);
  return status;
}

}  // namespace

int set_io(const Io* values, int64_t count, Io* io, void* stream) {
  IoBatch batch = {};
  for (int64_t i = 0; i < count; ++i) batch.io[i] = values[i];
  set_io_kernel<<<1, 64, 0, static_cast<cudaStream_t>(stream)>>>(batch, int(count), io);
  return cudaGetLastError();
}

bool built() { return true; }

int multiprocessors(int* count) {
  int device = 0;
  const int status = cudaGetDevice(&device);
  return status != cudaSuccess
             ? status
             : cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

// The streams are new, so that nobody else's work gets into the record; and thread-local capture
// lets other threads go on, with allocations too.
int begin_capture(void** streams, int64_t count) {
  for (int64_t i = 0; i < count; ++i) streams[i] = nullptr;
  int status = cudaSuccess;
  for (int64_t i = 0; i < count && status == cudaSuccess; ++i)
    status = cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(&streams[i]),
                                       cudaStreamNonBlocking);
  if (status == cudaSuccess)
    status = cudaStreamBeginCapture(static_cast<cudaStream_t>(streams[0]),
                                    cudaStreamCaptureModeThreadLocal);
  for (int64_t i = 1; i < count && status == cudaSuccess; ++i)
    status = follow(streams[0], streams[i]);
  return status;
}

int end_capture(void** streams, int64_t count, void** graph) {
  *graph = nullptr;
  int status = cudaSuccess;
  for (int64_t i = 1; i < count && status == cudaSuccess; ++i)
    status = follow(streams[i], streams[0]);
  cudaGraph_t recorded = nullptr;
  const int ended = cudaStreamEndCapture(static_cast<cudaStream_t>(streams[0]), &recorded);
  if (status == cudaSuccess) status = ended;
  if (status == cudaSuccess) {
    cudaGraphExec_t ready = nullptr;
    status = cudaGraphInstantiateWithFlags(&ready, recorded, 0);
    if (status == cudaSuccess) *graph = ready;
  }
  if (recorded) cudaGraphDestroy(recorded);
  for (int64_t i = 0; i < count; ++i)
    if (streams[i]) cudaStreamDestroy(static_cast<cudaStream_t>(streams[i]));
  if (status != cudaSuccess) cudaGetLastError();  // not left for another caller to find
  return status;
}

int launch_graph(void* graph, void* stream) {
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), static_cast<cudaStream_t>(stream));
}

void destroy_graph(void* graph) { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)); }

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone;
  // An error says that another thread records, and that the legacy stream would get in its way: not
  // this stream's.
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &state) != cudaSuccess)
    cudaGetLastError();
  return state != cudaStreamCaptureStatusNone;
}

}  // namespace sparse_transcoder::cuda
