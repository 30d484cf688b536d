// In place of csrc/cpu/kernels/amx-inl.h: tiles that need no processor with AMX.
#pragma once

#include "tiles.h"

namespace sparse_transcoder::cpu::amx {
namespace {

inline bool is_usable() { return true; }
inline void configure(const void* shapes) { emulated_amx::configure(shapes); }
inline void release() { emulated_amx::release(); }

template <int tile>
inline void zero() {
  emulated_amx::zero(tile);
}
template <int tile>
inline void load(const void* from, int64_t stride) {
  emulated_amx::load(tile, from, stride);
}
template <int tile>
inline void store(void* to, int64_t stride) {
  emulated_amx::store(tile, to, stride);
}
template <int sums, int rows, int columns>
inline void add_products() {
  emulated_amx::add_products(sums, rows, columns);
}

}  // namespace
}  // namespace sparse_transcoder::cpu::amx
