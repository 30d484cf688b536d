// Linked into a build without CUDA kernels: the engine refuses CUDA tensors before any of these is
// called.
#include "cuda/kernels/kernels.h"

namespace sparse_transcoder::cuda {
namespace {
constexpr int no_device = 100;  // cudaErrorNoDevice
}

bool built() { return false; }
int set_io(const Io*, int64_t, Io*, void*) { return no_device; }
int prepare(const Rows&, const Screen&, float*, void*, float*, const Lists&, void*) {
  return no_device;
}
int multiply_few(const float*, int64_t, const void*, Dtype, int64_t, int64_t, int64_t, float*,
                 void*) {
  return no_device;
}
int select(const float*, const float*, const float*, int64_t, int64_t, int64_t, const Weights&,
           const Lists&, void*) {
  return no_device;
}
int merge(const float*, int64_t, const Weights&, const Lists&, void*) { return no_device; }
int rescore(const float*, const float*, int64_t, const Weights&, const Lists&, void*) {
  return no_device;
}
int finish(const Io*, const float*, int64_t, int64_t, int64_t, int64_t, int64_t, const Lists&,
           void*) {
  return no_device;
}
int multiprocessors(int*) { return no_device; }
int begin_capture(void**, int64_t) { return no_device; }
int end_capture(void**, int64_t, void**) { return no_device; }
int launch_graph(void*, void*) { return no_device; }
void destroy_graph(void*) {}
bool is_capturing(void*) { return false; }

}  // namespace sparse_transcoder::cuda
