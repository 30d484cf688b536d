// Scalar access to stored weights, shared by every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparse_transcoder::cpu {
namespace {  // internal linkage: each instruction set compiles its own

struct F32 {
  using type = float;
  static float widen(float value) { return value; }
};

struct BF16 {
  using type = uint16_t;
  static float widen(uint16_t value) {
    const uint32_t bits = uint32_t{value} << 16;
    float out;
    std::memcpy(&out, &bits, sizeof(out));
    return out;
  }
};

struct F16 {
  using type = uint16_t;
  static float widen(uint16_t value) {
    const uint32_t sign = uint32_t{value} >> 15 << 31;
    const uint32_t magnitude = value & 0x7fffu;
    // Shift the exponent by a multiplication, which is exact and makes subnormals normal; Inf and
    // NaN keep all exponent bits.
    uint32_t bits = magnitude << 13;
    float out;
    std::memcpy(&out, &bits, sizeof(out));
    out *= 0x1p112f;
    std::memcpy(&bits, &out, sizeof(bits));
    if (magnitude >= 0x7c00u) bits |= 0x7f800000u;
    bits |= sign;
    std::memcpy(&out, &bits, sizeof(out));
    return out;
  }
};

// Folds the 32 partial sums of a dot product in the one order that every instruction set keeps.
inline double fold(double* sums) {
  for (int width = 16; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

}  // namespace
}  // namespace sparse_transcoder::cpu
