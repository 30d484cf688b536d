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
#include <utility>

#include "cpu/batch.h"
#include "cpu/collectors.h"
#include "cpu/finish_rows.h"
#include "cpu/panel_scan.h"
#include "cpu/prepare_rows.h"
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

Plan plan_workspace(const std::map<int64_t, PreparedLayer>& layers, const Options& options,
                    int64_t workers) {
  Plan plan = {};
  plan.lanes_chosen = options.lanes > 0;
  plan.workers = workers;
  for (const auto& [id, layer] : layers) {
    plan.hidden_size = std::max(plan.hidden_size, layer.hidden_size);
    // encode_sparse keeps all that a top-k coder keeps.
    const int64_t k = drops_features(layer) ? layer.max_active
                                            : std::min(k_out(layer, options), layer.max_active);
    plan.max_ranks = std::max(plan.max_ranks, k_out(layer, options));
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
    const int64_t workers = options.lanes > 0 ? options.lanes : at::get_num_threads();
    threads_ = std::make_unique<ThreadPool>(workers - 1, options.lanes == 0);
    for (const Layer* layer : layers)
      layers_.emplace(layer->id, prepare_layer(*layer, options.screening, workers, *threads_));
    const Plan plan = plan_workspace(layers_, options, workers);
    workspaces_ =
        std::make_unique<Pool<CallBuffers>>([plan] { return std::make_unique<CallBuffers>(plan); });
  }

  void encode(const std::vector<Request>& requests, Explanation* explanation) const override;
  std::vector<SparseFeatures> encode_sparse(std::vector<Request> requests) const override {
    return encode_sparse(std::move(requests), *workspaces_->borrow());
  }
  void encode_into(const std::vector<Request>& requests, const SparseFormat& format,
                   const SparseSink& sink) const override;
  Memory memory() const override;

 private:
  // Calls run(batch) for batches of all rows, cut into blocks of nearly one size. batch is scratch.
  template <typename Run>
  void for_batches(const std::vector<Request>& requests, const Workspace& workspace,
                   int64_t max_block_rows, std::vector<RowBlock>& batch, const Run& run) const;

  void encode_batches(const std::vector<Request>& requests, CallBuffers& buffers) const;
  void encode_batch(const std::vector<RowBlock>& blocks, const Workspace& workspace) const;
  std::vector<SparseFeatures> encode_sparse(std::vector<Request> requests,
                                            const Workspace& workspace) const;
  std::vector<SparseRows> encode_rows(const std::vector<RowBlock>& blocks,
                                      const Workspace& workspace, const SparseFormat& format) const;
  void write_rows(const RowBlock& block, const Workspace& workspace, SparseRows& rows) const;
  void count_active(const std::vector<RowBlock>& blocks, const Workspace& workspace) const;
  void write_active(const std::vector<RowBlock>& blocks, const Workspace& workspace) const;

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

template <typename Run>
void CpuBackend::for_batches(const std::vector<Request>& requests, const Workspace& workspace,
                             int64_t max_block_rows, std::vector<RowBlock>& batch,
                             const Run& run) const {
  batch.clear();
  int64_t used = 0;
  for (const Request& request : requests) {
    const PreparedLayer& layer = layers_.at(request.layer->id);
    const int64_t rows = request.row_count(), count = (rows + max_block_rows - 1) / max_block_rows;
    for (int64_t i = 0, row = 0; i < count; ++i) {
      const int64_t row_count = (rows - row) / (count - i);
      if (used + row_count > workspace.plan.max_rows) {
        run(batch);
        batch.clear();
        used = 0;
      }
      batch.push_back({&request, &layer, row, row_count, request.k_filled(),
                       choose_screen(layer.copies, crossovers_, row_count), used});
      used += row_count;
      row += row_count;
    }
  }
  if (!batch.empty()) run(batch);
}

// Throws where a call's results contradict each other.
void refuse_contradictions(const Workspace& workspace) {
  const Layer* layer = nullptr;
  for (const WorkerBuffers& worker : workspace.workers)
    if (const Layer* one = std::exchange(worker.counters->contradicted, nullptr)) layer = one;
  if (layer != nullptr) TORCH_CHECK_VALUE(false, layer->changed());
}

// Adds what the call that used the workspace did.
void add_counters(const std::vector<Request>& requests, const Workspace& workspace,
                  Explanation& explanation) {
  explanation.workers = call_workers(workspace.plan);
  for (const Request& request : requests) {
    explanation.rows += request.row_count();
    explanation.features += request.layer->features;
  }
  for (const WorkerBuffers& worker : workspace.workers) {
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

void CpuBackend::encode(const std::vector<Request>& requests, Explanation* explanation) const {
  const auto workspace = workspaces_->borrow();
  if (explanation)
    for (const WorkerBuffers& worker : workspace->workers) *worker.counters = {};
  workspace->timed = explanation != nullptr;
  encode_batches(requests, *workspace);
  if (explanation) add_counters(requests, *workspace, *explanation);
}

void CpuBackend::encode_batches(const std::vector<Request>& requests, CallBuffers& buffers) const {
  // Largest first, so that no worker is left alone with a large layer at the end.
  buffers.requests.assign(requests.begin(), requests.end());
  std::sort(buffers.requests.begin(), buffers.requests.end(),
            [](const Request& a, const Request& b) {
              const auto size = [](const Layer& layer) {
                return std::make_pair(layer.features * layer.hidden_size, -layer.id);
              };
              return size(*a.layer) > size(*b.layer);
            });
  for_batches(buffers.requests, buffers, buffers.plan.max_block_rows, buffers.batch,
              [&](const std::vector<RowBlock>& blocks) { encode_batch(blocks, buffers); });
  refuse_contradictions(buffers);
}

void CpuBackend::encode_batch(const std::vector<RowBlock>& blocks,
                              const Workspace& workspace) const {
  const Batch batch(blocks, workspace, *threads_);
  prepare_rows(batch, workspace);
  scan<TopKCollector>(batch, workspace);
  finish_rows(batch, workspace);
}

// row_begin[1 + row] becomes the row's number of entries.
void CpuBackend::count_active(const std::vector<RowBlock>& blocks,
                              const Workspace& workspace) const {
  const Batch batch(blocks, workspace, *threads_);
  prepare_rows(batch, workspace);
  scan<CountCollector>(batch, workspace);
  for (const RowBlock& block : blocks) {
    int64_t* counts = block.request->sparse.row_begin.mutable_data_ptr<int64_t>() + 1;
    for (int64_t row = 0; row < block.row_count; ++row)
      counts[block.first_row + row] =
          margin(workspace, block, row).is_finite() ? cpu::active_count(workspace, block, row) : 1;
  }
}

// Writes the entries of rows that are counted. All blocks are of top-k coders, or none.
void CpuBackend::write_active(const std::vector<RowBlock>& blocks,
                              const Workspace& workspace) const {
  const bool top_k = blocks.front().k > 0;
  // One range per block gives a WriteCollector all features of a row.
  const Batch batch(blocks, workspace, *threads_, top_k ? 0 : 1);
  prepare_rows(batch, workspace);
  if (top_k)
    scan<TopKCollector>(batch, workspace);
  else
    scan<WriteCollector>(batch, workspace);
  batch.for_rows([&](int64_t worker, const RowBlock& block, int64_t first, int64_t last) {
    if (top_k) merge_rows(workspace, block, first, last, worker);
    for (int64_t row = first; row < last; ++row) finish_sparse_row(workspace, block, row, worker);
  });
}

// Tensors of a sparse result, or an error that names the bytes that it needs.
template <typename Make>
void allocate_sparse(const Request& request, const Make& make) {
  try {
    make(at::TensorOptions(at::kLong));
  } catch (const c10::Error&) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, "layer ", request.layer->id,
                     ": out of memory: the result needs ", 8 * (request.row_count() + 1),
                     " bytes and 12 for each active feature; fewer rows at a time need less, got ",
                     request.row_count());
  }
}

// Two passes, one to count and one to write, so that nothing is held but the results.
std::vector<SparseFeatures> CpuBackend::encode_sparse(std::vector<Request> requests,
                                                      const Workspace& workspace) const {
  const Plan& plan = workspace.plan;
  int64_t rows = 0;
  for (Request& request : requests) {
    const int64_t row_count = request.row_count();
    rows += row_count;
    // The reservoirs of a top-k coder hold all that it keeps; those of the others hold nothing.
    request.k_out = drops_features(*request.layer) ? request.layer->max_active : 0;
    allocate_sparse(request, [&](const at::TensorOptions& options) {
      request.sparse.row_begin = at::zeros({row_count + 1}, options);
    });
  }
  std::vector<RowBlock> batch;
  for_batches(requests, workspace, plan.max_block_rows, batch,
              [&](const std::vector<RowBlock>& blocks) { count_active(blocks, workspace); });
  std::vector<Request> top_k, others;
  std::vector<SparseFeatures> results;
  for (Request& request : requests) {
    int64_t* row_begin = request.sparse.row_begin.mutable_data_ptr<int64_t>();
    const int64_t* end =
        std::partial_sum(row_begin, row_begin + request.row_count() + 1, row_begin);
    allocate_sparse(request, [&](const at::TensorOptions& options) {
      request.sparse.features = at::empty({end[-1]}, options);
      request.sparse.activations = at::empty({end[-1]}, options.dtype(at::kFloat));
    });
    results.push_back(request.sparse);
    (request.k_out > 0 ? top_k : others).push_back(request);
  }
  // A block is written by one worker, so there are blocks for all of them.
  const int64_t tasks = 2 * plan.workers;
  const int64_t block_rows =
      std::min((std::min(plan.max_rows, rows) + tasks - 1) / tasks, plan.max_block_rows);
  for (const std::vector<Request>* part : {&top_k, &others})
    for_batches(*part, workspace, block_rows, batch,
                [&](const std::vector<RowBlock>& blocks) { write_active(blocks, workspace); });
  refuse_contradictions(workspace);
  return results;
}

void CpuBackend::encode_into(const std::vector<Request>& requests, const SparseFormat& format,
                             const SparseSink& sink) const {
  const auto workspace = workspaces_->borrow();
  // Reservoirs hold what is cut at k; where all is kept they hold nothing.
  std::vector<Request> wanted = requests;
  for (Request& request : wanted)
    if (request.k_filled() == request.layer->features) request.k_out = 0;
  std::vector<RowBlock> batch;
  for_batches(wanted, *workspace, workspace->plan.max_block_rows, batch,
              [&](const std::vector<RowBlock>& blocks) {
                std::vector<SparseRows> found = encode_rows(blocks, *workspace, format);
                refuse_contradictions(*workspace);
                for (SparseRows& rows : found) sink(std::move(rows));
              });
}

// One pass: workers gather entries while they count them. Where that is more than a worker's buffer
// takes, the counts are right all the same, and the entries are made again.
std::vector<SparseRows> CpuBackend::encode_rows(const std::vector<RowBlock>& blocks,
                                                const Workspace& workspace,
                                                const SparseFormat& format) const {
  struct Found {
    const Entry* entries = nullptr;
    int64_t count = 0;
  };
  const Batch batch(blocks, workspace, *threads_);
  const int64_t ranges = batch.ranges_per_block();
  std::vector<Found> found(blocks.size() * ranges);  // by task
  for (const WorkerBuffers& worker : workspace.workers) *worker.entry_count = {0, false};
  prepare_rows(batch, workspace);
  batch.for_features([&](int64_t worker, const FeatureRange& range) {
    if (range.block->k > 0) return PanelScan<TopKCollector>(workspace, range, worker).run();
    const WorkerBuffers& buffers = workspace.workers[worker];
    const int64_t before = buffers.entry_count->used;
    PanelScan<GatherCollector>(workspace, range, worker).run();
    found[range.task] = {buffers.entries + before, buffers.entry_count->used - before};
  });

  std::vector<SparseRows> results;
  for (const RowBlock& block : blocks) {
    const at::TensorOptions options(at::kCPU);
    const at::Tensor row_begin = at::zeros({block.row_count + 1}, options.dtype(at::kLong));
    int64_t* begin = row_begin.mutable_data_ptr<int64_t>();
    for (int64_t row = 0; row < block.row_count; ++row) {
      const int64_t active = cpu::active_count(workspace, block, row);
      const int64_t kept = block.k > 0 ? std::min(active, block.k) : active;
      begin[row + 1] = begin[row] + (margin(workspace, block, row).is_finite() ? kept : 1);
    }
    const int64_t count = begin[block.row_count];
    results.push_back({block.request->layer->id,
                       block.first_row,
                       {row_begin, at::empty({count}, options.dtype(format.features)),
                        at::empty({count}, options.dtype(format.activations))},
                       0});
  }
  const auto full = [](const WorkerBuffers& worker) { return worker.entry_count->full; };
  const bool again = std::any_of(workspace.workers.begin(), workspace.workers.end(), full);
  std::vector<SparseWriter> writers(results.begin(), results.end());
  batch.for_blocks([&](int64_t i) {
    for (int64_t task = i * ranges; task < (i + 1) * ranges && !again; ++task)
      for (int64_t e = 0; e < found[task].count; ++e) {
        const Entry& entry = found[task].entries[e];
        int64_t& written = reservoir(workspace, blocks[i], entry.row, 0).written;
        const int64_t to = writers[i].row_begin[entry.row] + written++;
        if (to < writers[i].row_begin[entry.row + 1])
          writers[i].write(to, entry.feature, entry.value);
      }
  });
  batch.for_rows([&](int64_t worker, const RowBlock& block, int64_t first, int64_t last) {
    if (again && block.k == 0) return;
    if (block.k > 0) merge_rows(workspace, block, first, last, worker);
    for (int64_t row = first; row < last; ++row)
      finish_entries(workspace, block, row, worker, writers[&block - blocks.data()]);
  });
  if (again) {
    for (size_t i = 0; i < blocks.size(); ++i)
      if (blocks[i].k == 0) write_rows(blocks[i], workspace, results[i]);
  }
  return results;
}

// The entries of a block whose features are all wanted, once more.
void CpuBackend::write_rows(const RowBlock& block, const Workspace& workspace,
                            SparseRows& rows) const {
  const int64_t size = block.layer->hidden_size;
  const at::Tensor some = tensor_of(block.request->hidden, size, at::kCPU)
                              .reshape({1, -1, size})
                              .narrow(1, block.first_row, block.row_count);
  const SparseFeatures found =
      encode_sparse({{block.request->layer, view_of(some)}}, workspace).front();
  TORCH_CHECK_VALUE(at::equal(found.row_begin, rows.features.row_begin),
                    block.request->layer->changed());
  rows.clamped = 0;
  const SparseWriter out(rows);
  for (int64_t i = 0; i < found.features.numel(); ++i)
    out.write(i, found.features.const_data_ptr<int64_t>()[i],
              found.activations.const_data_ptr<float>()[i]);
}

}  // namespace
}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(const std::vector<const Layer*>& layers,
                                          const Options& options) {
  cpu_instruction_set();  // refuses a name that this machine cannot run
  return std::make_unique<cpu::CpuBackend>(layers, options);
}

}  // namespace sparse_transcoder
