// AVX2 with VNNI: Intel's processors without AVX-512 since 2021, AMD's since Zen 5. The machine's
// code for the one instruction differs from AVX-512's (SPARSE_TRANSCODER_VEX); this file is
// compiled once for each, so that it also runs, for tests, where only that is.
#include "cpu/kernels/screen_avx2-inl.h"

namespace sparse_transcoder::cpu {
namespace {

struct Vnni {  // eight features a vector
  static constexpr int features = 16;
  static void load(const uint8_t* w, __m256i (&wv)[2]) {
    wv[0] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    wv[1] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32));
  }
  static __m256i input(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof(four));
    return _mm256_set1_epi32(four);
  }
  static void add(__m256i& sum, __m256i w, __m256i x) {
#ifdef SPARSE_TRANSCODER_VEX
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
#else
    asm("vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
#endif
  }
  static void total(const __m256i (&sum)[2], __m256i (&totals)[2]) {
    totals[0] = sum[0];
    totals[1] = sum[1];
  }
};

}  // namespace

#ifdef SPARSE_TRANSCODER_VEX
void use_avx2vnni(CpuKernels& kernels) {
#else
void use_avx2vnni_evex(CpuKernels& kernels) {
#endif
  kernels.name = "avx2vnni";
  kernels.two_planes_rows = 3;
  kernels.dense_share = 0.17;
  kernels.screen_int8 = screen_int8<Vnni>;
}

}  // namespace sparse_transcoder::cpu
