#pragma once
#include "cuda_runtime.h"
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value);
};
inline float __bfloat162float(__nv_bfloat16 value) {
  return reinterpret_bits<float>(uint32_t{value.bits} << 16);
}
// To nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16(float value) {
  const auto bits = reinterpret_bits<uint32_t>(value);
  __nv_bfloat16 nearest;
  nearest.bits =
      value != value ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  return nearest;
}
inline __nv_bfloat16::__nv_bfloat16(float value) : __nv_bfloat16(__float2bfloat16(value)) {}
