// The pairs that a screen lets through, on their way to be computed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/kernels/kernels.h"

namespace sparse_transcoder::cpu {

// Consecutive features: a panel, or a wider tile of the float32 screen.
struct Tile {
  int64_t first, count;
};

struct SurvivorList {
  // Of one pass of move_by; a tile has no more features.
  static constexpr int digit_bits = 9;
  static constexpr int64_t digits = 1 << digit_bits;

  Survivor* pairs;
  int64_t size = 0;
  // Of the lists of a panel: the panel's first feature, and which of its features have pairs.
  int64_t first_feature = 0;
  uint64_t features = 0;

  void push(Survivor pair) { pairs[size++] = pair; }
  void clear() { size = 0, features = 0; }

  // Records what has been listed into `pairs` of the panel whose first feature is `first`.
  void take(int64_t first, const ListedSurvivors& listed) {
    size = listed.count;
    first_feature = first;
    features = listed.features;
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
