// The first stage of a batch: rows become float32, normed, with their copies and margins.
#pragma once

#include "cpu/workspace.h"

namespace sparse_transcoder::cpu {

// Fills everything that the workspace keeps of one row, and empties its reservoirs.
void prepare_row(const Workspace& workspace, const RowBlock& block, int64_t row, int64_t worker);

}  // namespace sparse_transcoder::cpu
