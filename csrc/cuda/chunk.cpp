// A chunk of a layer's rows on a queue: prepared, screened tile by tile of features, computed
// exactly where the screen leaves a doubt, and written. Nothing waits on the host, and nothing is
// allocated. Device-generic: no CUDA header.
#include <ATen/ATen.h>

#include <algorithm>
#include <bit>

#include "cuda/streams.h"

namespace sparse_transcoder {
namespace {

constexpr int64_t tile_bytes =
    18 << 20;  // of scores, and of widened weights: L2 holds those of two lanes
constexpr int64_t list_bytes = 128 << 20;
constexpr int64_t busy_blocks = 256;  // fewer rows than this share each row among several blocks
constexpr int64_t tile_rows = 128,
                  tile_features = 256;  // of a matrix product's tiles, one a multiprocessor

float* floats(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<float>() : nullptr;
}

// Bound on |sum - exact| per unit of ||x|| ||w|| of a product of bfloat16 or float32 numbers that
// is added up in float32. Products of bfloat16 are exact. Tensor cores add up 4 to 16 products with
// the sum so far at a time, each aligned to the largest of them and cut off (Fasi, Higham, Mikaitis
// and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021): n + 1 numbers lose at most 2^-22
// of the sum of magnitudes each, which is (n + 1) / n <= 1.25 for each product. TF32, where the
// user allows it for float32, cuts both operands to 10 bits.
float sum_roundoff(int64_t size, bool float32) {
  const double sum = 1.25 * (size + 16) * 0x1p-22;
  return static_cast<float>(sum / (1 - std::min(sum, 0.5)) + (float32 ? 0x1p-9 + 0x1p-20 : 0));
}

// Features of a panel: of those that a tile of scores holds, as many as leave the least of the
// product's last wave of tiles idle.
int64_t panel_features(int64_t rows, int64_t features, const CudaPlan& plan) {
  const int64_t most = std::min(plan.scores / rows, features),
                row_tiles = (rows + tile_rows - 1) / tile_rows;
  int64_t best = most;
  double best_share = 0;
  for (int64_t panel = most / tile_features * tile_features; panel > 0; panel -= tile_features) {
    const int64_t tiles = row_tiles * (panel / tile_features), sms = plan.multiprocessors;
    const double share = static_cast<double>(tiles) / ((tiles + sms - 1) / sms * sms);
    if (share > best_share + 0.02) {
      best = panel;
      best_share = share;
    }
  }
  return best;
}

}  // namespace

CudaPlan plan_cuda(const std::vector<const Layer*>& layers, const Options& options,
                   int64_t multiprocessors) {
  CudaPlan plan = {};
  int64_t k = 1;
  for (const Layer* layer : layers) {
    plan.hidden_size = std::max(plan.hidden_size, layer->hidden_size);
    k = std::max(k, layer->selected);
    if (layer->bf16_screen)
      plan.rounded = std::max(plan.rounded, layer->hidden_size);
    else if (layer->dtype != Dtype::float32)
      plan.widened = std::max(tile_bytes / 4, plan.hidden_size);
  }
  plan.layers = static_cast<int64_t>(layers.size());
  // One layer's chunks use two, see CudaLanes::enqueue.
  plan.lanes = options.lanes > 0 ? options.lanes : std::clamp<int64_t>(plan.layers, 2, 4);
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
  return plan;
}

int64_t chunk_rows(const Request& request, const CudaPlan& plan) {
  const int64_t rows = request.rows(), chunks = (rows + plan.rows - 1) / plan.rows;
  return (rows + chunks - 1) / chunks;
}

void encode_rows(const Request& request, int64_t first, int64_t count, const at::Tensor& weights,
                 const cuda::LayerPointers* pointers, const CudaBuffers& buffers,
                 const CudaPlan& plan, cuda::Queue& queue) {
  const Layer& layer = *request.layer;
  const int64_t size = layer.hidden_size;
  const bool few = request.rows() <= cuda::few_rows, bf16 = layer.bf16_screen && !few;
  const at::Tensor& screened = layer.copies.bf16.defined() ? layer.copies.bf16 : weights;
  const cuda::ScreenErrors errors = {few ? cuda::few_rows_rounding(size) : sum_roundoff(size, !bf16),
                               layer.copies.bf16_residual, layer.largest_norm};
  const cuda::Weights exact = {weights.const_data_ptr(), layer.dtype, size, layer.gate_at(0),
                               layer.largest_bias};
  const cuda::CandidateLists lists = {static_cast<uint64_t*>(buffers.deferred.mutable_data_ptr()),
                             static_cast<uint64_t*>(buffers.exact.mutable_data_ptr()),
                             static_cast<uint64_t*>(buffers.sorted.mutable_data_ptr()),
                             buffers.deferred_count.mutable_data_ptr<int>(),
                             buffers.exact_count.mutable_data_ptr<int>(),
                             buffers.active_count.mutable_data_ptr<int>(),
                             static_cast<uint64_t*>(buffers.kth_best.mutable_data_ptr()),
                             static_cast<int>(std::clamp<int64_t>(
                                 std::min(busy_blocks, plan.lists) / count, 1, cuda::max_groups)),
                             static_cast<int>(plan.capacity),
                             static_cast<int>(layer.selected)};
  float *x = floats(buffers.hidden), *margin = floats(buffers.margin),
        *scores = floats(buffers.scores);
  const at::Tensor left =
      (bf16 ? buffers.rounded : buffers.hidden).narrow(0, 0, count * size).view({count, size});
  check_cuda(
      cuda::prepare({pointers, kernel_dtype(request.hidden.scalar_type()), first, count, size,
                     floats(layer.input_bias), floats(layer.ln_weight), floats(layer.ln_bias)},
                    errors, x, bf16 ? left.mutable_data_ptr() : nullptr, margin, lists, queue));
  const bool widen = !few && !bf16 && layer.dtype != Dtype::float32;
  const int64_t panel =
      few     ? std::min(plan.scores / count, layer.features)
      : widen ? std::min(panel_features(count, layer.features, plan), plan.widened / size)
              : panel_features(count, layer.features, plan);
  for (int64_t feature = 0; feature < layer.features; feature += panel) {
    const int64_t width = std::min(panel, layer.features - feature);
    if (few) {
      check_cuda(cuda::product_few_rows(x, count, screened.const_data_ptr(),
                                    kernel_dtype(screened.scalar_type()), feature, width, size,
                                    scores, queue));
    } else {
      at::Tensor right = screened.narrow(0, feature, width);
      if (widen) {
        const at::Tensor wide = buffers.widened.narrow(0, 0, width * size).view({width, size});
        copy_to(wide, right);
        right = wide;
      }
      multiply(buffers.scores.narrow(0, 0, count * width).view({count, width}), left, right);
    }
    check_cuda(cuda::select(scores, x, margin, count, feature, width, exact, lists, queue));
  }
  check_cuda(cuda::merge(margin, count, exact, lists, queue));
  check_cuda(cuda::compute_exact(x, margin, count, exact, lists, queue));
  check_cuda(cuda::finish(pointers, margin, first, count, layer.features, layer.most_active, layer.top_k,
                          lists, queue));
}

}  // namespace sparse_transcoder
