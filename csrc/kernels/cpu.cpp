// Chooses the instruction set, once.
#include "cpu.h"

#include <cstdlib>
#include <cstring>

namespace sparse_transcoder::kernels {

#if !defined(__x86_64__)
const CpuKernels avx2_kernels = portable_kernels;
#endif

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = []() -> const CpuKernels& {
#if defined(__x86_64__)
    const char* forced = std::getenv("SPARSE_TRANSCODER_CPU");
    const bool portable = forced != nullptr && std::strcmp(forced, "portable") == 0;
    if (!portable && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      return avx2_kernels;
#endif
    return portable_kernels;
  }();
  return chosen;
}

}  // namespace sparse_transcoder::kernels
