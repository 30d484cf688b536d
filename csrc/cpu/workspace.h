// Every buffer of a CPU call, planned when the engine is built and borrowed by calls, and where in
// them the rows of a call lie.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "backend.h"
#include "cpu/counters.h"
#include "cpu/kernels/kernels.h"
#include "cpu/reservoir.h"
#include "cpu/screen.h"
#include "cpu/sparse_writer.h"
#include "cpu/survivors.h"
#include "cpu/weight_copies.h"

namespace sparse_transcoder::cpu {

// What the buffers depend on. Nothing here grows with the number of tokens.
struct Plan {
  int64_t max_rows;        // rows of a batch
  int64_t max_block_rows;  // rows of a RowBlock
  int64_t workers;         // each row has one reservoir per worker
  // The float32 screen multiplies this many rows and features at a time.
  int64_t tile_rows, tile_features;
  int64_t hidden_size;     // the largest of all layers
  int64_t int8_row_bytes;  // with both planes; 0 where no layer has an int8 copy
  int64_t int8_inputs;     // 0 where no layer has an int8 copy
  int64_t int16_stride;    // elements per row; 0 where no layer has an int16 copy
  int64_t max_ranks;       // of a row of the output
  int64_t capacity;        // keys that a reservoir holds
  // Whether Options::lanes says how many workers there are.
  bool lanes_chosen = false;

  int64_t survivor_capacity() const {
    return std::max(max_block_rows * panel_features, tile_features);
  }
  int64_t product_count() const { return int16_stride == 0 ? 0 : survivor_capacity(); }
  // Entries of a sparse result that a worker holds: that many per row are few enough to be found
  // in one pass.
  int64_t entry_capacity() const { return max_rows * 256; }
  int64_t score_count() const {
    return std::max(tile_rows * tile_features, max_block_rows * panel_features);
  }
};

// How far a row's scores are from its exact dot products.
struct RowMargin {
  Margin float32, int16;

  // A row with NaN or Inf has no results.
  bool is_finite() const { return !std::isnan(float32.per_norm); }
  // A row too large to screen has an infinite margin: every feature is computed.
  bool is_screened() const { return std::isfinite(float32.per_norm); }
};

// What one worker needs for itself.
struct WorkerBuffers {
  float* scores;                     // [plan.score_count()]
  int64_t* products;                 // [plan.product_count()] int16 products of the pairs of a list
  uint32_t* candidates;              // [tile_features]
  uint32_t* positions;               // [SurvivorList::digits]
  SurvivorMasks masks;               // of a RowBlock
  Survivor* survivors;               // [3, plan.survivor_capacity()]
  int16_t* int16_panel;              // [64, int16_stride]
  float* rotated;                    // [int8_inputs]
  uint64_t* merged_keys;             // [workers, capacity]
  DeferredFeature* merged_deferred;  // [workers, capacity]
  uint64_t* is_ranked;               // [max_ranks / 64 + 1]
  Entry* entries;                    // [plan.entry_capacity()]
  EntryCount* entry_count;           // [1]
  Counters* counters;                // [1]
};

// Rows are addressed by their workspace_row, 0 <= workspace_row < plan.max_rows.
struct Workspace {
  explicit Workspace(const Plan& plan);

  const Plan plan;
  float* normed;              // [max_rows, hidden_size] what the encoder multiplies
  int8_t* int8;               // [max_rows, int8_row_bytes]
  int16_t* int16;             // [max_rows, int16_stride]
  Int16Scale* int16_scales;   // [max_rows]
  RowMargin* margins;         // [max_rows]
  Reservoir* reservoirs;      // [max_rows, workers]
  uint64_t* keys;             // [max_rows, workers, capacity] what the reservoirs hold
  DeferredFeature* deferred;  // [max_rows, workers, capacity]
  std::vector<WorkerBuffers> workers;
  int64_t bytes;
  bool timed = false;  // whether the workers look at the clock

 private:
  at::Tensor storage_;
};

// Rows [first_row, first_row + row_count) of a request. They take the workspace's rows from
// workspace_row on.
struct RowBlock {
  const Request* request;
  const PreparedLayer* layer;
  int64_t first_row, row_count;
  int64_t k;  // features that a row's reservoirs keep
  ScreenChoice screen;
  int64_t workspace_row;
};

// Features [first, last) of a block's layer: what one task scans. `first` is at the begin of a
// panel.
struct FeatureRange {
  const RowBlock* block;
  int64_t first, last;
  int64_t task;  // the tasks of a block are consecutive, and their features ascend
};

inline float* normed_row(const Workspace& workspace, const RowBlock& block, int64_t row) {
  return workspace.normed + block.workspace_row * workspace.plan.hidden_size +
         row * block.layer->hidden_size;
}

inline int8_t* int8_row(const Workspace& workspace, const RowBlock& block, int64_t row) {
  return workspace.int8 + block.workspace_row * workspace.plan.int8_row_bytes +
         row * block.screen.planes * Int8Layout(block.layer->hidden_size).row_bytes();
}

inline int16_t* int16_row(const Workspace& workspace, const RowBlock& block, int64_t row) {
  return workspace.int16 + block.workspace_row * workspace.plan.int16_stride +
         row * int16_stride(block.layer->hidden_size);
}

inline Int16Scale& int16_scale(const Workspace& workspace, const RowBlock& block, int64_t row) {
  return workspace.int16_scales[block.workspace_row + row];
}

inline RowMargin& margin(const Workspace& workspace, const RowBlock& block, int64_t row) {
  return workspace.margins[block.workspace_row + row];
}

inline Reservoir& reservoir(const Workspace& workspace, const RowBlock& block, int64_t row,
                            int64_t worker) {
  return workspace.reservoirs[(block.workspace_row + row) * workspace.plan.workers + worker];
}

}  // namespace sparse_transcoder::cpu
