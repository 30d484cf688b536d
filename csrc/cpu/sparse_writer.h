// The entries of a sparse result: as a worker finds them, and as they are written.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Half.h>
#include <sparse_transcoder/features.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>

namespace sparse_transcoder::cpu {

// An active feature of a row of a RowBlock.
struct Entry {
  int32_t row;
  uint32_t feature;
  float value;
};

// What a worker's buffer of entries holds.
struct EntryCount {
  int64_t used;
  bool full;  // whether entries were dropped
};

// Writes to the tensors of SparseRows, in their format. Many threads may write at once.
class SparseWriter {
 public:
  explicit SparseWriter(SparseRows& out)
      : row_begin(out.features.row_begin.const_data_ptr<int64_t>()),
        feature_type_(out.features.features.scalar_type()),
        half_(out.features.activations.scalar_type() == at::kHalf),
        features_(out.features.features.mutable_data_ptr()),
        activations_(out.features.activations.mutable_data_ptr()),
        clamped_(out.clamped) {}

  const int64_t* row_begin;  // [rows + 1]

  void write(int64_t entry, int64_t feature, float value) const {
    if (feature_type_ == at::kUInt16)
      static_cast<uint16_t*>(features_)[entry] = static_cast<uint16_t>(feature);
    else if (feature_type_ == at::kUInt32)
      static_cast<uint32_t*>(features_)[entry] = static_cast<uint32_t>(feature);
    else
      static_cast<int64_t*>(features_)[entry] = feature;
    if (half_)
      static_cast<c10::Half*>(activations_)[entry] = to_half(value);
    else
      static_cast<float*>(activations_)[entry] = value;
  }

 private:
  // As SparseFormat says.
  c10::Half to_half(float value) const {
    constexpr float max = 65504;
    if (value > max) {
      std::atomic_ref<int64_t>(clamped_).fetch_add(1, std::memory_order_relaxed);
      return max;
    }
    const c10::Half half = value;
    return half.x == 0 ? std::numeric_limits<c10::Half>::denorm_min() : half;
  }

  at::ScalarType feature_type_;
  bool half_;
  void *features_, *activations_;
  int64_t& clamped_;
};

}  // namespace sparse_transcoder::cpu
