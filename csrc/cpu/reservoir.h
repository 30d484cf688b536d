// The running k best features of one row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

namespace sparse_transcoder::cpu {

// An activation and its feature as one integer, which orders by larger value, then by lower
// feature. The value is positive, so its bits order as it does.
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

// Keys that a reservoir holds at once. There is so much room beside the k best that dropping the
// others costs constant time per key.
inline int64_t reservoir_capacity(int64_t k, int64_t features) {
  return std::min(features, std::max(2 * k, k + 64));
}

// An active feature whose activation is not computed yet. It lies in [lower, upper].
struct DeferredFeature {
  float lower, upper;
  uint32_t feature;
};

// Features come in any order. Those with a known activation are keys; those that may never be worth
// computing are deferred.
struct Reservoir {
  uint64_t* keys;             // [capacity]
  DeferredFeature* deferred;  // [capacity]
  int64_t k, capacity;
  int64_t size = 0, deferred_count = 0;
  uint64_t kth_best = 0;        // a key at or under this has k better ones; 0 while unknown
  float deferred_kth_best = 0;  // k deferred features reach this; 0 while unknown
  int64_t active_count = 0;     // active features of the row that were met so far
  int64_t written = 0;          // entries of the row that were written, where all are

  // An activation that k features reach; 0 while unknown.
  float min_activation() const {
    return std::max(kth_best == 0 ? 0 : key_value(kth_best), deferred_kth_best);
  }

  void add(uint64_t key) {
    if (key <= kth_best) return;
    if (size == capacity) {
      shrink_to_k();
      if (key <= kth_best) return;
    }
    keys[size++] = key;
  }

  void shrink_to_k() {
    if (size <= k) return;
    std::nth_element(keys, keys + k - 1, keys + size, std::greater<>());
    size = k;
    kth_best = keys[k - 1];
  }

  // False where there is no room: the deferred features must be computed first.
  bool defer(const DeferredFeature& feature) {
    if (deferred_count == capacity) {
      drop_beaten();
      if (deferred_count > capacity - (capacity - k) / 2) return false;
    }
    if (!(feature.upper < min_activation())) deferred[deferred_count++] = feature;
    return true;
  }

  // Drops the deferred features that k others surely beat.
  void drop_beaten() {
    if (deferred_count > k) {
      std::nth_element(
          deferred, deferred + k - 1, deferred + deferred_count,
          [](const DeferredFeature& a, const DeferredFeature& b) { return a.lower > b.lower; });
      deferred_kth_best = std::max(deferred_kth_best, deferred[k - 1].lower);
    }
    const float min = min_activation();
    const auto beaten = [min](const DeferredFeature& f) { return f.upper < min; };
    deferred_count = std::remove_if(deferred, deferred + deferred_count, beaten) - deferred;
  }
};

}  // namespace sparse_transcoder::cpu
