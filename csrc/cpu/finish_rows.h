// The last stage of a batch: the reservoirs of a row become its results.
#pragma once

#include "cpu/batch.h"
#include "cpu/workspace.h"

namespace sparse_transcoder::cpu {

// Writes request.out for a batch's rows: the best features by rank, then the lowest of the others
// with activation 0.
void finish_rows(const Batch& batch, const Workspace& workspace);

// Brings the best of the rows [first, last) together, in the reservoirs of worker 0, and computes
// what is deferred of them, feature by feature.
void merge_rows(const Workspace& workspace, const RowBlock& block, int64_t first, int64_t last,
                int64_t worker);

// Writes the entries of one row of request.sparse that its WriteCollector has not written: all of a
// top-k coder's, whose row is merged, and the one of a row that is not finite. A row that has other
// entries than were counted contradicts itself.
void finish_sparse_row(const Workspace& workspace, const RowBlock& block, int64_t row,
                       int64_t worker);

// Writes the entries of one merged row for a sink that no collector has gathered: those of its
// reservoirs, where block.k is not 0, and the one of a row that is not finite.
void finish_entries(const Workspace& workspace, const RowBlock& block, int64_t row, int64_t worker,
                    const SparseWriter& out);

// Active features of a row that is finite.
int64_t active_count(const Workspace& workspace, const RowBlock& block, int64_t row);

}  // namespace sparse_transcoder::cpu
