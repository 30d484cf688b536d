// What the AMX screen asks of the processor: the permission to use tiles, and six operations on
// them. The C++ tests put a file of this name before it on the include path, whose tiles are plain
// C++, so that the screen runs on machines without AMX (tests/cpp/emulated_amx).
//
// The operations are in assembly. gcc 12's own do not say that a tile's load reads memory, and they
// need compiler flags that these do not.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace sparse_transcoder::cpu::amx {
namespace {  // internal linkage: each instruction set compiles its own

// Whether the processor has int8 tiles and Linux lets this process use them. Linux keeps room for
// the tiles of a thread only in processes that have asked. To ask once is enough for all threads,
// and to ask again does no harm. Before 5.16 Linux knows no such request and refuses it.
inline bool is_usable() {
  constexpr unsigned tiles = 1u << 24, int8 = 1u << 25;
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & tiles) || !(d & int8)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// Gives the tiles of this thread the shapes that these 64 bytes tell, and makes them zero.
inline void configure(const void* shapes) {
  asm volatile("ldtilecfg (%0)" : : "r"(shapes) : "memory");
}

// Afterwards no tile of this thread may be used, and none is saved when threads change.
inline void release() { asm volatile("tilerelease" : : : "memory"); }

template <int tile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// Row r of the tile is what lies at from + r * stride.
template <int tile>
inline void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
inline void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}

// sums[m][n] += the four products of rows[m][4 k + i], int8, and columns[k][4 n + i], uint8, for
// every k.
template <int sums, int rows, int columns>
inline void add_products() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(rows), "i"(columns));
}

}  // namespace
}  // namespace sparse_transcoder::cpu::amx
