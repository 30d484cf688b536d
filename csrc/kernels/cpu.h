// The inner loops of the CPU engine. Torch-free: raw pointers and sizes. One file an instruction set; all give the same bits.
#pragma once

#include <cstdint>

namespace sparse_transcoder::kernels {

enum class Dtype { float32, bfloat16, float16 };

// What decides whether a feature survives a screen; one entry per feature. `low` and `high` bracket gate - bias, widened by the
// rounding of everything done near the gate, so that a score surely under `low` is surely inactive and one at `high` surely
// active.
struct Gate {
  const float* norm;  // >= ||w||
  const float* bias;  // b_enc
  const float* gate;  // smallest active value: max(tau, nextafter(theta), smallest positive float)
  const float* low;
  const float* high;
};

struct CpuKernels {
  const char* name;

  // sum_i x[i] * w[i] in float64: exact products, 32 interleaved partial sums, then a fixed tree. Independent of the instruction
  // set and of fused multiply-add, because a product of two float32 is exact in float64.
  double (*dot[3])(const float* x, const void* w, int64_t size);

  // scores[r * count + f] = sum_i x[r * size + i] * w[f * size + i] in float32, in any order; x [rows, size], w [count, size].
  void (*product[3])(const float* x, int64_t rows, const void* w, int64_t count, int64_t size, float* scores);

  // Features of one row that a screen cannot rule out, as (position << 1 | ambiguous) in ascending order; returns how many.
  // |score + bias - exact| <= margin * norm. A feature is kept when it may be active and either may reach `bound` (the row's
  // running k-th best) or is ambiguous: too near its gate to be counted unseen. Those surely active add to *certain.
  int64_t (*candidates)(const float* scores, const Gate& gate, int64_t count, float margin, float bound, uint32_t* out,
                        int64_t* certain);

  // out[i] = float(w[i]), exactly.
  void (*widen[3])(const void* w, float* out, int64_t size);
};

// The best that this machine can run, chosen once. SPARSE_TRANSCODER_CPU=portable|avx2 forces one (for tests).
const CpuKernels& cpu_kernels();

extern const CpuKernels portable_kernels;
extern const CpuKernels avx2_kernels;

}  // namespace sparse_transcoder::kernels
