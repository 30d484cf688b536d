// The running top-k of one row: a list of keys that is cut back to the k best whenever it is full,
// and one of features that are not worth computing before more is known.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

namespace sparse_transcoder::cpu {

// A kept activation and its feature as one integer: larger value first, then lower index. The value
// is positive, so its bits order.
inline uint64_t make_key(float value, int64_t feature) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return uint64_t{bits} << 32 | static_cast<uint32_t>(~feature);
}

inline float key_value(uint64_t key) {
  const auto bits = static_cast<uint32_t>(key >> 32);
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline int64_t key_feature(uint64_t key) { return static_cast<uint32_t>(~key); }

// Slots a list needs so that cutting it back to k costs constant time per key.
inline int64_t list_capacity(int64_t k, int64_t features) {
  return std::min(features, std::max(2 * k, k + 64));
}

// An active feature whose activation is not computed yet: it lies in [lower, upper].
struct Bounded {
  float lower, upper;
  uint32_t feature;
};

struct TopList {
  uint64_t* keys;  // [capacity]
  Bounded* open;   // [capacity]
  int64_t size, open_size;
  uint64_t least;    // every key at or under this has k better ones; 0 while that is not known
  float open_least;  // k features of `open` reached this; 0 while that is not known
  int64_t certain;   // active features counted so far

  void cut(int64_t k) {
    if (size <= k) return;
    std::nth_element(keys, keys + k - 1, keys + size, std::greater<>());
    size = k;
    least = keys[k - 1];
  }

  void push(uint64_t key, int64_t k, int64_t capacity) {
    if (key <= least) return;
    if (size == capacity) {
      cut(k);
      if (key <= least) return;
    }
    keys[size++] = key;
  }

  // Drops the open features that k others surely beat.
  void thin(int64_t k) {
    if (open_size <= k) return;
    std::nth_element(open, open + k - 1, open + open_size,
                     [](const Bounded& a, const Bounded& b) { return a.lower > b.lower; });
    open_least = std::max(open_least, open[k - 1].lower);
    open_size = std::remove_if(open, open + open_size,
                               [this](const Bounded& b) { return b.upper < open_least; }) -
                open;
  }

  // Whether there was room: otherwise the open features must be computed first.
  bool defer(const Bounded& feature, int64_t k, int64_t capacity) {
    if (open_size == capacity) {
      thin(k);
      if (open_size > capacity - (capacity - k) / 2) return false;
    }
    if (!(feature.upper < open_least)) open[open_size++] = feature;
    return true;
  }
};

}  // namespace sparse_transcoder::cpu
