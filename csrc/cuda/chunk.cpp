// A chunk of a layer's rows on a queue: prepared, screened tile by tile of features, computed
// exactly where the screen leaves a doubt, and written. Nothing waits on the host, and nothing is
// allocated. Device-generic: no CUDA header.
#include <ATen/ATen.h>
#include <c10/core/StreamGuard.h>

#include <algorithm>
#include <bit>

#include "cuda/products.h"
#include "cuda/screen.h"
#include "cuda/streams.h"

namespace sparse_transcoder {
namespace {

// Of a tile of scores, and of widened weights: L2 holds those of two streams.
constexpr int64_t tile_bytes = 18 << 20;
constexpr int64_t list_bytes = 128 << 20;
// Fewer rows than this are split, each among several blocks of select.
constexpr int64_t busy_blocks = 256;
// What one multiprocessor makes of a matrix product at a time.
constexpr int64_t block_rows = 128, block_features = 256;

float* floats(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<float>() : nullptr;
}

// Bound on |sum - exact| per unit of ||x|| ||w|| of a product of bfloat16 or float32 numbers that
// is added up in float32. Products of bfloat16 are exact. Tensor cores add up 4 to 16 products with
// the sum so far at a time, each aligned to the largest of them and cut off (Fasi, Higham, Mikaitis
// and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021): n + 1 numbers lose at most 2^-22
// of the sum of magnitudes each, which is (n + 1) / n <= 1.25 for each product. TF32, where the
// user allows it for float32, cuts both operands to 10 bits.
float product_rounding(int64_t size, bool float32) {
  const double sum = 1.25 * (size + 16) * 0x1p-22;
  return static_cast<float>(sum / (1 - std::min(sum, 0.5)) + (float32 ? 0x1p-9 + 0x1p-20 : 0));
}

// Features of a tile of an own product: tiles are even, and as few as hold all features.
int64_t even_tile_of(int64_t rows, int64_t features, const CudaPlan& plan) {
  const int64_t max_width = plan.scores / rows, tiles = (features + max_width - 1) / max_width,
                block = cuda::tensor_features;
  return std::min(((features + tiles - 1) / tiles + block - 1) / block * block, max_width);
}

// Features of a tile: of those that a tile of scores holds, as many as leave the fewest
// multiprocessors idle in the product's last round.
int64_t tile_features_of(int64_t rows, int64_t features, const CudaPlan& plan) {
  const int64_t max_width = std::min(plan.scores / rows, features),
                row_blocks = (rows + block_rows - 1) / block_rows;
  int64_t best = max_width;
  double best_share = 0;
  for (int64_t width = max_width / block_features * block_features; width > 0;
       width -= block_features) {
    const int64_t blocks = row_blocks * (width / block_features), sms = plan.multiprocessors;
    const double share = static_cast<double>(blocks) / ((blocks + sms - 1) / sms * sms);
    if (share > best_share + 0.02) {
      best = width;
      best_share = share;
    }
  }
  return best;
}

// Whether tiles of weights are widened to float32 for torch's product.
bool widens(const CudaRequest& request) {
  const cuda::PreparedLayer& layer = *request.prepared;
  return request.product == cuda::Product::library && !layer.bf16_screen &&
         layer.dtype != Dtype::float32;
}

// Features of a tile of so many rows.
int64_t tile_of(const CudaRequest& request, int64_t rows, const CudaPlan& plan) {
  const int64_t features = request.layer->features;
  if (request.product != cuda::Product::library) return even_tile_of(rows, features, plan);
  const int64_t tile = tile_features_of(rows, features, plan);
  return widens(request) ? std::min(tile, plan.widened / request.layer->hidden_size) : tile;
}

// Rows of a chunk, as the screen's products take them.
struct ChunkRows {
  int64_t count;
  const float* x;
  at::Tensor left;  // for tensor cores: x, or x in bfloat16
  cuda::Int8Rows int8;
};

// Puts the product of a chunk's rows and a tile of W_enc into own.scores.
void multiply_tile(const CudaRequest& request, const ChunkRows& rows, const at::Tensor& W_enc,
                   int64_t first, int64_t width, const CudaBuffers& own, cuda::Queue& queue) {
  const cuda::PreparedLayer& layer = *request.prepared;
  const int64_t count = rows.count, size = layer.hidden_size;
  float* scores = floats(own.scores);
  switch (request.product) {
    case cuda::Product::few_rows_int8:
    case cuda::Product::tensor_int8: {
      const auto multiply_int8 = request.product == cuda::Product::tensor_int8
                                     ? cuda::product_tensor_int8
                                     : cuda::product_int8;
      return check_cuda(multiply_int8(rows.int8.rows, count, layer.int8.const_data_ptr<int8_t>(),
                                      layer.int8_scale.const_data_ptr<float>(), first, width,
                                      rows.int8.inputs, scores, queue));
    }
    case cuda::Product::few_rows:
      return check_cuda(cuda::product_few_rows(rows.x, count, W_enc.const_data_ptr(),
                                               dtype_of(W_enc.scalar_type()), first, width, size,
                                               scores, queue));
    case cuda::Product::tensor_bf16:
      return check_cuda(cuda::product_tensor_bf16(rows.left.const_data_ptr(), count,
                                                  W_enc.const_data_ptr(), first, width, size,
                                                  scores, queue));
    case cuda::Product::library:
      break;
  }
  at::Tensor right = W_enc.narrow(0, first, width);
  if (widens(request)) {
    const at::Tensor wide = own.widened.narrow(0, 0, width * size).view({width, size});
    copy_to(wide, right);
    right = wide;
  }
  multiply(own.scores.narrow(0, 0, count * width).view({count, width}), rows.left, right);
}

}  // namespace

CudaPlan plan_cuda(const std::vector<const cuda::PreparedLayer*>& layers, const Options& options,
                   int64_t max_k, int64_t multiprocessors) {
  CudaPlan plan = {};
  const int64_t k = std::max<int64_t>(max_k, 1);
  bool int8 = false;
  for (const cuda::PreparedLayer* layer : layers) {
    plan.hidden_size = std::max(plan.hidden_size, layer->hidden_size);
    if (layer->bf16_screen)
      plan.rounded = std::max(plan.rounded, layer->hidden_size);
    else if (layer->dtype != Dtype::float32)
      plan.widened = std::max(tile_bytes / 4, plan.hidden_size);
    int8 |= layer->int8.defined();
  }
  plan.layers = static_cast<int64_t>(layers.size());
  // One layer's chunks use two, see CudaStreams::enqueue.
  plan.streams = options.lanes > 0 ? options.lanes : std::clamp<int64_t>(plan.layers, 2, 4);
  plan.multiprocessors = multiprocessors;
  plan.k = k;
  plan.capacity = 2 * (k + cuda::list_room);
  plan.sorted = std::bit_ceil(static_cast<uint64_t>(k));
  plan.chunk = options.chunk_size;
  plan.rows = std::clamp<int64_t>(list_bytes / (8 * (2 * plan.capacity + k + plan.sorted)), 1,
                                  options.chunk_size);
  plan.lists =
      std::max(plan.rows, std::min(busy_blocks, list_bytes / (8 * (2 * plan.capacity + k))));
  plan.scores = std::max(tile_bytes / 4, plan.rows);
  plan.rounded *= plan.rows;
  if (int8)
    plan.int8_rows =
        std::clamp(plan.rows, cuda::few_rows, cuda::max_tensor_rows) * cuda::int8_row_bytes;
  return plan;
}

int64_t chunk_rows(const CudaRequest& request, const CudaPlan& plan) {
  const int64_t rows = request.row_count(), chunks = (rows + plan.rows - 1) / plan.rows;
  return (rows + chunks - 1) / chunks;
}

bool has_many_tiles(const CudaRequest& request, const CudaPlan& plan) {
  return tile_of(request, chunk_rows(request, plan), plan) < request.layer->features;
}

void encode_rows(const CudaRequest& request, int64_t first, int64_t count,
                 const at::Tensor& weights, const cuda::LayerPointers* pointers,
                 const CudaBuffers& buffers, const CudaPlan& plan, cuda::Queue& queue,
                 SecondStream* second) {
  const cuda::PreparedLayer& layer = *request.prepared;
  const int64_t size = layer.hidden_size;
  const cuda::Product product = request.product;
  const bool few = product == cuda::Product::few_rows,
             int8 =
                 product == cuda::Product::few_rows_int8 || product == cuda::Product::tensor_int8,
             bf16 = !few && !int8 && layer.bf16_screen;
  const at::Tensor& screened = layer.bf16.defined() ? layer.bf16 : weights;
  const float rounding = few                                     ? cuda::few_rows_rounding(size)
                         : product == cuda::Product::tensor_bf16 ? cuda::tensor_rounding(size)
                                                                 : product_rounding(size, !bf16);
  cuda::ScreenErrors errors = {rounding, layer.bf16_error, layer.bounds.max_norm};
  cuda::Weights exact = {weights.const_data_ptr(), layer.dtype, size, layer.bounds.from(layer, 0),
                         layer.max_bias};
  cuda::Int8Rows int8_rows;
  int* candidates = nullptr;
  if (int8) {
    errors = {cuda::int8_rounding, 0, layer.bounds.max_norm, cuda::int8_share};
    exact.bounds.norm = layer.int8_error.const_data_ptr<float>();
    int8_rows = {buffers.int8_rows.mutable_data_ptr<int8_t>(), static_cast<int>(layer.int8.size(1)),
                 layer.int8_norm};
    if (layer.int8_trial) candidates = layer.int8_trial->candidates() + first;
  }
  const int64_t groups =
      std::clamp<int64_t>(std::min(busy_blocks, plan.lists) / count, 1, cuda::max_groups);
  const cuda::CandidateLists lists = buffers.lists(groups, plan.capacity, request.k_filled());
  float* x = floats(buffers.hidden);
  auto* margins = static_cast<Margin*>(buffers.margins.mutable_data_ptr());
  const at::Tensor left =
      (bf16 ? buffers.rounded : buffers.hidden).narrow(0, 0, count * size).view({count, size});
  check_cuda(cuda::prepare(
      {pointers, dtype_of(request.hidden.dtype), first, count, size, floats(layer.input_bias),
       floats(layer.ln_weight), floats(layer.ln_bias)},
      errors, x, bf16 ? left.mutable_data_ptr() : nullptr, int8_rows, margins, lists, queue));
  const ChunkRows rows = {count, x, left, int8_rows};
  const int64_t tile = tile_of(request, count, plan);
  if (second) {
    second->step.record(second->first);
    second->step.block(second->second);
  }
  bool on_second = false;
  for (int64_t feature = 0; feature < layer.features; feature += tile) {
    const int64_t width = std::min(tile, layer.features - feature);
    const CudaBuffers& own = on_second ? second->buffers : buffers;
    cuda::Queue& own_queue = on_second ? second->queue : queue;
    c10::OptionalStreamGuard guard;
    if (on_second) guard.reset_stream(second->second);
    multiply_tile(request, rows, screened, feature, width, own, own_queue);
    // A row's lists are changed in place: selects run in the order of their tiles.
    const c10::Stream* stream = !second ? nullptr : on_second ? &second->second : &second->first;
    if (stream) second->step.block(*stream);
    check_cuda(cuda::select(floats(own.scores), x, margins, count, feature, width, exact, lists,
                            own_queue));
    if (stream) second->step.record(*stream);
    on_second = second && !on_second;
  }
  if (second) second->step.block(second->first);
  check_cuda(cuda::merge(margins, count, exact, lists, queue));
  check_cuda(cuda::compute_exact(x, margins, count, exact, lists, candidates, queue));
  check_cuda(cuda::finish(pointers, margins, first, count, layer.features, layer.max_active,
                          request.k_out, lists, queue));
}

}  // namespace sparse_transcoder
