// Every buffer of a call, planned once when the engine is built and borrowed by calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "cpu/kernels/kernels.h"
#include "cpu/reservoir.h"

namespace sparse_transcoder {

// What the buffers depend on; nothing here grows with the number of tokens.
struct Plan {
  int64_t rows;          // rows in flight, over all jobs of a wave
  int64_t lanes;         // workers; each row keeps one list per lane
  int64_t block, panel;  // rows and features screened at a time in float32
  int64_t hidden_size;   // the largest; of the layers that have such a copy, for the next three
  int64_t int8_bytes;    // of a row, both planes
  int64_t int8_inputs;
  int64_t int16_stride;  // elements of a row
  int64_t job_rows;      // rows of a job, at most
  int64_t top_k;         // the largest
  int64_t capacity;      // keys a list holds

  int64_t survivors() const { return std::max(job_rows * cpu::panel_features, panel); }
  // Also of the survivors' int64 products.
  int64_t scores() const { return (std::max(block * panel, 2 * survivors()) + 15) / 16 * 16; }
};

// A pair that a screen let through.
struct Survivor {
  int32_t row;       // of the job
  uint32_t feature;  // << 1 | ambiguous: too near its gate to be counted unseen

  int64_t id() const { return feature >> 1; }
};

// How far a row's scores are from its exact dot products. float32: NaN marks a row that is not
// finite, infinity one too large to screen.
struct RowMargin {
  Margin float32, int16;
};

// What a lane did in a call; see Explanation.
struct Tally {
  int64_t pairs[3], survivors, ambiguous, rescored, fallback_rows;
  double ms[5];
};

// Buffers of one CPU call. Rows are addressed by their slot, 0 <= slot < plan.rows.
struct Workspace {
  explicit Workspace(const Plan& plan);

  Plan plan;
  float* hidden;                 // [rows, hidden_size] normed float32 rows
  int8_t* int8;                  // [rows, int8_bytes]
  int16_t* int16;                // [rows, int16_stride]
  cpu::Int16Scale* int16_scale;  // [rows]
  RowMargin* margin;             // [rows]
  cpu::TopList* lists;           // [rows, lanes]
  uint64_t* keys;                // [rows, lanes, capacity] what the lists hold
  cpu::Bounded* open;            // [rows, lanes, capacity]
  float* scores;                 // [lanes, plan.scores()]
  uint32_t* candidates;          // [lanes, panel]
  uint64_t* masks;               // [lanes, job_rows]
  Survivor* survivors;           // [lanes, 3, plan.survivors()]
  int16_t* packed;               // [lanes, 64 * int16_stride]
  float* rotated;                // [lanes, int8_inputs]
  Tally* tally;                  // [lanes]
  uint64_t* merged;              // [lanes, lanes * capacity]
  cpu::Bounded* merged_open;     // [lanes, lanes * capacity]
  int64_t bytes;
  bool timed = false;  // whether the lanes look at the clock

 private:
  at::Tensor storage_;
};

}  // namespace sparse_transcoder
