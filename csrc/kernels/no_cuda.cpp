// Linked where torch has no CUDA: no tensor can be on a device that would need these.
#include "cuda.h"

namespace sparse_transcoder::kernels::cuda {
namespace {
constexpr int no_device = 100;  // cudaErrorNoDevice
}

int prepare(const HiddenRows&, float, float, float*, float*, const Lists&, void*) { return no_device; }
int select(const float*, const float*, const float*, int64_t, const Panel&, const Lists&, void*) { return no_device; }
int finish(const Lists&, const float*, int64_t, int64_t, int64_t, int64_t, float*, int64_t*, float*, void*) { return no_device; }

}  // namespace sparse_transcoder::kernels::cuda
