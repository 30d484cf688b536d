// The order of a few keys. They are counted against each other in vectors, which beats sorting.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sparse_transcoder::cpu {
namespace {  // internal linkage: each instruction set compiles its own

void rank_keys(const uint64_t* keys, int64_t count, uint32_t* ranks) {
  constexpr int64_t lanes = 16;
  for (int64_t first = 0; first < count; first += lanes) {
    const int64_t here = std::min(lanes, count - first);
    // Keys are positive as int64_t too, which every instruction set can compare.
    int64_t mine[lanes] = {}, larger[lanes] = {};
    std::copy_n(keys + first, here, mine);
    for (int64_t i = 0; i < count; ++i) {
      const auto key = static_cast<int64_t>(keys[i]);
      for (int lane = 0; lane < lanes; ++lane) larger[lane] += key > mine[lane];
    }
    std::copy_n(larger, here, ranks + first);
  }
}

}  // namespace
}  // namespace sparse_transcoder::cpu
