// Linked into a build without CUDA kernels: the engine refuses CUDA tensors before any of these is
// called.
#include "cuda/kernels/kernels.h"

namespace sparse_transcoder::cuda {
namespace {
constexpr int no_device = 100;  // cudaErrorNoDevice
}

bool built() { return false; }
int set_layer_pointers(const LayerPointers*, int64_t, LayerPointers*, Queue&) { return no_device; }
int prepare(const PrepareArgs&, const ScreenErrors&, float*, void*, const Int8Rows&, Margin*,
            const CandidateLists&, Queue&) {
  return no_device;
}
int product_few_rows(const float*, int64_t, const void*, Dtype, int64_t, int64_t, int64_t, float*,
                     Queue&) {
  return no_device;
}
int product_int8(const int8_t*, int64_t, const int8_t*, const float*, int64_t, int64_t, int64_t,
                 float*, Queue&) {
  return no_device;
}
int product_tensor_int8(const int8_t*, int64_t, const int8_t*, const float*, int64_t, int64_t,
                        int64_t, float*, Queue&) {
  return no_device;
}
int product_tensor_bf16(const void*, int64_t, const void*, int64_t, int64_t, int64_t, float*,
                        Queue&) {
  return no_device;
}
int select(const float*, const float*, const Margin*, int64_t, int64_t, int64_t, const Weights&,
           const CandidateLists&, Queue&) {
  return no_device;
}
int merge(const Margin*, int64_t, const Weights&, const CandidateLists&, Queue&) {
  return no_device;
}
int compute_exact(const float*, const Margin*, int64_t, const Weights&, const CandidateLists&, int*,
                  Queue&) {
  return no_device;
}
int finish(const LayerPointers*, const Margin*, int64_t, int64_t, int64_t, int64_t, int64_t,
           const CandidateLists&, Queue&) {
  return no_device;
}
int multiprocessors(int*) { return no_device; }
int shared_memory(int*) { return no_device; }
int has_tensor_cores(bool*) { return no_device; }
int allocate_pinned(void**, int64_t) { return no_device; }
void free_pinned(void*) {}
const char* error_name(int) { return "cudaErrorNoDevice"; }
const char* error_text(int) { return "this build has no CUDA"; }
int make_graph(void**) { return no_device; }
int finish_graph(void*, void**) { return no_device; }
int launch_graph(void*, void*) { return no_device; }
void destroy_graph(void*) {}
bool is_capturing(void*) { return false; }

}  // namespace sparse_transcoder::cuda
