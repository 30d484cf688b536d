// Chooses the instruction set, once.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels/kernels.h"

namespace sparse_transcoder::cpu {

const std::vector<const CpuKernels*>& runnable_cpu_kernels() {
  static const std::vector<const CpuKernels*> runnable = [] {
    static CpuKernels tables[4];
    std::vector<const CpuKernels*> all;
    const auto add = [&](void (*use)(CpuKernels&)) {
      CpuKernels& table = tables[all.size()];
      if (!all.empty()) table = *all.back();
      use(table);
      all.push_back(&table);
    };
    add(use_portable);
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      add(use_avx2);
      const bool avx512vnni =
          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
      if (avx512vnni || __builtin_cpu_supports("avxvnni"))
        add(avx512vnni ? use_avx2vnni_evex : use_avx2vnni);
      if (avx512vnni) add(use_avx512vnni);
    }
#endif
    return all;
  }();
  return runnable;
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = []() -> const CpuKernels& {
    const char* forced = std::getenv("SPARSE_TRANSCODER_CPU");
    if (forced != nullptr)
      for (const CpuKernels* kernels : runnable_cpu_kernels())
        if (std::strcmp(forced, kernels->name) == 0) return *kernels;
    return *runnable_cpu_kernels().back();
  }();
  return chosen;
}

}  // namespace sparse_transcoder::cpu
