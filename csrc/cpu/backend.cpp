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
  plan.workers = options.lanes > 0 ? options.lanes : at::get_num_threads();
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

// Features per row that the reservoirs keep for encode_sparse; 0 where it needs every active one,
// and then none is kept in them.
int64_t sparse_k(const Request& request) {
  const int64_t k = request.k_filled();
  return k < request.layer->features ? k : 0;
}

class CpuBackend : public Backend {
 public:
  CpuBackend(const std::vector<const Layer*>& layers, const Options& options)
      : crossovers_(active_crossovers()) {
    for (const Layer* layer : layers)
      layers_.emplace(layer->id, prepare_layer(*layer, options.screening));
    const Plan plan = plan_workspace(layers_, options);
    workspaces_ =
        std::make_unique<Pool<Workspace>>([plan] { return std::make_unique<Workspace>(plan); });
    threads_ = std::make_unique<ThreadPool>(plan.workers - 1);
  }

  void encode(const std::vector<Request>& requests) const override {
    encode(requests, *workspaces_->borrow());
  }

  void encode_sparse(const std::vector<Request>& requests, const SparseFormat& format,
                     const SparseSink& sink) const override;
  Explanation explain(const Request& request) const override;
  Memory memory() const override;

 private:
  // Calls take(block) for the rows of a request, in blocks of nearly one size.
  template <typename Take>
  void for_blocks(const Request& request, int64_t k, const Plan& plan, const Take& take) const;
  // Calls body(blocks) for batches that fit the workspace. k(request): what their reservoirs keep.
  // Nothing that grows with the number of rows is held.
  template <typename K, typename Body>
  void for_batches(std::vector<Request> requests, const Workspace& workspace, const K& k,
                   const Body& body) const;

  void encode(const std::vector<Request>& requests, const Workspace& workspace) const;
  void encode_sparse(const std::vector<RowBlock>& blocks, const Workspace& workspace,
                     const SparseFormat& format, const SparseSink& sink) const;
  void write_active(const std::vector<RowBlock>& blocks, const Workspace& workspace,
                    const std::vector<SparseWriter>& writers) const;

  const Crossovers crossovers_;
  std::map<int64_t, PreparedLayer> layers_;
  std::unique_ptr<Pool<Workspace>> workspaces_;
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
void CpuBackend::for_blocks(const Request& request, int64_t k, const Plan& plan,
                            const Take& take) const {
  const PreparedLayer& layer = layers_.at(request.layer->id);
  const int64_t all = request.row_count();
  const int64_t count = (all + plan.max_block_rows - 1) / plan.max_block_rows;
  for (int64_t i = 0, row = 0; i < count; ++i) {
    const int64_t row_count = (all - row) / (count - i);
    take(RowBlock{&request, &layer, row, row_count, k,
                  choose_screen(layer.copies, crossovers_, row_count), 0});
    row += row_count;
  }
}

template <typename K, typename Body>
void CpuBackend::for_batches(std::vector<Request> requests, const Workspace& workspace, const K& k,
                             const Body& body) const {
  // Largest first, so that no worker is left alone with a large layer at the end.
  std::stable_sort(requests.begin(), requests.end(), [](const Request& a, const Request& b) {
    const auto size = [](const Layer& layer) { return layer.features * layer.hidden_size; };
    return size(*a.layer) > size(*b.layer);
  });
  std::vector<RowBlock> batch;
  int64_t used = 0;
  for (const Request& request : requests)
    for_blocks(request, k(request), workspace.plan, [&](RowBlock block) {
      if (used + block.row_count > workspace.plan.max_rows) {
        body(batch);
        batch.clear();
        used = 0;
      }
      block.workspace_row = used;
      used += block.row_count;
      batch.push_back(block);
    });
  if (!batch.empty()) body(batch);
}

void CpuBackend::encode(const std::vector<Request>& requests, const Workspace& workspace) const {
  const auto k = [](const Request& request) { return request.k_filled(); };
  for_batches(requests, workspace, k, [&](const std::vector<RowBlock>& blocks) {
    const Batch batch(blocks, workspace, *threads_);
    batch.prepare_rows();
    batch.for_features([&](int64_t worker, const FeatureRange& range) {
      PanelScan<TopKCollector>(workspace, range, worker).run();
    });
    batch.for_rows(finish_phase, [&](int64_t worker, const RowBlock& block, int64_t row) {
      finish_row(workspace, block, row, worker);
    });
  });
}

void CpuBackend::encode_sparse(const std::vector<Request>& requests, const SparseFormat& format,
                               const SparseSink& sink) const {
  const auto workspace = workspaces_->borrow();
  for_batches(requests, *workspace, sparse_k, [&](const std::vector<RowBlock>& blocks) {
    encode_sparse(blocks, *workspace, format, sink);
  });
}

// One pass: workers gather entries while they count them. Where that is more than a worker's buffer
// takes, the counts are right all the same, and a second pass writes the entries.
void CpuBackend::encode_sparse(const std::vector<RowBlock>& blocks, const Workspace& workspace,
                               const SparseFormat& format, const SparseSink& sink) const {
  struct Found {
    const Entry* entries = nullptr;
    int64_t count = 0;
  };
  const Batch batch(blocks, workspace, *threads_);
  std::vector<Found> found(blocks.size() * batch.ranges_per_block());  // by task
  for (const WorkerBuffers& worker : workspace.workers) *worker.entry_count = {0, false};
  batch.prepare_rows();
  batch.for_features([&](int64_t worker, const FeatureRange& range) {
    if (range.block->k > 0) return PanelScan<TopKCollector>(workspace, range, worker).run();
    const WorkerBuffers& buffers = workspace.workers[worker];
    const int64_t before = buffers.entry_count->used;
    PanelScan<GatherCollector>(workspace, range, worker).run();
    found[range.task] = {buffers.entries + before, buffers.entry_count->used - before};
  });

  std::vector<SparseRows> results;
  std::vector<SparseWriter> writers;
  results.reserve(blocks.size());  // writers refer to them
  const at::TensorOptions options(at::kCPU);
  for (const RowBlock& block : blocks) {
    const at::Tensor row_begin = at::zeros({block.row_count + 1}, options.dtype(at::kLong));
    int64_t* begin = row_begin.mutable_data_ptr<int64_t>();
    for (int64_t row = 0; row < block.row_count; ++row)
      begin[row + 1] = begin[row] + entry_count(workspace, block, row);
    const int64_t count = begin[block.row_count];
    results.push_back({block.request->layer->id,
                       block.first_row,
                       {row_begin, at::empty({count}, options.dtype(format.features)),
                        at::empty({count}, options.dtype(format.activations))},
                       0});
    writers.emplace_back(results.back());
  }

  const auto full = [](const WorkerBuffers& worker) { return worker.entry_count->full; };
  if (std::any_of(workspace.workers.begin(), workspace.workers.end(), full)) {
    write_active(blocks, workspace, writers);
  } else {
    batch.for_blocks([&](int64_t i) {
      const int64_t ranges = batch.ranges_per_block();
      for (int64_t task = i * ranges; task < (i + 1) * ranges; ++task)
        for (int64_t e = 0; e < found[task].count; ++e) {
          const Entry& entry = found[task].entries[e];
          int64_t& written = reservoir(workspace, blocks[i], entry.row, 0).written;
          writers[i].write(writers[i].row_begin[entry.row] + written++, entry.feature, entry.value);
        }
    });
    batch.for_rows(finish_phase, [&](int64_t worker, const RowBlock& block, int64_t row) {
      finish_sparse_row(workspace, block, row, worker, writers[&block - blocks.data()]);
    });
  }
  for (SparseRows& rows : results) sink(std::move(rows));
}

// Writes the entries of rows that are counted.
void CpuBackend::write_active(const std::vector<RowBlock>& blocks, const Workspace& workspace,
                              const std::vector<SparseWriter>& writers) const {
  // One range per block gives a WriteCollector all features of a row.
  const Batch batch(blocks, workspace, *threads_, 1);
  batch.prepare_rows();
  batch.for_features([&](int64_t worker, const FeatureRange& range) {
    const SparseWriter& out = writers[range.block - blocks.data()];
    if (range.block->k > 0)
      PanelScan<TopKCollector>(workspace, range, worker).run();
    else
      PanelScan<WriteCollector>(workspace, range, worker, {workspace, *range.block, worker, out})
          .run();
  });
  batch.for_rows(finish_phase, [&](int64_t worker, const RowBlock& block, int64_t row) {
    finish_sparse_row(workspace, block, row, worker, writers[&block - blocks.data()]);
  });
}

Explanation CpuBackend::explain(const Request& request) const {
  const auto workspace = workspaces_->borrow();
  for (const WorkerBuffers& worker : workspace->workers) *worker.counters = {};
  workspace->timed = true;
  encode({request}, *workspace);
  workspace->timed = false;
  Explanation explanation = {};
  explanation.instruction_set = cpu_instruction_set();
  explanation.rows = request.row_count();
  explanation.features = request.layer->features;
  for (const WorkerBuffers& worker : workspace->workers) {
    const Counters& counters = *worker.counters;
    explanation.fallback_rows += counters.fallback_rows;
    explanation.pairs_float32 += counters.pairs[static_cast<int>(ScreenType::float32)];
    explanation.pairs_int16 += counters.pairs[static_cast<int>(ScreenType::int16)];
    explanation.pairs_int8 += counters.pairs[static_cast<int>(ScreenType::int8)];
    explanation.survivors += counters.survivors;
    explanation.ambiguous += counters.ambiguous;
    explanation.rescored += counters.computed;
    explanation.prepare_ms += counters.ms[prepare_phase];
    explanation.screen_ms += counters.ms[screen_phase];
    explanation.refine_ms += counters.ms[rescreen_phase];
    explanation.rescore_ms += counters.ms[compute_phase];
    explanation.finish_ms += counters.ms[finish_phase];
  }
  return explanation;
}

}  // namespace
}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(const std::vector<const Layer*>& layers,
                                          const Options& options) {
  cpu_instruction_set();  // refuses a name that this machine cannot run
  return std::make_unique<cpu::CpuBackend>(layers, options);
}

}  // namespace sparse_transcoder
