// The pairs that a screen lets through, on their way to be computed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/kernels/kernels.h"

namespace sparse_transcoder::cpu {

// A row and a feature. The pair is ambiguous while the feature is too near its gate to be counted
// without being computed.
class Survivor {
 public:
  Survivor(int64_t row, int64_t feature, bool ambiguous)
      : row_(static_cast<int32_t>(row)),
        feature_(static_cast<uint32_t>(feature << 1) | ambiguous) {}

  int64_t row() const { return row_; }  // of its RowBlock
  int64_t feature() const { return feature_ >> 1; }
  bool ambiguous() const { return feature_ & 1; }

 private:
  int32_t row_;
  uint32_t feature_;  // << 1 | ambiguous
};

// Consecutive features: a panel, or a wider tile of the float32 screen.
struct Tile {
  int64_t first, count;
};

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

// Masks of this many rows: whole blocks, to be transposed.
constexpr int64_t mask_count(int64_t rows) { return (rows + 63) / 64 * 64; }

// Bit r of `bits` says whether row + r and the feature are a pair.
struct MaskWord {
  uint64_t bits;
  int32_t row, feature;
};

// What the int8 screen lets through of a panel, and scratch.
struct SurvivorMasks {
  uint64_t* rows;   // [mask_count(max_block_rows)]; SurvivorList::take may overwrite them
  MaskWord* words;  // [mask_count(max_block_rows) + 1] scratch
};

struct SurvivorList {
  // Of one pass of move_by; a tile has no more features.
  static constexpr int digit_bits = 9;
  static constexpr int64_t digits = 1 << digit_bits;

  Survivor* pairs;
  int64_t size = 0;
  // Of lists that come from masks: the panel's first feature, and which of its features have pairs.
  int64_t first_feature = 0;
  uint64_t features = 0;

  void push(Survivor pair) { pairs[size++] = pair; }
  void clear() { size = 0, features = 0; }

  // Takes the pairs of a panel, by feature and ambiguous, into an empty list. Bit f of
  // masks.rows[row] says whether row and feature first + f are a pair.
  void take(const SurvivorMasks& masks, int64_t row_count, int64_t first) {
    // Beyond this many rows it is faster to transpose the masks.
    constexpr int64_t few_rows = 16;
    uint64_t any = 0;
    for (int64_t row = 0; row < row_count; ++row) any |= masks.rows[row];
    first_feature = first;
    features = any;
    if (any == 0) return;
    size = row_count <= few_rows ? take_few(masks, row_count) : take_many(masks, row_count);
  }

  // Moves the pairs, ordered by digit(pair) < digit_count <= digits. Pairs with one digit keep
  // their order. positions [digits] is scratch.
  template <typename Digit>
  void move_by(SurvivorList& to, uint32_t* positions, int64_t digit_count, const Digit& digit) {
    std::fill(positions, positions + digit_count, 0);
    for (int64_t i = 0; i < size; ++i) ++positions[digit(pairs[i])];
    for (int64_t d = 0, sum = 0; d < digit_count; ++d)
      sum += std::exchange(positions[d], static_cast<uint32_t>(sum));
    for (int64_t i = 0; i < size; ++i) to.pairs[positions[digit(pairs[i])]++] = pairs[i];
    to.size = std::exchange(size, 0);
  }

  // How many pairs from position i on share one feature, at most dot_rows.
  int64_t run_length(int64_t i) const {
    const int64_t max = std::min(size - i, dot_rows), feature = pairs[i].feature();
    int64_t length = 1;
    while (length < max && pairs[i + length].feature() == feature) ++length;
    return length;
  }

 private:
  // Both write without a branch, because no processor foresees which bits are set.

  int64_t take_few(const SurvivorMasks& masks, int64_t row_count) const {
    Survivor* out = pairs;
    for (uint64_t left = features; left != 0; left &= left - 1) {
      const int bit = __builtin_ctzll(left);
      for (int64_t row = 0; row < row_count; ++row) {
        *out = {row, first_feature + bit, true};
        out += masks.rows[row] >> bit & 1;
      }
    }
    return out - pairs;
  }

  int64_t take_many(const SurvivorMasks& masks, int64_t row_count) const {
    const int64_t end = mask_count(row_count);
    std::fill(masks.rows + row_count, masks.rows + end, 0);
    for (int64_t row = 0; row < end; row += 64) transpose(masks.rows + row);
    // The words that have a bit, then a word that has none.
    MaskWord* words = masks.words;
    for (uint64_t left = features; left != 0; left &= left - 1) {
      const int bit = __builtin_ctzll(left);
      for (int64_t row = 0; row < end; row += 64) {
        *words = {masks.rows[row + bit], static_cast<int32_t>(row),
                  static_cast<int32_t>(first_feature + bit)};
        words += words->bits != 0;
      }
    }
    *words = {0, 0, 0};

    Survivor* out = pairs;
    const MaskWord* word = masks.words;
    for (uint64_t bits = word->bits; bits != 0;) {
      *out++ = {word->row + __builtin_ctzll(bits), word->feature, true};
      bits &= bits - 1;
      const uint64_t done = bits == 0;
      bits |= word[1].bits & -done;
      word += done;
    }
    return out - pairs;
  }
};

// The survivors of the last panels. What the screen lets through is `incoming`. One panel later it
// is `screened` and waits for the int16 stage; another panel later it is `rescreened` and waits to
// be computed exactly. Meanwhile what these stages read of it is on its way from memory.
class SurvivorQueue {
 public:
  // storage [3, capacity]; positions [SurvivorList::digits] is scratch.
  SurvivorQueue(Survivor* storage, int64_t capacity, uint32_t* positions)
      : capacity_(capacity),
        incoming_{storage},
        screened_{storage + capacity},
        rescreened_{storage + 2 * capacity},
        positions_(positions) {}

  SurvivorList& incoming() { return incoming_; }
  SurvivorList& screened() { return screened_; }
  SurvivorList& rescreened() { return rescreened_; }
  bool has_room(int64_t count) const { return incoming_.size + count <= capacity_; }

  // Moves every pair one stage on. rescreened() must be empty.
  void advance() {
    std::swap(rescreened_, screened_);
    std::swap(screened_, incoming_);
  }

  // Groups the pairs coming in, of this tile, by feature, and moves them to the last stage. No
  // other pair may be in the queue.
  void group(Tile tile) {
    if (incoming_.size == 0) return;
    incoming_.move_by(rescreened_, positions_, tile.count,
                      [&](const Survivor& pair) { return pair.feature() - tile.first; });
  }

 private:
  const int64_t capacity_;
  SurvivorList incoming_, screened_, rescreened_;
  uint32_t* positions_;
};

}  // namespace sparse_transcoder::cpu
