// Lists the survivors of a panel from the masks of the int8 screen. Nothing here branches on single
// bits, because no processor foresees which of them are set.
#pragma once

#include <algorithm>
#include <bit>

#include "cpu/kernels/kernels.h"

namespace sparse_transcoder::cpu {
namespace {  // internal linkage: each instruction set compiles its own

// Turns 64 rows of 64 bits into 64 columns: bit r of bits[c] was bit c of bits[r].
inline void transpose(uint64_t* bits) {
  // Each pass swaps the two off-diagonal quarters of every square of 2 * half bits.
  uint64_t low = 0xffffffff;
  for (int half = 32; half > 0; half /= 2, low ^= low << half)
    for (int first = 0; first < 64; first += 2 * half)
      for (int i = first; i < first + half; ++i) {
        const uint64_t swapped = (bits[i] >> half ^ bits[i + half]) & low;
        bits[i] ^= swapped << half;
        bits[i + half] ^= swapped;
      }
}

// With few rows a transposed block would be nearly empty.
void list_few_rows(const SurvivorMasks& masks, int64_t row_count, int64_t first, uint64_t features,
                   Survivor* pairs) {
  Survivor* out = pairs;
  for (; features != 0; features &= features - 1) {
    const int bit = std::countr_zero(features);
    for (int64_t row = 0; row < row_count; ++row) {
      *out = {row, first + bit, true};
      out += masks.rows[row] >> bit & 1;
    }
  }
}

// The words that have a bit, by feature and row. The masks are transposed.
int64_t collect_words(const SurvivorMasks& masks, int64_t end, int64_t first, uint64_t features,
                      MaskWord* words) {
  MaskWord* out = words;
  for (; features != 0; features &= features - 1) {
    const int bit = std::countr_zero(features);
    for (int64_t row = 0; row < end; row += 64) {
      *out = {masks.rows[row + bit], static_cast<int32_t>(row), static_cast<int32_t>(first + bit)};
      out += out->bits != 0;
    }
  }
  return out - words;
}

// Lists the pairs of the words. What a step does waits for the step before it, so two lists grow at
// once: one from the first pair up, one from the last pair down. One word before the first and one
// behind the last are read, whatever they hold.
void list_words(const MaskWord* words, int64_t word_count, int64_t count, Survivor* pairs) {
  const MaskWord *up = words, *down = words + word_count - 1;
  uint64_t up_bits = up->bits, down_bits = down->bits;
  Survivor *up_out = pairs, *down_out = pairs + count;
  const auto list_up = [&] {
    *up_out++ = {up->row + std::countr_zero(up_bits), up->feature, true};
    up_bits &= up_bits - 1;
    const uint64_t done = up_bits == 0;
    up_bits |= up[1].bits & -done;
    up += done;
  };
  const auto list_down = [&] {
    const int bit = 63 - std::countl_zero(down_bits);
    *--down_out = {down->row + bit, down->feature, true};
    down_bits ^= uint64_t{1} << bit;
    const uint64_t done = down_bits == 0;
    down_bits |= down[-1].bits & -done;
    down -= done;
  };
  for (int64_t i = count / 2; i > 0; --i) {
    list_up();
    list_down();
  }
  if (count % 2 != 0) list_up();
}

template <void (*transpose_block)(uint64_t*)>
ListedSurvivors list_survivors(const SurvivorMasks& masks, int64_t row_count, int64_t first,
                               Survivor* pairs) {
  constexpr int64_t few_rows = 16;
  int64_t count = 0;
  uint64_t features = 0;
  for (int64_t row = 0; row < row_count; ++row) {
    features |= masks.rows[row];
    count += std::popcount(masks.rows[row]);
  }
  if (row_count <= few_rows) {
    list_few_rows(masks, row_count, first, features, pairs);
  } else if (count > 0) {
    const int64_t end = mask_count(row_count);
    std::fill(masks.rows + row_count, masks.rows + end, 0);
    for (int64_t row = 0; row < end; row += 64) transpose_block(masks.rows + row);
    MaskWord* words = masks.words + 1;
    list_words(words, collect_words(masks, end, first, features, words), count, pairs);
  }
  return {count, features};
}

}  // namespace
}  // namespace sparse_transcoder::cpu
