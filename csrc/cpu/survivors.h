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

struct SurvivorList {
  // Of one pass of move_by; a tile has no more features.
  static constexpr int digit_bits = 9;
  static constexpr int64_t digits = 1 << digit_bits;

  Survivor* pairs;
  int64_t size;

  void push(Survivor pair) { pairs[size++] = pair; }

  // Adds a row and the features first + bit, ambiguous, for every bit that is set. Most masks have
  // few, in numbers that no processor foresees, so the first ones are added without a branch. That
  // writes to the place behind the last pair, too.
  void push_bits(int64_t row, int64_t first, uint64_t mask) {
    constexpr int few = 4;
    constexpr uint64_t last = uint64_t{1} << (panel_features - 1);
    for (int i = 0; i < few; ++i, mask &= mask - 1) {
      pairs[size] = {row, first + __builtin_ctzll(mask | last), true};
      size += mask != 0;
    }
    for (; mask != 0; mask &= mask - 1) push({row, first + __builtin_ctzll(mask), true});
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
};

// The survivors of the last panels. What the screen lets through is `incoming`. One panel later it
// is `screened` and waits for the int16 stage; another panel later it is `rescreened` and waits to
// be computed exactly. Meanwhile what these stages read of it is on its way from memory.
class SurvivorQueue {
 public:
  // storage [3, capacity]; positions [SurvivorList::digits] is scratch.
  SurvivorQueue(Survivor* storage, int64_t capacity, uint32_t* positions)
      : capacity_(capacity),
        incoming_{storage, 0},
        screened_{storage + capacity, 0},
        rescreened_{storage + 2 * capacity, 0},
        positions_(positions) {}

  SurvivorList& incoming() { return incoming_; }
  SurvivorList& screened() { return screened_; }
  SurvivorList& rescreened() { return rescreened_; }
  bool has_room(int64_t count) const { return incoming_.size + count <= capacity_; }

  // Moves every pair one stage on. The pairs coming in are of this tile; none may be rescreened.
  void advance(Tile tile) {
    group_incoming(tile, rescreened_);
    std::swap(rescreened_, screened_);
  }
  // Moves the pairs coming in to the last stage at once. No other pair may be in the queue.
  void advance_to_end(Tile tile) { group_incoming(tile, rescreened_); }

 private:
  // to: empty.
  void group_incoming(Tile tile, SurvivorList& to) {
    if (incoming_.size == 0) return;  // as after most panels of few rows
    incoming_.move_by(to, positions_, tile.count,
                      [&](const Survivor& pair) { return pair.feature() - tile.first; });
  }

  const int64_t capacity_;
  SurvivorList incoming_, screened_, rescreened_;
  uint32_t* positions_;
};

}  // namespace sparse_transcoder::cpu
