#pragma once
#include "cuda_runtime.h"
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) { return reinterpret_bits<float>(uint32_t{value.bits} << 16); }
