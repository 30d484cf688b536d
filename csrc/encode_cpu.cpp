// The CPU encode path. A call is a sequence of waves; a wave holds as many rows, of one layer or of many, as the workspace has
// slots:
//
//   prepare   rows become float32, normed, with their error margin
//   scan      each lane streams over its features: screen a panel, gate the scores, compute the survivors exactly, keep the k
//   best finish    each row's lists are merged, sorted and written
//
// Whether a feature is active, and its value, are decided by the exact dot product alone; the screen only decides which of them
// are worth computing, and never rules out one that could count. So no result depends on chunks, panels, lanes or threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>

#include "encode.h"
#include "lanes.h"

namespace sparse_transcoder {
namespace {

using kernels::TopList;

constexpr int64_t panel_size = 512;       // features of a panel: its weights stay in L3
constexpr int64_t block_rows = 64;        // rows screened at a time: their scores stay in L2
constexpr int64_t rows_per_unit = 16;     // of prepare and finish
constexpr int64_t list_bytes = 32 << 20;  // rows in flight are cut so that their lists need no more

// Rows [first_row, first_row + rows) of one request, in slots [slot, slot + rows).
struct Job {
  const Request* request;
  int64_t first_row, rows, slot, groups;

  const Layer& layer() const { return *request->layer; }
};

// Features [first, last) of a job, whose lists are those of the group.
struct Unit {
  const Job* job;
  int64_t first, last, group;
};

float* hidden_row(const Workspace& w, const Job& job, int64_t row) {
  return w.hidden + (job.slot * w.plan.hidden_size) + row * job.layer().hidden_size;
}

TopList& list_of(const Workspace& w, const Job& job, int64_t row, int64_t group) {
  return w.lists[(job.slot + row) * w.plan.lanes + group];
}

// x = norm(h) in float32, from any dtype and stride.
void load_row(const Layer& layer, const at::Tensor& hidden, int64_t row, float* x) {
  const int64_t size = layer.hidden_size, stride = hidden.stride(2);
  const int64_t offset = row / hidden.size(1) * hidden.stride(0) + row % hidden.size(1) * hidden.stride(1);
  const auto dtype = kernel_dtype(hidden.scalar_type());
  const auto* source = static_cast<const char*>(hidden.const_data_ptr()) + offset * hidden.element_size();
  const auto widen = kernels::cpu_kernels().widen[static_cast<int>(dtype)];
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
    for (int64_t i = 0; i < size; ++i) x[i] = static_cast<float>((x[i] - mean) * scale * weight[i] + bias[i]);
  }
}

// Bound on |float32 product - exact| per unit of ||w||: gamma_H ||x||, whatever the order of its additions (Higham, Accuracy and
// Stability of Numerical Algorithms, 3.1, with Cauchy-Schwarz). NaN for a row that is not finite; infinite, so that nothing is
// ruled out, for one so large that the product could overflow.
float product_margin(const Layer& layer, double squared_norm) {
  if (!std::isfinite(squared_norm)) return std::numeric_limits<float>::quiet_NaN();
  const double roundoff = (layer.hidden_size + 8) * 0x1p-24;
  if (roundoff > 0.5) return std::numeric_limits<float>::infinity();
  const double norm = std::max<double>(std::sqrt(squared_norm) * (1 + 0x1p-20), std::numeric_limits<float>::min());
  if (norm * layer.largest_norm > 1e37) return std::numeric_limits<float>::infinity();
  return static_cast<float>(roundoff / (1 - roundoff) * norm * (1 + 0x1p-20));
}

void prepare_row(const Workspace& w, const Job& job, int64_t row) {
  const Layer& layer = job.layer();
  const auto dot = kernels::cpu_kernels().dot[static_cast<int>(kernels::Dtype::float32)];
  float* x = hidden_row(w, job, row);
  load_row(layer, job.request->hidden, job.first_row + row, x);
  w.margin[job.slot + row] = product_margin(layer, dot(x, x, layer.hidden_size));
  for (int64_t group = 0; group < job.groups; ++group) {
    TopList& list = list_of(w, job, row, group);
    list = {w.keys + (&list - w.lists) * w.plan.capacity, 0, 0, 0};
  }
}

struct ExactDot {
  const Layer& layer;
  double (*dot)(const float*, const void*, int64_t);
  const char* weights;
  int64_t row_bytes;
  kernels::Gate gate;

  explicit ExactDot(const Layer& layer)
      : layer(layer),
        dot(kernels::cpu_kernels().dot[static_cast<int>(layer.dtype)]),
        weights(static_cast<const char*>(layer.W_enc.const_data_ptr())),
        row_bytes(layer.hidden_size * layer.W_enc.element_size()),
        gate(layer.gate_at(0)) {}

  float activation(int64_t feature, const float* x) const {
    return static_cast<float>(dot(x, weights + feature * row_bytes, layer.hidden_size) + gate.bias[feature]);
  }
};

// The smallest screened score, without its bias, that can still reach the k-th best of the list: the same slack as Layer's.
float screen_bound(const Layer& layer, const TopList& list) {
  if (list.least == 0) return -std::numeric_limits<float>::infinity();
  const double value = kernels::key_value(list.least);
  return static_cast<float>(value - (value + layer.largest_bias) * 0x1p-20 - layer.hidden_size * 0x1p-125);
}

// Streams over the unit's features for all rows of its job. keep(row, feature, activation) gets every active feature, ascending
// in each row, whose activation can reach bound(row); count(row) is the row's counter of active features.
template <typename Bound, typename Count, typename Keep>
void scan(const Workspace& w, const Unit& unit, int64_t lane, const Bound& bound, const Count& count, const Keep& keep) {
  const Job& job = *unit.job;
  const Layer& layer = job.layer();
  const ExactDot exact(layer);
  const kernels::CpuKernels& kernel = kernels::cpu_kernels();
  float* scores = w.scores + lane * w.plan.block * w.plan.panel;
  uint32_t* candidates = w.candidates + lane * w.plan.panel;
  const auto product = kernel.product[static_cast<int>(layer.dtype)];
  for (int64_t first = unit.first; first < unit.last; first += w.plan.panel) {
    const int64_t width = std::min(w.plan.panel, unit.last - first);
    const kernels::Gate gate = layer.gate_at(first);
    for (int64_t row = 0; row < job.rows; ++row) {
      const float* x = hidden_row(w, job, row);
      const int64_t in_block = row % block_rows;
      if (in_block == 0)
        product(x, std::min(block_rows, job.rows - row), exact.weights + first * exact.row_bytes, width, layer.hidden_size,
                scores);
      const float margin = w.margin[job.slot + row];
      if (std::isnan(margin)) continue;
      int64_t& active = count(row);
      const int64_t found = kernel.candidates(scores + in_block * width, gate, width, margin, bound(row), candidates, &active);
      for (int64_t i = 0; i < found; ++i) {
        const int64_t feature = first + (candidates[i] >> 1);
        const float value = exact.activation(feature, x);
        if (!(value >= exact.gate.gate[feature])) continue;
        active += candidates[i] & 1;  // the others are counted already
        keep(row, feature, value);
      }
    }
  }
}

void scan_top(const Workspace& w, const Unit& unit, int64_t lane) {
  const Layer& layer = unit.job->layer();
  const auto list = [&](int64_t row) -> TopList& { return list_of(w, *unit.job, row, unit.group); };
  scan(
      w, unit, lane, [&](int64_t row) { return screen_bound(layer, list(row)); },
      [&](int64_t row) -> int64_t& { return list(row).certain; },
      [&](int64_t row, int64_t feature, float value) {
        list(row).push(kernels::make_key(value, feature), layer.selected, w.plan.capacity);
      });
}

// Writes one row: the winners, then the lowest features that are not among them with activation 0.
void finish_row(const Workspace& w, const Job& job, int64_t row, uint64_t* merged) {
  const Layer& layer = job.layer();
  const Features& out = job.request->out;
  const int64_t output_row = job.first_row + row;
  float* activations = out.activations.mutable_data_ptr<float>() + output_row * layer.top_k;
  int64_t* indices = out.indices.mutable_data_ptr<int64_t>() + output_row * layer.top_k;
  float* sparsity = out.sparsity.mutable_data_ptr<float>() + output_row;

  if (std::isnan(w.margin[job.slot + row])) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::fill(activations, activations + layer.top_k, nan);
    for (int64_t i = 0; i < layer.top_k; ++i) indices[i] = i;
    *sparsity = nan;
    return;
  }
  TopList all = {merged, 0, 0, 0};
  for (int64_t group = 0; group < job.groups; ++group) {
    TopList& list = list_of(w, job, row, group);
    list.cut(layer.selected);
    std::copy(list.keys, list.keys + list.size, all.keys + all.size);
    all.size += list.size;
    all.certain += list.certain;
  }
  all.cut(layer.selected);
  std::sort(all.keys, all.keys + all.size, std::greater<>());
  for (int64_t i = 0; i < all.size; ++i) {
    activations[i] = kernels::key_value(all.keys[i]);
    indices[i] = kernels::key_feature(all.keys[i]);
  }
  *sparsity = static_cast<float>(static_cast<double>(std::min(all.certain, layer.most_active)) / layer.features);

  if (all.size == layer.top_k) return;
  auto* taken = reinterpret_cast<int64_t*>(merged);  // the keys are written out: their slots sort the winners' indices
  std::copy(indices, indices + all.size, taken);
  std::sort(taken, taken + all.size);
  for (int64_t slot = all.size, feature = 0, next = 0; slot < layer.top_k; ++feature) {
    if (next < all.size && taken[next] == feature) {
      ++next;
      continue;
    }
    activations[slot] = 0;
    indices[slot++] = feature;
  }
}

// Runs the stages of a wave on the lanes. Units are computed from their numbers, so that nothing is allocated.
class Wave {
 public:
  Wave(std::vector<Job>& jobs, const Workspace& w, Lanes& workers)
      : jobs_(jobs),
        workers_(workers),
        lanes_(at::in_parallel_region() ? 1 : std::min<int64_t>(w.plan.lanes, at::get_num_threads())),
        rows_(jobs.back().slot + jobs.back().rows),
        // Enough units to keep every lane busy; few groups make fewer lists to fill and merge.
        groups_(std::min<int64_t>(lanes_, (4 * lanes_ + jobs.size() - 1) / jobs.size())) {
    for (Job& job : jobs) job.groups = groups_;
  }

  int64_t groups() const { return groups_; }

  // body(lane, job, row) for every row.
  template <typename Body>
  void by_rows(const Body& body) {
    workers_.run(lanes_, (rows_ + rows_per_unit - 1) / rows_per_unit, [&](int64_t lane, int64_t unit) {
      const int64_t last = std::min((unit + 1) * rows_per_unit, rows_);
      for (int64_t slot = unit * rows_per_unit; slot < last; ++slot) {
        const auto after =
            std::upper_bound(jobs_.begin(), jobs_.end(), slot, [](int64_t value, const Job& job) { return value < job.slot; });
        const Job& job = *std::prev(after);
        body(lane, job, slot - job.slot);
      }
    });
  }

  // body(lane, unit) for every job and group of features.
  template <typename Body>
  void by_features(const Body& body) {
    workers_.run(lanes_, static_cast<int64_t>(jobs_.size()) * groups_, [&](int64_t lane, int64_t unit) {
      const Job& job = jobs_[unit / groups_];
      const int64_t group = unit % groups_, share = (job.layer().features + groups_ * 16 - 1) / (groups_ * 16) * 16;
      body(lane, Unit{&job, group * share, std::min((group + 1) * share, job.layer().features), group});
    });
  }

 private:
  std::vector<Job>& jobs_;
  Lanes& workers_;
  const int64_t lanes_, rows_, groups_;
};

void run_wave(std::vector<Job>& jobs, const Workspace& w, Lanes& workers) {
  Wave wave(jobs, w, workers);
  wave.by_rows([&](int64_t, const Job& job, int64_t row) { prepare_row(w, job, row); });
  wave.by_features([&](int64_t lane, const Unit& unit) { scan_top(w, unit, lane); });
  wave.by_rows([&](int64_t lane, const Job& job, int64_t row) {
    finish_row(w, job, row, w.merged + lane * w.plan.lanes * w.plan.capacity);
  });
}

// Every active feature of a chunk of rows, row after row, features ascending.
struct ChunkFeatures {
  std::vector<int64_t> counts;  // [rows]
  std::vector<int32_t> features;
  std::vector<float> values;
};

struct Active {
  int32_t row, feature;
  float value;
};

ChunkFeatures encode_sparse_chunk(std::vector<Job>& jobs, const Workspace& w, Lanes& workers) {
  const Job& job = jobs.front();
  const Layer& layer = job.layer();
  Wave wave(jobs, w, workers);
  std::vector<std::vector<Active>> found(wave.groups());
  wave.by_rows([&](int64_t, const Job& job, int64_t row) { prepare_row(w, job, row); });
  wave.by_features([&](int64_t lane, const Unit& unit) {
    scan(
        w, unit, lane, [](int64_t) { return -std::numeric_limits<float>::infinity(); },
        [&](int64_t row) -> int64_t& { return list_of(w, job, row, unit.group).certain; },
        [&](int64_t row, int64_t feature, float value) {
          found[unit.group].push_back({static_cast<int32_t>(row), static_cast<int32_t>(feature), value});
        });
  });
  ChunkFeatures chunk;
  std::vector<int64_t> next(job.rows + 1);
  for (const auto& group : found)
    for (const Active& active : group) ++next[active.row + 1];
  for (int64_t row = 0; row < job.rows; ++row) {
    if (std::isnan(w.margin[job.slot + row])) next[row + 1] = 1;
    next[row + 1] += next[row];
  }
  chunk.features.resize(next.back());
  chunk.values.resize(next.back());
  for (int64_t row = 0; row < job.rows; ++row)
    if (std::isnan(w.margin[job.slot + row])) chunk.values[next[row]] = std::numeric_limits<float>::quiet_NaN();
  std::vector<int64_t> begin = next;
  for (const auto& group : found)
    for (const Active& active : group) {
      const int64_t slot = next[active.row]++;
      chunk.features[slot] = active.feature;
      chunk.values[slot] = active.value;
    }
  chunk.counts.resize(job.rows);
  for (int64_t row = 0; row < job.rows; ++row) chunk.counts[row] = begin[row + 1] - begin[row];
  if (layer.most_active == layer.features) return chunk;

  // A top-k coder keeps only its k largest.
  std::vector<uint64_t> keys;
  int64_t out = 0;
  for (int64_t row = 0; row < job.rows; ++row) {
    const int64_t first = begin[row], last = begin[row + 1];
    uint64_t least = 0;
    if (last - first > layer.most_active) {
      keys.clear();
      for (int64_t i = first; i < last; ++i) keys.push_back(kernels::make_key(chunk.values[i], chunk.features[i]));
      std::nth_element(keys.begin(), keys.begin() + layer.most_active - 1, keys.end(), std::greater<>());
      least = keys[layer.most_active - 1];
    }
    const int64_t row_begin = out;
    for (int64_t i = first; i < last; ++i) {
      if (least != 0 && kernels::make_key(chunk.values[i], chunk.features[i]) < least) continue;
      chunk.features[out] = chunk.features[i];
      chunk.values[out++] = chunk.values[i];
    }
    chunk.counts[row] = out - row_begin;
  }
  chunk.features.resize(out);
  chunk.values.resize(out);
  return chunk;
}

}  // namespace

Plan plan_cpu(const std::vector<const Layer*>& layers, const Options& options) {
  Plan plan = {};
  plan.lanes = options.lanes > 0 ? options.lanes : at::get_num_threads();
  for (const Layer* layer : layers) {
    plan.hidden_size = std::max(plan.hidden_size, layer->hidden_size);
    plan.top_k = std::max(plan.top_k, layer->selected);
    plan.capacity = std::max(plan.capacity, kernels::list_capacity(layer->selected, layer->features));
    plan.panel = std::max(plan.panel, std::min(panel_size, layer->features));
  }
  const int64_t row_bytes = plan.lanes * plan.capacity * static_cast<int64_t>(sizeof(uint64_t));
  plan.rows = std::clamp<int64_t>(list_bytes / std::max<int64_t>(1, row_bytes), 1, options.chunk_size);
  plan.block = std::min(block_rows, plan.rows);
  return plan;
}

void encode_cpu(const std::vector<Request>& requests, const Workspace& workspace, Lanes& workers) {
  std::vector<Job> wave;
  const int64_t slots = workspace.plan.rows;
  int64_t used = 0;
  for (const Request& request : requests) {
    const int64_t rows = request.rows();
    const int64_t chunks = (rows + slots - 1) / slots;
    for (int64_t chunk = 0, first = 0; chunk < chunks; ++chunk) {
      const int64_t count = (rows - first) / (chunks - chunk);
      if (used + count > slots) {
        run_wave(wave, workspace, workers);
        wave.clear();
        used = 0;
      }
      wave.push_back({&request, first, count, used, 0});
      used += count;
      first += count;
    }
  }
  if (!wave.empty()) run_wave(wave, workspace, workers);
}

SparseFeatures encode_sparse_cpu(const Request& request, const Workspace& workspace, Lanes& workers) {
  const int64_t rows = request.rows(), slots = workspace.plan.rows;
  const at::TensorOptions options = request.hidden.options().requires_grad(false);
  SparseFeatures out = {at::zeros({rows + 1}, options.dtype(at::kLong)), {}, {}};
  int64_t* row_begin = out.row_begin.mutable_data_ptr<int64_t>();
  std::deque<ChunkFeatures> chunks;
  for (int64_t first = 0; first < rows; first += slots) {
    std::vector<Job> jobs = {{&request, first, std::min(slots, rows - first), 0, 0}};
    chunks.push_back(encode_sparse_chunk(jobs, workspace, workers));
    for (const int64_t count : chunks.back().counts) {
      row_begin[1] = row_begin[0] + count;
      ++row_begin;
    }
  }
  out.features = at::empty({*row_begin}, options.dtype(at::kLong));
  out.activations = at::empty({*row_begin}, options.dtype(at::kFloat));
  int64_t* features = out.features.mutable_data_ptr<int64_t>();
  float* activations = out.activations.mutable_data_ptr<float>();
  for (; !chunks.empty(); chunks.pop_front()) {  // each is freed once copied: the result is never held twice
    features = std::copy(chunks.front().features.begin(), chunks.front().features.end(), features);
    activations = std::copy(chunks.front().values.begin(), chunks.front().values.end(), activations);
  }
  return out;
}

}  // namespace sparse_transcoder
