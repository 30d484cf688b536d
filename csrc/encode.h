// The encode path: what one call asks for, and one implementation a device.
#pragma once

#include <vector>

#include "lanes.h"
#include "layer.h"
#include "workspace.h"

namespace sparse_transcoder {

// One layer's rows and where their results go. hidden is [B, T, H], any strides; outputs are contiguous over the B * T rows.
struct Request {
  const Layer* layer;
  at::Tensor hidden;
  Features out;

  int64_t rows() const { return hidden.size(0) * hidden.size(1); }
};

// What a CUDA lane's buffers depend on, in elements.
struct CudaPlan {
  int64_t rows;         // of a chunk
  int64_t lanes;        // streams that one call uses
  int64_t groups;       // lists a row may be shared among
  int64_t lists;        // in all
  int64_t capacity;     // keys a list holds
  int64_t hidden_size;  // the largest
  int64_t scores;       // of a panel
  int64_t widened;      // weights of a panel; 0 when all are float32
};

// A stream and its buffers: work on a lane is ordered, so a lane can be lent to the next call while its work is under way.
struct CudaLane {
  CudaLane(const CudaPlan& plan, at::Device device);

  CudaPlan plan;
  c10::Stream stream;
  at::Tensor hidden, margin, scores, widened, keys, size, least, certain;
  int64_t bytes = 0;
};

CudaPlan plan_cuda(const std::vector<const Layer*>& layers, const Options& options);
// All requests are on one device. Asynchronous: the caller's current stream waits for the results, the host does not.
void encode_cuda(const std::vector<Request>& requests, int64_t lanes, Pool<CudaLane>& pool);

// Two passes a chunk: count, then write. Waits for the counts.
SparseFeatures encode_sparse_cuda(const Request& request, const Options& options);

// Rows a CPU call works on at a time, and its buffers.
Plan plan_cpu(const std::vector<const Layer*>& layers, const Options& options);
SparseFeatures encode_sparse_cpu(const Request& request, const Workspace& workspace, Lanes& workers);
void encode_cpu(const std::vector<Request>& requests, const Workspace& workspace, Lanes& workers);
void explain_cpu(const Request& request, Workspace& workspace, Lanes& workers, Explanation& explanation);

}  // namespace sparse_transcoder
