// The last stage of a batch: the reservoirs of a row become its results.
#pragma once

#include "cpu/row_block.h"

namespace sparse_transcoder::cpu {

// Writes one row of request.out: the best features by rank, then the lowest of the others with
// activation 0.
void finish_row(const Workspace& workspace, const RowBlock& block, int64_t row, int64_t worker);

// Writes the entries of one row that no collector holds: those of its reservoirs, where block.k is
// not 0, and the one of a row that is not finite.
void finish_sparse_row(const Workspace& workspace, const RowBlock& block, int64_t row,
                       int64_t worker, const SparseWriter& out);

// Entries of a row in a sparse result.
int64_t entry_count(const Workspace& workspace, const RowBlock& block, int64_t row);

}  // namespace sparse_transcoder::cpu
