// CUDA lanes: streams with buffers of their own, what ties them to the caller's stream, work
// captured for replay, and weights that stream in from the host.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "backend.h"
#include "cuda/kernels/kernels.h"

namespace sparse_transcoder {

void check_cuda(int status);

// What a lane's buffers depend on, in elements; nothing here grows with the number of tokens.
struct CudaPlan {
  int64_t layers;  // of the engine on this device
  int64_t lanes;   // streams that one call uses
  int64_t multiprocessors;
  int64_t chunk;        // Options::chunk_size
  int64_t rows;         // of a chunk
  int64_t lists;        // in all: each row has one, or several where rows are few
  int64_t k;            // the largest
  int64_t capacity;     // of a list
  int64_t sorted;       // a power of two, at least k
  int64_t hidden_size;  // the largest
  int64_t rounded;      // rows in bfloat16; 0 where no layer is screened so
  int64_t scores;       // of a panel
  int64_t widened;      // weights of a panel; 0 where no layer needs it
};

CudaPlan plan_cuda(const std::vector<const Layer*>& layers, const Options& options,
                   int64_t multiprocessors);

// A lane's share of device memory.
struct CudaBuffers {
  CudaBuffers(const CudaPlan& plan, at::Device device);
  static int64_t bytes(const CudaPlan& plan);

  at::Tensor hidden, rounded, margin, scores, widened;
  at::Tensor deferred, exact, sorted, deferred_count, exact_count, active_count, kth_best;
};

// Rows that are worked on at a time: as many as the buffers hold, evenly.
int64_t chunk_rows(const Request& request, const CudaPlan& plan);
// Enqueues a chunk on the stream, torch's current one. `weights` is the layer's W_enc on the
// device.
void encode_rows(const Request& request, int64_t first, int64_t count, const at::Tensor& weights,
                 const cuda::LayerPointers* pointers, const CudaBuffers& buffers,
                 const CudaPlan& plan, cuda::Queue& queue);
// out [n, f] = left [n, h] right [f, h]^T, added up in float32.
void multiply(at::Tensor out, const at::Tensor& left, const at::Tensor& right);
void copy_to(at::Tensor to, const at::Tensor& from);

// Two device buffers that weights in pinned host memory pass through, in the order that calls ask
// for them.
class WeightStream {
 public:
  WeightStream(int64_t slot_bytes, at::Device device);

  // Calls take turns: hold this while enqueueing a call's layers.
  std::mutex mutex;
  // The weights in a device buffer, for work that is enqueued on these streams until release.
  at::Tensor load(const at::Tensor& pinned, const std::vector<c10::Stream>& streams);
  void release(const std::vector<c10::Stream>& streams);
  int64_t bytes() const { return slots_[0].nbytes() + slots_[1].nbytes(); }

 private:
  c10::Stream copies_;
  at::Tensor slots_[2];
  c10::Event filled_[2];
  std::vector<c10::Event> emptied_[2];  // one a stream
  int turn_ = 0;
};

// The lanes of a call. Its work is ordered: they can be lent to the next call while this one's work
// is under way.
class CudaLanes {
 public:
  CudaLanes(const CudaPlan& plan, at::Device device);
  ~CudaLanes();

  // All requests are on this device. Asynchronous: the caller's current stream waits for the
  // results, the host does not.
  void encode(const std::vector<Request>& requests, WeightStream* weights, bool use_graphs);

  int64_t bytes;

 private:
  using Shape = std::vector<int64_t>;

  // Chunk by chunk, layer after layer, on one stream after the other.
  void enqueue(const std::vector<Request>& requests, WeightStream* weights);
  // A graph for requests of this shape; null where they must be enqueued as they are.
  void* graph_of(const Shape& shape, const std::vector<Request>& requests);
  void* make_graph(const std::vector<Request>& requests) const;
  // A graph is made for a shape that was enqueued before.
  void remember(const Shape& shape);
  cuda::LayerPointers* pointers(size_t request) const;

  const CudaPlan plan_;
  const at::Device device_;
  std::vector<c10::Stream> streams_;
  std::vector<CudaBuffers> buffers_;
  at::Tensor pointers_;  // [layers] cuda::LayerPointers, as bytes
  c10::Event fork_, start_;
  std::vector<c10::Event> done_;
  struct Graph {
    void* executable = nullptr;
    int failures = 0;
  };
  std::map<Shape, Graph> graphs_;
};

// A device of an engine.
struct CudaDevice {
  CudaDevice(const std::vector<const Layer*>& layers, const Options& options, at::Device device);

  void encode(const std::vector<Request>& requests) const;
  int64_t bytes() const;

  bool use_graphs;
  std::unique_ptr<WeightStream> weights;  // null where every layer's weights are on the device
  std::unique_ptr<Pool<CudaLanes>> pool;
};

}  // namespace sparse_transcoder
