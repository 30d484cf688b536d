// The encode path: what one call asks for, and one implementation a device.
#pragma once

#include <vector>

#include "cpu/thread_pool.h"
#include "cpu/workspace.h"
#include "layer.h"

namespace sparse_transcoder {

// One layer's rows and where their results go. hidden is [B, T, H], any strides; outputs are
// contiguous over the B * T rows.
struct Request {
  const Layer* layer;
  at::Tensor hidden;
  Features out;

  int64_t rows() const { return hidden.size(0) * hidden.size(1); }
};

struct CudaDevice;
// Two passes: all rows are counted, then written chunk by chunk. Waits for the counts.
SparseFeatures encode_sparse_cuda(const Request& request, const Options& options,
                                  const CudaDevice& device);

// Rows a CPU call works on at a time, and its buffers.
Plan plan_cpu(const std::vector<const Layer*>& layers, const Options& options);
SparseFeatures encode_sparse_cpu(const Request& request, const Workspace& workspace,
                                 Lanes& workers);
void encode_cpu(const std::vector<Request>& requests, const Workspace& workspace, Lanes& workers);
void explain_cpu(const Request& request, Workspace& workspace, Lanes& workers,
                 Explanation& explanation);

}  // namespace sparse_transcoder
