// The CPU backend. A call is a sequence of batches, and a batch goes through three stages:
//
//   prepare   rows become float32, normed, with their copies and margins (prepare_rows.h)
//   scan      each worker streams over ranges of features, screens them, and keeps the best of what
//             it computes exactly (panel_scan.h)
//   finish    the best of all workers are merged, sorted and written (finish_rows.h)
//
// The exact dot product alone decides whether a feature is active, and its value. The screen only
// decides which of them are worth computing, and never rules out one that could count. So no result
// depends on chunks, panels, workers or threads.
#include "backend.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <sparse_transcoder/engine.h>

#include <map>
#include <numeric>
#include <stdexcept>

#include "cpu/batch.h"
#include "cpu/collectors.h"
#include "cpu/finish_rows.h"
#include "pool.h"

namespace sparse_transcoder {

std::string_view cpu_instruction_set() {
  try {
    return cpu::active_kernels().name;
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

namespace cpu {
namespace {

// Rows of a block: their int8 and int16 copies stay in L2.
constexpr int64_t max_block_rows = 256;
// Rows and features per float32 product: the scores stay in L2, the weights in L3.
constexpr int64_t tile_rows = 64, tile_features = 512;
// The rows of a batch are so few that their reservoirs need no more than this.
constexpr int64_t max_reservoir_bytes = 32 << 20;

// Whether a top-k coder drops some of the features that pass.
bool drops_features(const Layer& layer) { return layer.max_active < layer.features; }

Plan plan_workspace(const std::map<int64_t, PreparedLayer>& layers, const Options& options) {
  Plan plan = {};
  plan.lanes_chosen = options.lanes > 0;
  plan.workers = plan.lanes_chosen ? options.lanes : at::get_num_threads();
  for (const auto& [id, layer] : layers) {
    plan.hidden_size = std::max(plan.hidden_size, layer.hidden_size);
    // encode_sparse keeps all that a top-k coder keeps.
    const int64_t k = drops_features(layer) ? layer.max_active
                                            : std::min(k_out(layer, options), layer.max_active);
    plan.max_k = std::max(plan.max_k, k);
    plan.capacity = std::max(plan.capacity, reservoir_capacity(k, layer.features));
    plan.tile_features = std::max(plan.tile_features, std::min(tile_features, layer.features));
    if (layer.copies.int8.defined()) {
      const Int8Layout layout(layer.hidden_size);
      plan.int8_row_bytes = std::max(plan.int8_row_bytes, 2 * layout.row_bytes());
      plan.int8_inputs = std::max(plan.int8_inputs, layout.inputs);
    }
    if (layer.copies.int16.defined())
      plan.int16_stride = std::max(plan.int16_stride, int16_stride(layer.hidden_size));
  }
  const auto key_bytes = static_cast<int64_t>(sizeof(uint64_t) + sizeof(DeferredFeature));
  const int64_t row_bytes = std::max<int64_t>(1, plan.workers * plan.capacity * key_bytes);
  plan.max_rows = std::clamp<int64_t>(max_reservoir_bytes / row_bytes, 1, options.chunk_size);
  plan.max_block_rows = std::min(max_block_rows, plan.max_rows);
  plan.tile_rows = std::min(tile_rows, plan.max_rows);
  return plan;
}

[[noreturn]] void refuse_sparse(const Layer& layer, int64_t row_count) {
  TORCH_CHECK_WITH(OutOfMemoryError, false, "layer ", layer.id,
                   ": out of memory: the result needs ", 8 * (row_count + 1),
                   " bytes and 12 for each active feature; fewer rows at a "
                   "time need less, got ",
                   row_count);
}

// What a call borrows: a workspace, and lists that keep their capacity.
struct CallBuffers : Workspace {
  using Workspace::Workspace;
  std::vector<Request> requests;
  std::vector<RowBlock> batch;
};

class CpuBackend : public Backend {
 public:
  CpuBackend(const std::vector<const Layer*>& layers, const Options& options)
      : crossovers_(active_crossovers()) {
    for (const Layer* layer : layers)
      layers_.emplace(layer->id, prepare_layer(*layer, options.screening));
    const Plan plan = plan_workspace(layers_, options);
    workspaces_ =
        std::make_unique<Pool<CallBuffers>>([plan] { return std::make_unique<CallBuffers>(plan); });
    threads_ = std::make_unique<ThreadPool>(plan.workers - 1);
  }

  void encode(const std::vector<Request>& requests, Explanation* explanation) const override;
  SparseFeatures encode_sparse(const Request& request) const override;
  Memory memory() const override;

 private:
  // Rows [first, first + count) of a request, cut into blocks of nearly one size.
  struct Rows {
    const Request& request;
    int64_t first, count;
    int64_t k;
    int64_t min_blocks;
  };
  // Calls take(block) for each of them. Nothing that grows with the number of rows is held.
  template <typename Take>
  void for_blocks(const Rows& rows, const Plan& plan, const Take& take) const;
  std::vector<RowBlock> split(const Rows& rows, const Plan& plan) const;

  void encode(const std::vector<Request>& requests, CallBuffers& buffers) const;
  void encode(const std::vector<RowBlock>& blocks, const Workspace& workspace) const;
  SparseFeatures encode_sparse(const Request& request, const Workspace& workspace) const;
  void count_active(const std::vector<RowBlock>& blocks, const Workspace& workspace,
                    int64_t* row_begin) const;
  void write_active(const std::vector<RowBlock>& blocks, const Workspace& workspace,
                    const SparseFeatures& out) const;

  const Crossovers crossovers_;
  std::map<int64_t, PreparedLayer> layers_;
  std::unique_ptr<Pool<CallBuffers>> workspaces_;
  std::unique_ptr<ThreadPool> threads_;
};

Memory CpuBackend::memory() const {
  Memory memory = {};
  for (const auto& [id, layer] : layers_) {
    if (!layer.W_enc.is_alias_of(layer.declared.W_enc)) memory.weight_bytes += layer.W_enc.nbytes();
    memory.gate_bytes += layer.bounds.bytes(layer);
    memory.screening_bytes += layer.copies.bytes();
  }
  memory.workspace_bytes = workspaces_->bytes();
  return memory;
}

template <typename Take>
void CpuBackend::for_blocks(const Rows& rows, const Plan& plan, const Take& take) const {
  const PreparedLayer& layer = layers_.at(rows.request.layer->id);
  const int64_t count =
      std::max(rows.min_blocks, (rows.count + plan.max_block_rows - 1) / plan.max_block_rows);
  for (int64_t i = 0, row = 0; i < count; ++i) {
    const int64_t row_count = (rows.count - row) / (count - i);
    if (row_count > 0)
      take(RowBlock{&rows.request, &layer, rows.first + row, row_count, rows.k,
                    choose_screen(layer.copies, crossovers_, row_count), row});
    row += row_count;
  }
}

std::vector<RowBlock> CpuBackend::split(const Rows& rows, const Plan& plan) const {
  std::vector<RowBlock> blocks;
  for_blocks(rows, plan, [&](const RowBlock& block) { blocks.push_back(block); });
  return blocks;
}

void CpuBackend::encode(const std::vector<Request>& requests, CallBuffers& buffers) const {
  // Largest first, so that no worker is left alone with a large layer at the end.
  buffers.requests.assign(requests.begin(), requests.end());
  std::sort(buffers.requests.begin(), buffers.requests.end(),
            [](const Request& a, const Request& b) {
              const auto size = [](const Layer& layer) {
                return std::make_pair(layer.features * layer.hidden_size, -layer.id);
              };
              return size(*a.layer) > size(*b.layer);
            });
  std::vector<RowBlock>& batch = buffers.batch;
  batch.clear();
  int64_t used = 0;
  for (const Request& request : buffers.requests) {
    const Rows rows = {request, 0, request.row_count(), request.k_filled(), 1};
    for_blocks(rows, buffers.plan, [&](RowBlock block) {
      if (used + block.row_count > buffers.plan.max_rows) {
        encode(batch, buffers);
        batch.clear();
        used = 0;
      }
      block.workspace_row = used;
      used += block.row_count;
      batch.push_back(block);
    });
  }
  if (!batch.empty()) encode(batch, buffers);
}

void CpuBackend::encode(const std::vector<RowBlock>& blocks, const Workspace& workspace) const {
  const Batch batch(blocks, workspace, *threads_);
  batch.prepare_rows();
  batch.for_features([&](int64_t worker, const FeatureRange& range) {
    PanelScan<TopKCollector>(workspace, range, worker).run();
  });
  batch.for_rows(finish_phase, [&](int64_t worker, const RowBlock& block, int64_t row) {
    finish_row(workspace, block, row, worker);
  });
}

// row_begin[1 + row] becomes the row's number of entries.
void CpuBackend::count_active(const std::vector<RowBlock>& blocks, const Workspace& workspace,
                              int64_t* row_begin) const {
  const Batch batch(blocks, workspace, *threads_);
  batch.prepare_rows();
  batch.for_features([&](int64_t worker, const FeatureRange& range) {
    PanelScan<CountCollector>(workspace, range, worker).run();
  });
  for (const RowBlock& block : blocks)
    for (int64_t row = 0; row < block.row_count; ++row)
      row_begin[1 + block.first_row + row] =
          margin(workspace, block, row).is_finite() ? cpu::active_count(workspace, block, row) : 1;
}

// Writes the entries of rows that are counted.
void CpuBackend::write_active(const std::vector<RowBlock>& blocks, const Workspace& workspace,
                              const SparseFeatures& out) const {
  const bool top_k = drops_features(*blocks.front().layer);
  // One range per block gives a WriteCollector all features of a row.
  const Batch batch(blocks, workspace, *threads_, top_k ? 0 : 1);
  batch.prepare_rows();
  batch.for_features([&](int64_t worker, const FeatureRange& range) {
    if (top_k)
      PanelScan<TopKCollector>(workspace, range, worker).run();
    else
      PanelScan<WriteCollector>(workspace, range, worker, {workspace, *range.block, worker, out})
          .run();
  });
  batch.for_rows(finish_phase, [&](int64_t worker, const RowBlock& block, int64_t row) {
    finish_sparse_row(workspace, block, row, worker, out);
  });
}

// Two passes, one to count and one to write, so that nothing is held but the result.
SparseFeatures CpuBackend::encode_sparse(const Request& request, const Workspace& workspace) const {
  const int64_t row_count = request.row_count(), max_rows = workspace.plan.max_rows;
  const int64_t k = drops_features(*request.layer) ? request.layer->max_active : 0;
  SparseFeatures out = {at::zeros({row_count + 1}, at::kLong), {}, {}};
  int64_t* row_begin = out.row_begin.mutable_data_ptr<int64_t>();
  const auto blocks_from = [&](int64_t first, int64_t min_blocks) {
    return split({request, first, std::min(max_rows, row_count - first), k, min_blocks},
                 workspace.plan);
  };
  for (int64_t first = 0; first < row_count; first += max_rows)
    count_active(blocks_from(first, 1), workspace, row_begin);
  std::partial_sum(row_begin, row_begin + row_count + 1, row_begin);
  out.features = at::empty({row_begin[row_count]}, at::kLong);
  out.activations = at::empty({row_begin[row_count]}, at::kFloat);
  for (int64_t first = 0; first < row_count; first += max_rows)
    write_active(blocks_from(first, 2 * workspace.plan.workers), workspace, out);
  return out;
}

SparseFeatures CpuBackend::encode_sparse(const Request& request) const {
  const auto workspace = workspaces_->borrow();
  try {
    return encode_sparse(request, *workspace);
  } catch (const c10::Error&) {  // of at::empty
    refuse_sparse(*request.layer, request.row_count());
  } catch (const std::bad_alloc&) {
    refuse_sparse(*request.layer, request.row_count());
  }
}

void CpuBackend::encode(const std::vector<Request>& requests, Explanation* told) const {
  const auto workspace = workspaces_->borrow();
  if (told)
    for (const WorkerBuffers& worker : workspace->workers) *worker.counters = {};
  workspace->timed = told != nullptr;
  encode(requests, *workspace);
  if (!told) return;
  Explanation& explanation = *told;
  explanation.workers = call_workers(workspace->plan);
  for (const Request& request : requests) {
    explanation.rows += request.row_count();
    explanation.features += request.layer->features;
  }
  for (const WorkerBuffers& worker : workspace->workers) {
    const Counters& counters = *worker.counters;
    explanation.fallback_rows += counters.fallback_rows;
    explanation.pairs_float32 += counters.pairs[static_cast<int>(ScreenType::float32)];
    explanation.pairs_int16 += counters.pairs[static_cast<int>(ScreenType::int16)];
    explanation.pairs_int8 += counters.pairs[static_cast<int>(ScreenType::int8)];
    explanation.survivors += counters.survivors;
    explanation.ambiguous += counters.ambiguous;
    explanation.computed += counters.computed;
    explanation.prepare_ms += counters.ms[prepare_phase];
    explanation.screen_ms += counters.ms[screen_phase];
    explanation.rescreen_ms += counters.ms[rescreen_phase];
    explanation.compute_ms += counters.ms[compute_phase];
    explanation.finish_ms += counters.ms[finish_phase];
  }
}

}  // namespace
}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(const std::vector<const Layer*>& layers,
                                          const Options& options) {
  cpu_instruction_set();  // refuses a name that this machine cannot run
  return std::make_unique<cpu::CpuBackend>(layers, options);
}

}  // namespace sparse_transcoder
