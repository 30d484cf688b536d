// The CPU encode path. A call is a sequence of waves; a wave holds as many rows, of one layer or of
// many, as the workspace has slots:
//
//   prepare   rows become float32, normed, with their error margin
//   scan      each lane streams over its features: screen a panel, gate the scores, compute the
//   survivors exactly, keep the best finish    each row's lists are merged, sorted and written
//
// Whether a feature is active, and its value, are decided by the exact dot product alone; the
// screen only decides which of them are worth computing, and never rules out one that could count.
// So no result depends on chunks, panels, lanes or threads.
#include "backend.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "bounds.h"
#include "cpu/panel_scan.h"
#include "cpu/thread_pool.h"
#include "pool.h"

namespace sparse_transcoder {
namespace {

using cpu::TopList;

constexpr int64_t panel_size = 512;  // features of a float32 panel: its weights stay in L3
constexpr int64_t block_rows = 64;   // rows screened at a time in float32: their scores stay in L2
constexpr int64_t job_rows = 256;    // rows screened at a time in int8 and int16: they stay in L2
constexpr int64_t rows_per_unit = 16;     // of prepare and finish
constexpr int64_t list_bytes = 32 << 20;  // rows in flight are cut so that their lists need no more

TopList& list_of(const Workspace& w, const Job& job, int64_t row, int64_t lane) {
  return w.lists[(job.slot + row) * w.plan.lanes + lane];
}

// x = norm(h) in float32, from any dtype and stride.
void load_row(const Layer& layer, const at::Tensor& hidden, int64_t row, float* x) {
  const int64_t size = layer.hidden_size, stride = hidden.stride(2);
  const int64_t offset =
      row / hidden.size(1) * hidden.stride(0) + row % hidden.size(1) * hidden.stride(1);
  const auto dtype = dtype_of(hidden.scalar_type());
  const auto* source =
      static_cast<const char*>(hidden.const_data_ptr()) + offset * hidden.element_size();
  const auto widen = cpu::cpu_kernels().widen[static_cast<int>(dtype)];
  if (stride == 1)
    widen(source, x, size);
  else
    for (int64_t i = 0; i < size; ++i) widen(source + i * stride * hidden.element_size(), x + i, 1);

  if (layer.input_bias.defined()) {
    const float* bias = layer.input_bias.const_data_ptr<float>();
    for (int64_t i = 0; i < size; ++i) x[i] -= bias[i];
  }
  if (layer.ln_weight.defined()) {
    const float* weight = layer.ln_weight.const_data_ptr<float>();
    const float* bias = layer.ln_bias.const_data_ptr<float>();
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < size; ++i) sum += x[i];
    const double mean = sum / size;
    for (int64_t i = 0; i < size; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const double scale = 1 / std::sqrt(squares / size + 1e-5);
    for (int64_t i = 0; i < size; ++i)
      x[i] = static_cast<float>((x[i] - mean) * scale * weight[i] + bias[i]);
  }
}

// Bound on |float32 product - exact| per unit of ||w||: gamma_H ||x||, whatever the order of its
// additions (Higham, Accuracy and Stability of Numerical Algorithms, 3.1, with Cauchy-Schwarz). NaN
// for a row that is not finite; infinite, so that nothing is ruled out, for one so large that the
// product could overflow.
float product_margin(const cpu::PreparedLayer& layer, double squared_norm) {
  if (!std::isfinite(squared_norm)) return std::numeric_limits<float>::quiet_NaN();
  const double roundoff = (layer.hidden_size + 8) * 0x1p-24;
  if (roundoff > 0.5) return std::numeric_limits<float>::infinity();
  const double norm =
      std::max<double>(std::sqrt(squared_norm) * (1 + 0x1p-20), std::numeric_limits<float>::min());
  if (norm * layer.bounds.max_norm > max_screened_product)
    return std::numeric_limits<float>::infinity();
  return static_cast<float>(roundoff / (1 - roundoff) * norm * (1 + 0x1p-20));
}

void prepare_row(const Workspace& w, const Job& job, int64_t row, int64_t lane) {
  const cpu::PreparedLayer& layer = job.layer();
  const cpu::CpuKernels& kernel = cpu::cpu_kernels();
  const int64_t slot = job.slot + row;
  float* x = hidden_row(w, job, row);
  load_row(layer, job.request->hidden, job.first_row + row, x);
  double squares;
  kernel.dot[0](&x, 1, x, layer.hidden_size, &squares);
  const float product = product_margin(layer, squares);
  RowMargin& margin = w.margin[slot];
  margin = {{product, 0}, {product, 0}};
  w.tally[lane].fallback_rows += std::isinf(product);
  if (job.choice.sparse == cpu::ScreenType::int8)
    kernel.quantise_row(cpu::Int8Layout(layer.hidden_size), x, job.choice.planes,
                        int8_row(w, job, row), w.rotated + lane * w.plan.int8_inputs);
  if (layer.copies.int16.defined()) {
    const cpu::Int16Scale scale =
        kernel.quantise_int16(x, layer.hidden_size, int16_row(w, job, row));
    w.int16_scale[slot] = scale;
    if (is_screened(margin)) margin.int16 = {scale.residual, scale.norm};
  }
  for (int64_t i = 0; i < w.plan.lanes; ++i) {
    TopList& list = list_of(w, job, row, i);
    const int64_t first = (&list - w.lists) * w.plan.capacity;
    list = {w.keys + first, w.open + first, 0, 0, 0, 0, 0};
  }
}

// The smallest screened score, without its bias, that can still reach the k-th best of the list:
// the same slack as Layer's.
float screen_bound(const Layer& layer, const TopList& list) {
  const double value = std::max(list.least == 0 ? 0 : cpu::key_value(list.least), list.open_least);
  if (value <= 0) return -std::numeric_limits<float>::infinity();
  return static_cast<float>(value - (value + layer.max_bias) * kth_best_rounding -
                            underflow(layer.hidden_size));
}

// Keeps each row's k best in the lane's lists.
struct TopSink {
  const Workspace& w;
  const Job& job;
  const int64_t lane, k;
  const Exact exact{job.layer()};

  TopList& list(int64_t row) const { return list_of(w, job, row, lane); }
  float bound(int64_t row) const { return screen_bound(job.layer(), list(row)); }
  int64_t& active(int64_t row) const { return list(row).certain; }
  void keep(int64_t row, int64_t feature, float value) const {
    list(row).push(cpu::make_key(value, feature), k, w.plan.capacity);
  }
  bool defer(int64_t row, const cpu::Bounded& feature) const {
    TopList& list = this->list(row);
    if (list.defer(feature, k, w.plan.capacity)) return true;
    compute_open(row, list, w.plan.capacity);
    return false;
  }

  // Computes what the list has left open.
  void compute_open(int64_t row, TopList& list, int64_t capacity) const {
    const float* x = hidden_row(w, job, row);
    for (int64_t i = 0; i < list.open_size; ++i) {
      if (i + 1 < list.open_size) fetch(exact.weights(list.open[i + 1].feature), exact.row_bytes());
      const int64_t feature = list.open[i].feature;
      list.push(cpu::make_key(exact.activation(x, feature), feature), k, capacity);
    }
    w.tally[lane].rescored += list.open_size;
    list.open_size = 0;
  }
};

// The k best of all lanes' lists, in no order, in the lane's room for them.
TopList merge_lists(const Workspace& w, const Job& job, int64_t row, int64_t lane, int64_t k) {
  const int64_t room = w.plan.lanes * w.plan.capacity;
  TopList all = {w.merged + lane * room, w.merged_open + lane * room, 0, 0, 0, 0, 0};
  for (int64_t i = 0; i < w.plan.lanes; ++i) {
    const TopList& list = list_of(w, job, row, i);
    all.size = std::copy(list.keys, list.keys + list.size, all.keys + all.size) - all.keys;
    all.open_size =
        std::copy(list.open, list.open + list.open_size, all.open + all.open_size) - all.open;
    all.certain += list.certain;
  }
  all.thin(k);
  TopSink{w, job, lane, k}.compute_open(row, all, room);
  all.cut(k);
  return all;
}

// Writes one row: the winners, then the lowest features that are not among them with activation 0.
void finish_row(const Workspace& w, const Job& job, int64_t row, int64_t lane) {
  const cpu::PreparedLayer& layer = job.layer();
  const Features& out = job.request->out;
  const int64_t k_out = job.request->k_out;
  const int64_t output_row = job.first_row + row;
  float* activations = out.activations.mutable_data_ptr<float>() + output_row * k_out;
  int64_t* indices = out.indices.mutable_data_ptr<int64_t>() + output_row * k_out;
  float* sparsity = out.sparsity.mutable_data_ptr<float>() + output_row;

  if (!is_finite(w.margin[job.slot + row])) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::fill(activations, activations + k_out, nan);
    for (int64_t i = 0; i < k_out; ++i) indices[i] = i;
    *sparsity = nan;
    return;
  }
  const TopList all = merge_lists(w, job, row, lane, job.request->k_filled());
  std::sort(all.keys, all.keys + all.size, std::greater<>());
  for (int64_t i = 0; i < all.size; ++i) {
    activations[i] = cpu::key_value(all.keys[i]);
    indices[i] = cpu::key_feature(all.keys[i]);
  }
  *sparsity = static_cast<float>(static_cast<double>(std::min(all.certain, layer.max_active)) /
                                 layer.features);

  if (all.size == k_out) return;
  auto* taken = reinterpret_cast<int64_t*>(
      all.keys);  // the keys are written out: their slots sort the winners' indices
  std::copy(indices, indices + all.size, taken);
  std::sort(taken, taken + all.size);
  for (int64_t slot = all.size, feature = 0, next = 0; slot < k_out; ++feature) {
    if (next < all.size && taken[next] == feature) {
      ++next;
      continue;
    }
    activations[slot] = 0;
    indices[slot++] = feature;
  }
}

// Runs the stages of a wave on the lanes. Units are computed from their numbers, so that nothing is
// allocated.
class Wave {
 public:
  // units: parts that a job's features are shared out in; 0 chooses.
  Wave(std::vector<Job>& jobs, const Workspace& w, Lanes& workers, int64_t units = 0)
      : jobs_(jobs),
        w_(w),
        workers_(workers),
        lanes_(at::in_parallel_region() ? 1
                                        : std::min<int64_t>(w.plan.lanes, at::get_num_threads())),
        rows_(jobs.back().slot + jobs.back().rows),
        // Enough to keep every lane busy to the end, though one be slowed by other work.
        units_(units > 0 ? units
                         : std::max<int64_t>(4, (4 * lanes_ + jobs.size() - 1) / jobs.size())) {
    for (Job& job : jobs) job.choice = choose_screen(job.layer().copies, job.rows);
  }

  // body(lane, job, row) for every row.
  template <typename Body>
  void by_rows(Phase phase, const Body& body) {
    workers_.run(
        lanes_, (rows_ + rows_per_unit - 1) / rows_per_unit, [&](int64_t lane, int64_t unit) {
          const int64_t last = std::min((unit + 1) * rows_per_unit, rows_);
          Stopwatch watch(w_.tally[lane], w_.timed);
          for (int64_t slot = unit * rows_per_unit; slot < last; ++slot) {
            const auto after =
                std::upper_bound(jobs_.begin(), jobs_.end(), slot,
                                 [](int64_t value, const Job& job) { return value < job.slot; });
            const Job& job = *std::prev(after);
            body(lane, job, slot - job.slot);
          }
          watch.add_to(phase);
        });
  }

  void prepare() {
    by_rows(prepare_phase,
            [this](int64_t lane, const Job& job, int64_t row) { prepare_row(w_, job, row, lane); });
  }

  // body(lane, unit) for every unit of every job.
  template <typename Body>
  void by_features(const Body& body) {
    workers_.run(
        lanes_, static_cast<int64_t>(jobs_.size()) * units_, [&](int64_t lane, int64_t index) {
          const Job& job = jobs_[index / units_];
          const int64_t number = index % units_, features = job.layer().features;
          const int64_t panels = (features + cpu::panel_features - 1) / cpu::panel_features;
          // Smaller and smaller, so that the lanes end together.
          const auto begin = [&](int64_t i) {
            const int64_t left = (units_ - i) * (units_ - i) * panels / (units_ * units_);
            return std::min((panels - left) * cpu::panel_features, features);
          };
          const Unit unit = {&job, begin(number), begin(number + 1)};
          if (unit.first < unit.last) body(lane, unit);
        });
  }

 private:
  std::vector<Job>& jobs_;
  const Workspace& w_;
  Lanes& workers_;
  const int64_t lanes_, rows_, units_;
};

void run_wave(std::vector<Job>& jobs, const Workspace& w, Lanes& workers) {
  Wave wave(jobs, w, workers);
  wave.prepare();
  wave.by_features([&](int64_t lane, const Unit& unit) {
    Scan(w, unit, lane, TopSink{w, *unit.job, lane, unit.job->request->k_filled()}).run();
  });
  wave.by_rows(finish_phase,
               [&](int64_t lane, const Job& job, int64_t row) { finish_row(w, job, row, lane); });
}

// Counts the active features of each row in the lane's lists.
struct CountSink {
  const Workspace& w;
  const Job& job;
  const int64_t lane;

  float bound(int64_t) const { return std::numeric_limits<float>::infinity(); }
  int64_t& active(int64_t row) const { return list_of(w, job, row, lane).certain; }
  void keep(int64_t, int64_t, float) const {}
  bool defer(int64_t, const cpu::Bounded&) const { return true; }
};

// Writes the active features of each row where they belong: one lane has all features of a row,
// ascending.
struct WriteSink {
  const Workspace& w;
  const Job& job;
  const int64_t lane;
  const SparseFeatures& out;

  float bound(int64_t) const { return -std::numeric_limits<float>::infinity(); }
  int64_t& active(int64_t row) const { return list_of(w, job, row, lane).certain; }
  bool defer(int64_t, const cpu::Bounded&) const { return false; }
  void keep(int64_t row, int64_t feature, float value) const {
    const int64_t* begin = out.row_begin.const_data_ptr<int64_t>() + job.first_row + row;
    const int64_t slot = begin[0] + list_of(w, job, row, lane).size++;
    if (slot >= begin[1])
      return;  // the caller has changed the hidden states since they were counted
    out.features.mutable_data_ptr<int64_t>()[slot] = feature;
    out.activations.mutable_data_ptr<float>()[slot] = value;
  }
};

// Rows [first, first + rows) of the request in jobs of nearly one size.
std::vector<Job> split(const Request& request, const cpu::PreparedLayer& layer, int64_t first,
                       int64_t rows, int64_t most_rows, int64_t least_parts) {
  const int64_t parts = std::max(least_parts, (rows + most_rows - 1) / most_rows);
  std::vector<Job> jobs;
  for (int64_t i = 0, slot = 0; i < parts; ++i) {
    const int64_t count = (rows - slot) / (parts - i);
    if (count > 0) jobs.push_back({&request, &layer, first + slot, count, slot, {}});
    slot += count;
  }
  return jobs;
}

// row_begin[1 + r] becomes row r's number of active features.
void count_active(std::vector<Job> jobs, const Workspace& w, Lanes& workers, int64_t* row_begin) {
  Wave wave(jobs, w, workers);
  wave.prepare();
  wave.by_features([&](int64_t lane, const Unit& unit) {
    Scan(w, unit, lane, CountSink{w, *unit.job, lane}).run();
  });
  for (const Job& job : jobs)
    for (int64_t row = 0; row < job.rows; ++row) {
      int64_t active = 0;
      for (int64_t lane = 0; lane < w.plan.lanes; ++lane)
        active += list_of(w, job, row, lane).certain;
      row_begin[1 + job.first_row + row] =
          is_finite(w.margin[job.slot + row]) ? std::min(active, job.layer().max_active) : 1;
    }
}

// The counts are known: the features and activations are written.
void write_active(std::vector<Job> jobs, const Workspace& w, Lanes& workers,
                  const SparseFeatures& out) {
  const cpu::PreparedLayer& layer = jobs.front().layer();
  const bool coder = layer.max_active < layer.features;  // top-k: keeps only its k largest
  Wave wave(jobs, w, workers, coder ? 0 : 1);
  wave.prepare();
  wave.by_features([&](int64_t lane, const Unit& unit) {
    if (coder)
      Scan(w, unit, lane, TopSink{w, *unit.job, lane, layer.max_active}).run();
    else
      Scan(w, unit, lane, WriteSink{w, *unit.job, lane, out}).run();
  });
  wave.by_rows(finish_phase, [&](int64_t lane, const Job& job, int64_t row) {
    const int64_t* begin = out.row_begin.const_data_ptr<int64_t>() + job.first_row + row;
    int64_t* features = out.features.mutable_data_ptr<int64_t>() + begin[0];
    float* activations = out.activations.mutable_data_ptr<float>() + begin[0];
    if (begin[0] == begin[1]) return;
    if (!is_finite(w.margin[job.slot + row])) {
      features[0] = 0;
      activations[0] = std::numeric_limits<float>::quiet_NaN();
    } else if (coder) {
      const TopList best = merge_lists(w, job, row, lane, layer.max_active);
      std::sort(best.keys, best.keys + best.size,
                [](uint64_t a, uint64_t b) { return cpu::key_feature(a) < cpu::key_feature(b); });
      for (int64_t i = 0; i < std::min(best.size, begin[1] - begin[0]); ++i) {
        features[i] = cpu::key_feature(best.keys[i]);
        activations[i] = cpu::key_value(best.keys[i]);
      }
    }
  });
}

// Rows a call works on at a time, and its buffers.
Plan plan_workspace(const std::map<int64_t, cpu::PreparedLayer>& layers, const Options& options) {
  Plan plan = {};
  plan.lanes = options.lanes > 0 ? options.lanes : at::get_num_threads();
  for (const auto& [id, layer] : layers) {
    plan.hidden_size = std::max(plan.hidden_size, layer.hidden_size);
    // encode_sparse keeps all that a top-k coder does.
    const int64_t kept = layer.kind == ActivationKind::topk
                             ? layer.max_active
                             : std::min(k_out(layer, options), layer.max_active);
    plan.top_k = std::max(plan.top_k, kept);
    plan.capacity = std::max(plan.capacity, cpu::list_capacity(kept, layer.features));
    plan.panel = std::max(plan.panel, std::min(panel_size, layer.features));
    if (layer.copies.int8.defined()) {
      const cpu::Int8Layout layout(layer.hidden_size);
      plan.int8_bytes = std::max(plan.int8_bytes, 2 * layout.row_bytes());
      plan.int8_inputs = std::max(plan.int8_inputs, layout.inputs);
    }
    if (layer.copies.int16.defined())
      plan.int16_stride = std::max(plan.int16_stride, cpu::int16_stride(layer.hidden_size));
  }
  const int64_t row_bytes =
      plan.lanes * plan.capacity * static_cast<int64_t>(sizeof(uint64_t) + sizeof(cpu::Bounded));
  plan.rows =
      std::clamp<int64_t>(list_bytes / std::max<int64_t>(1, row_bytes), 1, options.chunk_size);
  plan.block = std::min(block_rows, plan.rows);
  plan.job_rows = std::min(job_rows, plan.rows);
  return plan;
}

[[noreturn]] void refuse_sparse(const Layer& layer, int64_t row_count) {
  TORCH_CHECK_WITH(OutOfMemoryError, false, "layer ", layer.id,
                   ": out of memory: the result needs ", 8 * (row_count + 1),
                   " bytes and 12 for each active feature; fewer rows at a time need less, got ",
                   row_count);
}

class CpuBackend : public Backend {
 public:
  CpuBackend(const std::vector<const Layer*>& layers, const Options& options) {
    for (const Layer* layer : layers)
      layers_.emplace(layer->id, cpu::prepare_layer(*layer, options.screening));
    const Plan plan = plan_workspace(layers_, options);
    workspaces_ =
        std::make_unique<Pool<Workspace>>([plan] { return std::make_unique<Workspace>(plan); });
    workers_ = std::make_unique<Lanes>(plan.lanes - 1);
  }

  void encode(const std::vector<Request>& requests) const override {
    run(requests, *workspaces_->borrow());
  }

  SparseFeatures encode_sparse(const Request& request) const override;
  Explanation explain(const Request& request) const override;

  Memory memory() const override {
    Memory memory = {};
    for (const auto& [id, layer] : layers_) {
      if (!layer.W_enc.is_alias_of(layer.declared.W_enc))
        memory.weight_bytes += layer.W_enc.nbytes();
      memory.gate_bytes += layer.bounds.bytes(layer);
      memory.screening_bytes += layer.copies.bytes();
    }
    memory.workspace_bytes = workspaces_->bytes();
    return memory;
  }

 private:
  void run(std::vector<Request> requests, const Workspace& workspace) const;
  SparseFeatures write_sparse(const Request& request, const Workspace& workspace) const;

  std::map<int64_t, cpu::PreparedLayer> layers_;
  std::unique_ptr<Pool<Workspace>> workspaces_;
  std::unique_ptr<Lanes> workers_;
};

void CpuBackend::run(std::vector<Request> requests, const Workspace& workspace) const {
  // Largest first, so that no worker is left alone with a large layer at the end.
  std::stable_sort(requests.begin(), requests.end(), [](const Request& a, const Request& b) {
    const auto size = [](const Layer& layer) { return layer.features * layer.hidden_size; };
    return size(*a.layer) > size(*b.layer);
  });
  std::vector<Job> wave;
  const int64_t slots = workspace.plan.rows;
  int64_t used = 0;
  for (const Request& request : requests) {
    const int64_t rows = request.row_count();
    const int64_t chunks = (rows + workspace.plan.job_rows - 1) / workspace.plan.job_rows;
    for (int64_t chunk = 0, first = 0; chunk < chunks; ++chunk) {
      const int64_t count = (rows - first) / (chunks - chunk);
      if (used + count > slots) {
        run_wave(wave, workspace, *workers_);
        wave.clear();
        used = 0;
      }
      wave.push_back({&request, &layers_.at(request.layer->id), first, count, used, {}});
      used += count;
      first += count;
    }
  }
  if (!wave.empty()) run_wave(wave, workspace, *workers_);
}

Explanation CpuBackend::explain(const Request& request) const {
  const auto borrowed = workspaces_->borrow();
  Workspace& workspace = *borrowed;
  std::fill(workspace.tally, workspace.tally + workspace.plan.lanes, Tally{});
  workspace.timed = true;
  run({request}, workspace);
  workspace.timed = false;
  Explanation explanation = {};
  explanation.rows = request.row_count();
  explanation.features = request.layer->features;
  for (int64_t lane = 0; lane < workspace.plan.lanes; ++lane) {
    const Tally& tally = workspace.tally[lane];
    explanation.fallback_rows += tally.fallback_rows;
    explanation.pairs_float32 += tally.pairs[static_cast<int>(cpu::ScreenType::float32)];
    explanation.pairs_int16 += tally.pairs[static_cast<int>(cpu::ScreenType::int16)];
    explanation.pairs_int8 += tally.pairs[static_cast<int>(cpu::ScreenType::int8)];
    explanation.survivors += tally.survivors;
    explanation.ambiguous += tally.ambiguous;
    explanation.rescored += tally.rescored;
    explanation.prepare_ms += tally.ms[prepare_phase];
    explanation.screen_ms += tally.ms[screen_phase];
    explanation.refine_ms += tally.ms[refine_phase];
    explanation.rescore_ms += tally.ms[rescore_phase];
    explanation.finish_ms += tally.ms[finish_phase];
  }
  return explanation;
}

// Two passes: count, then write, so that nothing is held but the result.
SparseFeatures CpuBackend::write_sparse(const Request& request, const Workspace& workspace) const {
  const cpu::PreparedLayer& layer = layers_.at(request.layer->id);
  const int64_t rows = request.row_count(), slots = workspace.plan.rows,
                job_rows = workspace.plan.job_rows;
  const at::TensorOptions options = request.hidden.options().requires_grad(false);
  SparseFeatures out = {at::zeros({rows + 1}, options.dtype(at::kLong)), {}, {}};
  int64_t* row_begin = out.row_begin.mutable_data_ptr<int64_t>();
  for (int64_t first = 0; first < rows; first += slots)
    count_active(split(request, layer, first, std::min(slots, rows - first), job_rows, 1),
                 workspace, *workers_, row_begin);
  std::partial_sum(row_begin, row_begin + rows + 1, row_begin);
  out.features = at::empty({row_begin[rows]}, options.dtype(at::kLong));
  out.activations = at::empty({row_begin[rows]}, options.dtype(at::kFloat));
  for (int64_t first = 0; first < rows; first += slots)
    write_active(split(request, layer, first, std::min(slots, rows - first), job_rows,
                       2 * workspace.plan.lanes),
                 workspace, *workers_, out);
  return out;
}

SparseFeatures CpuBackend::encode_sparse(const Request& request) const {
  const auto workspace = workspaces_->borrow();
  try {
    return write_sparse(request, *workspace);
  } catch (const c10::Error&) {  // of at::empty
    refuse_sparse(*request.layer, request.row_count());
  } catch (const std::bad_alloc&) {
    refuse_sparse(*request.layer, request.row_count());
  }
}

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const std::vector<const Layer*>& layers,
                                          const Options& options) {
  return std::make_unique<CpuBackend>(layers, options);
}

}  // namespace sparse_transcoder
