// Rows of one request that are screened together, and where the workspace keeps what is made of
// them.
#pragma once

#include "backend.h"
#include "cpu/screen.h"
#include "cpu/weight_copies.h"
#include "cpu/workspace.h"

namespace sparse_transcoder::cpu {

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

inline float* hidden_row(const Workspace& workspace, const RowBlock& block, int64_t row) {
  return workspace.hidden + block.workspace_row * workspace.plan.hidden_size +
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
