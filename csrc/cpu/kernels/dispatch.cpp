// The instruction sets, and the choice between them.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels/kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace sparse_transcoder::cpu {
namespace {

struct InstructionSet {
  std::string_view name;
  bool (*supported)();
  void (*use)(KernelTable& kernels);
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
bool has_avx512amx() { return has_avx512vnni() && has_amx(); }
bool has_avx2vnni() {
  return has_avx512vnni() || (has_avx2() && __builtin_cpu_supports("avxvnni"));
}
void use_avx2vnni(KernelTable& kernels) {
  has_avx512vnni() ? use_avx2vnni_evex(kernels) : use_avx2vnni_vex(kernels);
}
#elif defined(__aarch64__)
bool has_dot_product() {
#if defined(__linux__)
  constexpr unsigned long asimddp = 1 << 20;  // HWCAP_ASIMDDP, which older headers lack
  return getauxval(AT_HWCAP) & asimddp;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

// From the slowest to the fastest. Each keeps the loops of the one before it that it does not
// replace, and runs only where that one runs.
constexpr InstructionSet instruction_sets[] = {
    {"portable", [] { return true; }, use_portable},
#if defined(__x86_64__)
    {"avx2", has_avx2, use_avx2},
    {"avx2vnni", has_avx2vnni, use_avx2vnni},
    {"avx512vnni", has_avx512vnni, use_avx512vnni},
    {"avx512amx", has_avx512amx, use_avx512amx},
#elif defined(__aarch64__)
    {"neon", [] { return true; }, use_neon},
    {"neondot", has_dot_product, use_neondot},
#endif
};

const KernelTable& choose() {
  const char* name = std::getenv("SPARSE_TRANSCODER_CPU");
  const std::vector<KernelTable>& runnable = runnable_kernels();
  if (name == nullptr || *name == 0) return runnable.back();
  std::string names;
  for (const KernelTable& kernels : runnable) {
    if (kernels.name == name) return kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels.name);
  }
  throw std::invalid_argument("SPARSE_TRANSCODER_CPU must be one of " + names +
                              " on this machine, got " + name);
}

}  // namespace

const std::vector<KernelTable>& runnable_kernels() {
  static const std::vector<KernelTable> runnable = [] {
    std::vector<KernelTable> tables;
    KernelTable kernels = {};
    for (const InstructionSet& set : instruction_sets) {
      if (!set.supported()) continue;
      set.use(kernels);
      kernels.name = set.name;
      tables.push_back(kernels);
    }
    return tables;
  }();
  return runnable;
}

const KernelTable& active_kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace sparse_transcoder::cpu
