#include "cpu/prepare_rows.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

#include "bounds.h"

namespace sparse_transcoder::cpu {
namespace {

// normed[i] = hidden[row][i] in float32, from any dtype and strides.
void widen_row(Hidden hidden, int64_t size, int64_t row, float* normed) {
  const auto widen = active_kernels().widen[static_cast<int>(dtype_of(hidden.dtype))];
  if (hidden.strides[2] == 1) return widen(hidden.at(row), normed, size);
  for (int64_t i = 0; i < size; ++i) widen(hidden.at(row, i), normed + i, 1);
}

void subtract_bias(const float* bias, int64_t size, float* normed) {
  for (int64_t i = 0; i < size; ++i) normed[i] -= bias[i];
}

void layer_norm(const float* weight, const float* bias, int64_t size, float* normed) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < size; ++i) sum += normed[i];
  const double mean = sum / size;
  for (int64_t i = 0; i < size; ++i) squares += (normed[i] - mean) * (normed[i] - mean);
  const double scale = 1 / std::sqrt(squares / size + 1e-5);
  for (int64_t i = 0; i < size; ++i)
    normed[i] = static_cast<float>((normed[i] - mean) * scale * weight[i] + bias[i]);
}

// What the encoder multiplies: the hidden state after the layer's own input bias and LayerNorm.
void load_row(const PreparedLayer& layer, const Hidden& hidden, int64_t row, float* normed) {
  widen_row(hidden, layer.hidden_size, row, normed);
  if (layer.input_bias.defined())
    subtract_bias(layer.input_bias.const_data_ptr<float>(), layer.hidden_size, normed);
  if (layer.ln_weight.defined())
    layer_norm(layer.ln_weight.const_data_ptr<float>(), layer.ln_bias.const_data_ptr<float>(),
               layer.hidden_size, normed);
}

// Bound on |float32 product - exact| per unit of ||w||. It is NaN for a row that is not finite, and
// infinite for a row so large that the product could overflow.
float product_margin(const PreparedLayer& layer, double squared_norm) {
  if (!std::isfinite(squared_norm)) return std::numeric_limits<float>::quiet_NaN();
  const double rounding = product_rounding(layer.hidden_size);
  const double norm =
      std::max<double>(std::sqrt(squared_norm) * round_up, std::numeric_limits<float>::min());
  if (norm * layer.bounds.max_norm > max_screened_product)
    return std::numeric_limits<float>::infinity();
  return static_cast<float>(rounding * norm * round_up);
}

// Makes the copies of a normed row that the block's screens read, and the margins of their scores.
void copy_row(const Workspace& workspace, const RowBlock& block, int64_t row, int64_t worker) {
  const KernelTable& kernels = active_kernels();
  const int64_t size = block.layer->hidden_size;
  const float* normed = normed_row(workspace, block, row);
  RowMargin& margin = cpu::margin(workspace, block, row);
  if (block.screen.sparse == ScreenType::int8)
    kernels.quantise_row(Int8Layout(size), normed, block.screen.planes,
                         int8_row(workspace, block, row), workspace.workers[worker].rotated);
  if (block.layer->copies.int16.defined()) {
    Int16Scale& scale = int16_scale(workspace, block, row);
    scale = kernels.quantise_int16(normed, size, int16_row(workspace, block, row));
    if (margin.is_screened()) margin.int16 = {scale.error, scale.norm};
  }
}

void empty_reservoirs(const Workspace& workspace, const RowBlock& block, int64_t row) {
  const int64_t capacity = workspace.plan.capacity;
  for (int64_t worker = 0; worker < workspace.plan.workers; ++worker) {
    Reservoir& reservoir = cpu::reservoir(workspace, block, row, worker);
    const int64_t first = (&reservoir - workspace.reservoirs) * capacity;
    reservoir = {workspace.keys + first, workspace.deferred + first, block.k, capacity};
  }
}

void prepare_row(const Workspace& workspace, const RowBlock& block, int64_t row, int64_t worker) {
  const PreparedLayer& layer = *block.layer;
  float* normed = normed_row(workspace, block, row);
  load_row(layer, block.request->hidden, block.first_row + row, normed);
  double squared_norm;
  active_kernels().dot[static_cast<int>(Dtype::float32)](&normed, 1, normed, layer.hidden_size,
                                                         &squared_norm);
  const float per_norm = product_margin(layer, squared_norm);
  margin(workspace, block, row) = {{per_norm, 0}, {per_norm, 0}};
  workspace.workers[worker].counters->fallback_rows += std::isinf(per_norm);
  copy_row(workspace, block, row, worker);
  empty_reservoirs(workspace, block, row);
}

}  // namespace

void prepare_rows(const Batch& batch, const Workspace& workspace) {
  batch.for_rows([&](int64_t worker, const RowBlock& block, int64_t first, int64_t last) {
    Stopwatch watch(*workspace.workers[worker].counters, workspace.timed);
    for (int64_t row = first; row < last; ++row) prepare_row(workspace, block, row, worker);
    watch.add_to(prepare_phase);
  });
}

}  // namespace sparse_transcoder::cpu
