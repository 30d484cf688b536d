#pragma once
#include "cuda_runtime.h"
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
  return reinterpret_bits<float>(uint32_t{value.bits} << 16);
}
// To nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16(float value) {
  const auto bits = reinterpret_bits<uint32_t>(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
