// Streams with buffers of their own, what ties them to the caller's stream, graphs that repeat a
// call, and weights that stream in from the host.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "backend.h"
#include "cuda/kernels/kernels.h"
#include "cuda/screen.h"
#include "cuda/weight_copy.h"
#include "pool.h"

namespace sparse_transcoder {

void check_cuda(int status);

// What a stream's buffers depend on, in elements; nothing here grows with the number of tokens.
struct CudaPlan {
  int64_t layers;   // of the engine on this device
  int64_t streams;  // that one call uses
  int64_t multiprocessors;
  int64_t chunk;        // Options::chunk_size
  int64_t rows;         // of a chunk
  int64_t lists;        // in all: each row has one, or several where rows are few
  int64_t k;            // the largest
  int64_t capacity;     // of a list
  int64_t sorted;       // a power of two, at least k
  int64_t hidden_size;  // the largest
  int64_t rounded;      // rows in bfloat16; 0 where no layer is screened so
  int64_t scores;       // of a tile
  int64_t widened;      // weights of a tile; 0 where no layer needs it
  int64_t int8_rows;    // bytes of rows in int8; 0 where no layer is screened so
};

// max_k: of a request's k_filled.
CudaPlan plan_cuda(const std::vector<const cuda::PreparedLayer*>& layers, const Options& options,
                   int64_t max_k, int64_t multiprocessors);

// A stream's share of device memory.
struct CudaBuffers {
  CudaBuffers(const CudaPlan& plan, at::Device device);
  static int64_t bytes(const CudaPlan& plan);
  cuda::CandidateLists lists(int64_t groups, int64_t capacity, int64_t k) const;

  at::Tensor hidden, rounded, int8_rows, margins, scores, widened;
  at::Tensor deferred, exact, sorted, deferred_count, exact_count, active_count, kth_best,
      computed_count;
};

// A request, its layer as this backend holds it, and what multiplies for its screen.
struct CudaRequest : Request {
  const cuda::PreparedLayer* prepared;
  cuda::Product product;
};

// A second stream for a chunk. Tiles of features take turns on the two, so that one stream selects
// while the other multiplies.
struct SecondStream {
  const c10::Stream &first, &second;
  cuda::Queue queue;           // the second's
  const CudaBuffers& buffers;  // the second's, of which it uses the tile
  c10::Event& step;            // of the chunk, on either stream, that the next one waits for
};

// Rows that are worked on at a time: as many as the buffers hold, evenly.
int64_t chunk_rows(const CudaRequest& request, const CudaPlan& plan);
// Whether the scores of a chunk do not fit a tile.
bool has_many_tiles(const CudaRequest& request, const CudaPlan& plan);
// Puts a chunk on the queue. Its stream, where it has one, is torch's current one. `weights` is the
// layer's W_enc on the device. `second` is null where there is one stream; where it is used, the
// first stream waits for it in the end, unless an error is thrown.
void encode_rows(const CudaRequest& request, int64_t first, int64_t count,
                 const at::Tensor& weights, const cuda::LayerPointers* pointers,
                 const CudaBuffers& buffers, const CudaPlan& plan, cuda::Queue& queue,
                 SecondStream* second = nullptr);

// Two device buffers that weights in pinned host memory pass through, in the order that calls ask
// for them.
class WeightStream {
 public:
  WeightStream(int64_t staging_bytes, at::Device device);
  ~WeightStream();

  // Calls take turns: hold this while enqueueing a call's layers.
  std::mutex mutex;
  // The weights in a device buffer, for work that is enqueued on these streams until release.
  at::Tensor load(const at::Tensor& pinned, const std::vector<c10::Stream>& streams);
  void release(const std::vector<c10::Stream>& streams);
  int64_t bytes() const { return staging_[0].nbytes() + staging_[1].nbytes(); }

 private:
  c10::Stream copies_;
  at::Tensor staging_[2];
  c10::Event filled_[2];
  std::vector<c10::Event> emptied_[2];  // one per stream
  int turn_ = 0;
};

// The streams of a call. Their work is ordered, so they can be lent to the next call while this
// one's work is under way.
class CudaStreams {
 public:
  CudaStreams(const CudaPlan& plan, at::Device device);
  // With buffers of another plan on streams of an existing set, which must have enough of them.
  CudaStreams(const CudaPlan& plan, const CudaStreams& others);
  ~CudaStreams();

  // All requests are on this device. Asynchronous: the caller's current stream waits for the
  // results, the host does not.
  void encode(const std::vector<CudaRequest>& requests, WeightStream* weights, bool use_graphs);

  int64_t bytes;

 private:
  using Shape = std::vector<int64_t>;

  // Chunk by chunk, layer after layer, on one stream after the other; a single chunk on two.
  void enqueue(const std::vector<CudaRequest>& requests, WeightStream* weights);
  void take_buffers();
  // A graph for requests of this shape; null where they must be enqueued as they are.
  void* graph_of(const Shape& shape, const std::vector<CudaRequest>& requests);
  void* make_graph(const std::vector<CudaRequest>& requests) const;
  // A graph is made for a shape that was enqueued before.
  void remember(const Shape& shape);
  cuda::LayerPointers* pointers(size_t request) const;

  const CudaPlan plan_;
  const at::Device device_;
  std::vector<c10::Stream> streams_;
  std::vector<CudaBuffers> buffers_;
  at::Tensor pointers_;  // [layers] cuda::LayerPointers, as bytes
  c10::Event fork_, start_, step_;
  std::vector<c10::Event> done_;
  struct Graph {
    void* executable = nullptr;
    int failures = 0;
  };
  std::map<Shape, Graph> graphs_;
};

}  // namespace sparse_transcoder
