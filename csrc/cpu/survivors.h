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

// Consecutive features: a panel, several of them, or a tile of the float32 screen.
struct Tile {
  int64_t first, count;
};

// Pairs of one RowBlock.
class SurvivorList {
 public:
  // A pass of sort_by_feature tells this many features apart.
  static constexpr int sort_bits = 9;
  static constexpr int64_t sort_width = 1 << sort_bits;

  // storage [2, capacity], and positions [sort_width], which is scratch.
  SurvivorList(Survivor* storage, int64_t capacity, uint32_t* positions)
      : capacity_(capacity), pairs_(storage), others_(storage + capacity), positions_(positions) {}

  int64_t size() const { return size_; }
  bool has_room(int64_t count) const { return size_ + count <= capacity_; }
  void push(Survivor pair) { pairs_[size_++] = pair; }
  void shrink(int64_t size) { size_ = size; }
  Survivor& operator[](int64_t i) { return pairs_[i]; }
  const Survivor& operator[](int64_t i) const { return pairs_[i]; }

  // What is read of a feature serves all of its rows. The rows of a feature keep their order. Every
  // pair's feature must be in the tile.
  void sort_by_feature(Tile tile) {
    for (int shift = 0; shift == 0 || tile.count >> shift > 0; shift += sort_bits)
      sort_by([&](const Survivor& pair) {
        return (pair.feature() - tile.first) >> shift & (sort_width - 1);
      });
  }

  // Calls take(feature) for each feature of a sorted list.
  template <typename Take>
  void for_features(const Take& take) const {
    for (int64_t i = 0; i < size_; ++i)
      if (i == 0 || pairs_[i].feature() != pairs_[i - 1].feature()) take(pairs_[i].feature());
  }

  // Calls take(first, count, next) for runs of at most dot_rows pairs that share a feature. `next`
  // is the feature after it in the list, or the same one where its weights need not be fetched.
  template <typename Take>
  void for_runs(const Take& take) const {
    for (int64_t first = 0, end = 0; first < size_; first = end) {
      const int64_t feature = pairs_[first].feature();
      while (end < size_ && pairs_[end].feature() == feature) ++end;
      int64_t next = end < size_ ? pairs_[end].feature() : feature;
      for (int64_t i = first; i < end; i += dot_rows) {
        take(i, std::min(dot_rows, end - i), next);
        next = feature;
      }
    }
  }

 private:
  // A stable pass. digit(pair) is less than sort_width.
  template <typename Digit>
  void sort_by(const Digit& digit) {
    std::fill(positions_, positions_ + sort_width, 0);
    for (int64_t i = 0; i < size_; ++i) ++positions_[digit(pairs_[i])];
    for (int64_t p = 0, sum = 0; p < sort_width; ++p)
      sum += std::exchange(positions_[p], static_cast<uint32_t>(sum));
    for (int64_t i = 0; i < size_; ++i) others_[positions_[digit(pairs_[i])]++] = pairs_[i];
    std::swap(pairs_, others_);
  }

  const int64_t capacity_;
  int64_t size_ = 0;
  Survivor *pairs_, *others_;
  uint32_t* positions_;
};

}  // namespace sparse_transcoder::cpu
