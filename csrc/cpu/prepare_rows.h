// The first stage of a batch: rows become float32, normed, with their copies and margins.
#pragma once

#include "cpu/batch.h"
#include "cpu/workspace.h"

namespace sparse_transcoder::cpu {

// Fills everything that the workspace keeps of a batch's rows, and empties their reservoirs.
void prepare_rows(const Batch& batch, const Workspace& workspace);

}  // namespace sparse_transcoder::cpu
