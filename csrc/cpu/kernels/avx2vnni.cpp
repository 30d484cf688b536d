// AVX2 with VNNI: Intel's processors without AVX-512 since 2021, AMD's since Zen 5. They encode the
// one instruction (VEX) otherwise than processors with AVX-512 do (EVEX). This file is compiled
// once for each, so that these loops can also be tested where only AVX-512 is.
#include "cpu/kernels/screen_avx2-inl.h"

namespace sparse_transcoder::cpu {
namespace {

// Four int8 products per sum, eight features per vector.
struct Vnni {
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
void use_avx2vnni_vex(KernelTable& kernels) {
#else
void use_avx2vnni_evex(KernelTable& kernels) {
#endif
  kernels.crossovers.two_planes_rows = 3;
  kernels.crossovers.max_share_float32 = 0.20;
  kernels.screen_int8 = screen_int8<Vnni>;
}

}  // namespace sparse_transcoder::cpu
