// Plain C++: any machine, and the definition of the order of every sum.
#include <algorithm>

#include "cpu.h"
#include "element.h"

namespace sparse_transcoder::kernels {
namespace {

template <typename Element>
double dot(const float* x, const void* weights, int64_t size) {
  const auto* w = static_cast<const typename Element::type*>(weights);
  double sums[32] = {};
  int64_t i = 0;
  for (; i + 32 <= size; i += 32)
    for (int lane = 0; lane < 32; ++lane) sums[lane] += double{x[i + lane]} * Element::widen(w[i + lane]);
  for (int lane = 0; i < size; ++i, ++lane) sums[lane] += double{x[i]} * Element::widen(w[i]);
  return fold(sums);
}

// Four partial sums each for two rows and two features: what compilers turn into vectors on any machine.
template <typename Element>
void product(const float* x, int64_t rows, const void* weights, int64_t count, int64_t size, float* scores) {
  const auto* w = static_cast<const typename Element::type*>(weights);
  for (int64_t f = 0; f < count; f += 2)
    for (int64_t r = 0; r < rows; r += 2) {
      // Past the last row or feature the last one is computed again.
      const int64_t r1 = std::min(r + 1, rows - 1), f1 = std::min(f + 1, count - 1);
      const float *x0 = x + r * size, *x1 = x + r1 * size;
      const auto *w0 = w + f * size, *w1 = w + f1 * size;
      float s00[4] = {}, s01[4] = {}, s10[4] = {}, s11[4] = {};
      int64_t i = 0;
      for (; i + 4 <= size; i += 4)
        for (int lane = 0; lane < 4; ++lane) {
          const float a = Element::widen(w0[i + lane]), b = Element::widen(w1[i + lane]);
          s00[lane] += x0[i + lane] * a;
          s01[lane] += x0[i + lane] * b;
          s10[lane] += x1[i + lane] * a;
          s11[lane] += x1[i + lane] * b;
        }
      for (int lane = 0; i < size; ++i, ++lane) {
        s00[lane] += x0[i] * Element::widen(w0[i]);
        s01[lane] += x0[i] * Element::widen(w1[i]);
        s10[lane] += x1[i] * Element::widen(w0[i]);
        s11[lane] += x1[i] * Element::widen(w1[i]);
      }
      const auto sum = [](const float* s) { return (s[0] + s[2]) + (s[1] + s[3]); };
      scores[r * count + f] = sum(s00);
      scores[r * count + f1] = sum(s01);
      scores[r1 * count + f] = sum(s10);
      scores[r1 * count + f1] = sum(s11);
    }
}

int64_t candidates(const float* scores, const Gate& gate, int64_t count, float margin, float bound, uint32_t* out,
                   int64_t* certain) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float slack = margin * gate.norm[i];
    const float upper = scores[i] + slack;
    const bool sure = scores[i] - slack >= gate.high[i];
    *certain += sure;
    // Written so that NaN, the margin of a row too large to screen, counts as "may be".
    if (!(upper < gate.low[i]) && (!sure || !(upper < bound - gate.bias[i])))
      out[found++] = static_cast<uint32_t>(i) << 1 | !sure;
  }
  return found;
}

template <typename Element>
void widen(const void* weights, float* out, int64_t size) {
  const auto* w = static_cast<const typename Element::type*>(weights);
  for (int64_t i = 0; i < size; ++i) out[i] = Element::widen(w[i]);
}

}  // namespace

const CpuKernels portable_kernels = {"portable",
                                     {dot<F32>, dot<BF16>, dot<F16>},
                                     {product<F32>, product<BF16>, product<F16>},
                                     candidates,
                                     {widen<F32>, widen<BF16>, widen<F16>}};

}  // namespace sparse_transcoder::kernels
