// Sorts keys. A few are counted against each other in vectors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace sparse_transcoder::cpu {
namespace {  // internal linkage: each instruction set compiles its own

void sort_keys(uint64_t* keys, int64_t count) {
  constexpr int64_t max_counted = 256;  // std::sort is as fast at 512 in AVX2, later in AVX-512
  if (count > max_counted) return std::sort(keys, keys + count, std::greater<>());
  constexpr int64_t lanes = 16;
  uint64_t sorted[max_counted];
  for (int64_t first = 0; first < count; first += lanes) {
    const int64_t here = std::min(lanes, count - first);
    // Keys are positive as int64_t too, which every instruction set can compare.
    int64_t mine[lanes] = {}, larger[lanes] = {};
    std::copy_n(keys + first, here, mine);
    for (int64_t i = 0; i < count; ++i) {
      const auto key = static_cast<int64_t>(keys[i]);
      for (int lane = 0; lane < lanes; ++lane) larger[lane] += key > mine[lane];
    }
    for (int64_t lane = 0; lane < here; ++lane) sorted[larger[lane]] = mine[lane];
  }
  std::copy_n(sorted, count, keys);
}

}  // namespace
}  // namespace sparse_transcoder::cpu
