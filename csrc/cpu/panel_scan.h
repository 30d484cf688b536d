// One lane streams over its features for all rows of a job, panel after panel:
//
//   screen    approximate products; a pair whose upper bound misses its gate is gone. int8, int16
//   or float32 (screening.h) refine    what survived int8 is multiplied again in int16: sure pairs
//   are counted, those under the running k-th best are gone rescore   the rest is computed exactly.
//   This value alone decides whether a feature is active, and its rank
//
// No stage rules out a pair that could count, so the result does not depend on the arithmetic, the
// panels or their order.
#pragma once

#include <ATen/ATen.h>

#include <chrono>
#include <cmath>
#include <limits>
#include <utility>

#include "backend.h"
#include "bounds.h"
#include "cpu/screen.h"
#include "cpu/workspace.h"

namespace sparse_transcoder {

// Rows [first_row, first_row + rows) of one request, in slots [slot, slot + rows).
struct Job {
  const Request* request;
  const cpu::PreparedLayer* prepared;
  int64_t first_row, rows, slot;
  cpu::ScreenChoice choice;

  const cpu::PreparedLayer& layer() const { return *prepared; }
};

// Features [first, last) of a job; `first` is at a panel's begin.
struct Unit {
  const Job* job;
  int64_t first, last;
};

inline float* hidden_row(const Workspace& w, const Job& job, int64_t row) {
  return w.hidden + job.slot * w.plan.hidden_size + row * job.layer().hidden_size;
}
inline int8_t* int8_row(const Workspace& w, const Job& job, int64_t row) {
  return w.int8 + job.slot * w.plan.int8_bytes +
         row * job.choice.planes * cpu::Int8Layout(job.layer().hidden_size).row_bytes();
}
inline int16_t* int16_row(const Workspace& w, const Job& job, int64_t row) {
  return w.int16 + job.slot * w.plan.int16_stride +
         row * cpu::int16_stride(job.layer().hidden_size);
}
inline bool is_finite(const RowMargin& margin) { return !std::isnan(margin.float32.per_norm); }
inline bool is_screened(const RowMargin& margin) { return std::isfinite(margin.float32.per_norm); }

enum Phase { prepare_phase, screen_phase, refine_phase, rescore_phase, finish_phase };

// Adds the time since the last call to a phase, where a call is to be explained.
class Stopwatch {
 public:
  Stopwatch(Tally& tally, bool running) : tally_(tally), running_(running) { last_ = now(); }
  void add_to(Phase phase) {
    if (!running_) return;
    const Clock::time_point time = now();
    tally_.ms[phase] += std::chrono::duration<double, std::milli>(time - last_).count();
    last_ = time;
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point now() const { return running_ ? Clock::now() : Clock::time_point(); }
  Tally& tally_;
  const bool running_;
  Clock::time_point last_;
};

struct SurvivorList {
  Survivor* pairs;
  int64_t size;

  void push(Survivor survivor) { pairs[size++] = survivor; }
};

// Computes a layer's activations exactly.
class Exact {
 public:
  explicit Exact(const cpu::PreparedLayer& layer)
      : dot_(cpu::cpu_kernels().dot[static_cast<int>(layer.dtype)]),
        weights_(static_cast<const char*>(layer.W_enc.const_data_ptr())),
        bias_(layer.bias.const_data_ptr<float>()),
        size_(layer.hidden_size),
        row_bytes_(layer.hidden_size * layer.W_enc.element_size()) {}

  // Of up to dot_rows rows.
  void activations(const float* const* x, int64_t rows, int64_t feature, float* values) const {
    double sums[cpu::dot_rows];
    dot_(x, rows, weights(feature), size_, sums);
    for (int64_t r = 0; r < rows; ++r) values[r] = static_cast<float>(sums[r] + bias_[feature]);
  }
  float activation(const float* x, int64_t feature) const {
    float value;
    activations(&x, 1, feature, &value);
    return value;
  }
  const char* weights(int64_t feature) const { return weights_ + feature * row_bytes_; }
  int64_t row_bytes() const { return row_bytes_; }

 private:
  void (*dot_)(const float* const*, int64_t, const void*, int64_t, double*);
  const char* weights_;
  const float* bias_;
  int64_t size_, row_bytes_;
};

// Starts to bring memory into the cache.
inline void fetch(const void* begin, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(begin) + i, 0, 2);
}

// Sink: keep(row, feature, activation) gets every active feature, ascending in each row, whose
// activation can reach bound(row), but for those that defer(row, feature with its bounds) takes
// over; active(row) is the row's counter of active features.
template <typename Sink>
class Scan {
 public:
  Scan(const Workspace& w, const Unit& unit, int64_t lane, Sink sink)
      : w_(w),
        unit_(unit),
        job_(*unit.job),
        layer_(job_.layer()),
        sink_(sink),
        kernel_(cpu::cpu_kernels()),
        layout_(layer_.hidden_size),
        gate_(layer_.bounds.from(layer_, 0)),
        margin_(w.margin + job_.slot),
        scale_(w.int16_scale + job_.slot),
        exact_(layer_),
        scores_(w.scores + lane * w.plan.scores()),
        candidates_(w.candidates + lane * w.plan.panel),
        masks_(w.masks + lane * w.plan.job_rows),
        packed_(w.packed + lane * cpu::panel_features * w.plan.int16_stride),
        tally_(w.tally[lane]),
        watch_(tally_, w.timed) {
    Survivor* survivors = w.survivors + lane * 3 * w.plan.survivors();
    for (SurvivorList* list : {&fresh_, &refined_, &spare_}) {
      *list = {survivors, 0};
      survivors += w.plan.survivors();
    }
    if (layer_.copies.int16.defined()) {
      int16_ = layer_.copies.int16.template const_data_ptr<int16_t>();
      int16_scale_ = layer_.copies.int16_scale.template const_data_ptr<float>();
      int16_residual_ = layer_.copies.int16_error.template const_data_ptr<float>();
    }
  }

  void run() {
    // A panel with many survivors goes through the dense screen, with the next ones; then int8 is
    // tried again.
    constexpr int64_t retry = 15;
    const cpu::ScreenChoice choice = job_.choice;
    const int64_t wide =
        choice.sparse == cpu::ScreenType::float32 ? w_.plan.panel : cpu::panel_features;
    int64_t dense_panels = 0;
    for (int64_t first = unit_.first; first < unit_.last; first += wide) {
      const int64_t count = std::min(wide, unit_.last - first);
      if (choice.sparse == cpu::ScreenType::int8 && dense_panels == 0) {
        if (!screen_int8(first, count)) dense_panels = retry;
      } else {
        screen_densely(first, count);
        if (dense_panels > 0) --dense_panels;
      }
    }
    settle();
  }

 private:
  // False where too many pairs survived int8: the rows have had the dense screen instead. Survivors
  // wait for the next panel to be refined, and for the one after that to be rescored: meanwhile
  // what this reads of their features is on its way from memory.
  bool screen_int8(int64_t first, int64_t count) {
    const auto* panel = layer_.copies.int8.template const_data_ptr<uint8_t>() +
                        first / cpu::panel_features * layout_.panel_bytes();
    const uint64_t all = count == cpu::panel_features ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    const int64_t rows = job_.rows;
    look_ahead(first + count < unit_.last ? panel + layout_.panel_bytes() : nullptr);
    kernel_.screen_int8(layout_, int8_row(w_, job_, 0), rows, job_.choice.planes, panel,
                        gate_.surely_out_below + first, masks_, ahead_);
    for (int64_t row = 0; row < rows; ++row) {
      const RowMargin& margin = margin_[row];
      for (uint64_t mask = is_screened(margin) ? masks_[row] & all
                           : is_finite(margin) ? all
                                               : 0;
           mask != 0; mask &= mask - 1) {
        const auto feature = static_cast<uint32_t>(first + __builtin_ctzll(mask));
        spare_.push({static_cast<int32_t>(row), feature << 1 | 1});
      }
    }
    watch_.add_to(screen_phase);
    if (spare_.size > job_.choice.dense_share * static_cast<double>(rows * count)) {
      spare_.size = 0;
      settle();
      screen_densely(first, count);
      return false;
    }
    tally_.pairs[static_cast<int>(cpu::ScreenType::int8)] += rows * count;
    tally_.survivors += spare_.size;
    advance(first, count);
    return true;
  }

  // Rescores what is refined, refines what is fresh, and takes what is in spare_, of features
  // [first, first + count), as fresh.
  void advance(int64_t first, int64_t count) {
    rescore(refined_);
    watch_.add_to(rescore_phase);
    sort(spare_, first, count, refined_);
    std::swap(refined_, fresh_);
    if (int16_) refine(refined_);
    watch_.add_to(refine_phase);
  }

  void settle() {
    advance(0, 0);
    advance(0, 0);
  }

  // Moves pairs of features [first, first + count) by feature, so that what is read of one serves
  // many rows. The rows of a feature keep their order.
  void sort(SurvivorList& from, int64_t first, int64_t count, SurvivorList& to) {
    uint32_t* begin = candidates_;
    std::fill(begin, begin + count, 0);
    for (int64_t i = 0; i < from.size; ++i) ++begin[from.pairs[i].id() - first];
    for (int64_t f = 0, sum = 0; f < count; ++f)
      sum += std::exchange(begin[f], static_cast<uint32_t>(sum));
    for (int64_t i = 0; i < from.size; ++i)
      to.pairs[begin[from.pairs[i].id() - first]++] = from.pairs[i];
    to.size = std::exchange(from.size, 0);
  }

  // Pairs of the list from i on that are of one feature, up to dot_rows.
  int64_t alike(const SurvivorList& list, int64_t i) const {
    const int64_t most = std::min(list.size - i, cpu::dot_rows), feature = list.pairs[i].id();
    int64_t count = 1;
    while (count < most && list.pairs[i + count].id() == feature) ++count;
    return count;
  }

  void look_ahead(const uint8_t* next_panel) {
    constexpr int64_t many_rows = 7;  // with fewer, the screen itself is a stream through memory
    ahead_.clear();
    const int64_t stride = cpu::int16_stride(layer_.hidden_size);
    const auto add_each = [&](const SurvivorList& list, const char* rows, int64_t row_bytes) {
      uint64_t added = 0;  // a list is of one panel
      for (int64_t i = 0; i < list.size; ++i) {
        const int64_t feature = list.pairs[i].id();
        const uint64_t bit = uint64_t{1} << feature % cpu::panel_features;
        if (!(added & bit)) ahead_.add(rows + feature * row_bytes, row_bytes);
        added |= bit;
      }
    };
    add_each(refined_, exact_.weights(0), exact_.row_bytes());
    if (int16_)
      add_each(fresh_, reinterpret_cast<const char*>(int16_), 2 * stride);
    else
      add_each(fresh_, exact_.weights(0), exact_.row_bytes());
    if (next_panel && job_.rows * job_.choice.planes >= many_rows)
      ahead_.add(next_panel, layout_.panel_bytes());
  }

  // Leaves those that int16 cannot settle: as CpuKernels::candidates does, for pairs from all over.
  void refine(SurvivorList& list) {
    const int64_t size = layer_.hidden_size, stride = cpu::int16_stride(size);
    const int16_t* rows = int16_row(w_, job_, 0);
    auto* products = reinterpret_cast<int64_t*>(scores_);
    for (int64_t i = 0, count = 0; i < list.size; i += count) {
      count = alike(list, i);
      const int16_t* x[cpu::dot_rows];
      for (int64_t j = 0; j < count; ++j) x[j] = rows + list.pairs[i + j].row * stride;
      kernel_.dot_int16(x, count, int16_ + list.pairs[i].id() * stride, size, products + i);
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < list.size; ++i) {
      const int64_t row = list.pairs[i].row, feature = list.pairs[i].id();
      const float score =
          static_cast<float>(products[i]) * (scale_[row].scale * int16_scale_[feature]);
      const Margin margin = margin_[row].int16;
      const float slack =
          margin.per_norm * gate_.norm[feature] + margin.per_residual * int16_residual_[feature];
      const float upper = score + slack;
      const bool sure = score - slack >= gate_.surely_in_from[feature];
      list.pairs[kept] = {list.pairs[i].row, static_cast<uint32_t>(feature << 1) | !sure};
      kept += !(upper < gate_.surely_out_below[feature]);  // as likely as not: no branch
      if (!sure) continue;
      ++sink_.active(row);
      if (upper < sink_.bound(row) - gate_.bias[feature]) --kept;
    }
    list.size = kept;
  }

  // Computes the pairs exactly, and keeps those that are active.
  void rescore(SurvivorList& list) {
    for (int64_t i = 0, count = 0; i < list.size; i += count) {
      count = alike(list, i);
      const float* x[cpu::dot_rows];
      for (int64_t j = 0; j < count; ++j) x[j] = hidden_row(w_, job_, list.pairs[i + j].row);
      const int64_t feature = list.pairs[i].id();
      float values[cpu::dot_rows];
      exact_.activations(x, count, feature, values);
      for (int64_t j = 0; j < count; ++j) {
        const bool ambiguous = list.pairs[i + j].feature & 1;
        tally_.ambiguous += ambiguous;
        if (!(values[j] >= gate_.min_active[feature])) continue;
        sink_.active(list.pairs[i + j].row) += ambiguous;  // the others are counted already
        sink_.keep(list.pairs[i + j].row, feature, values[j]);
      }
    }
    tally_.rescored += list.size;
    list.size = 0;
  }

  // A panel in the arithmetic that does not care how many survive. No pair waits here, nor may any
  // from before.
  void screen_densely(int64_t first, int64_t count) {
    tally_.pairs[static_cast<int>(job_.choice.dense)] += job_.rows * count;
    if (job_.choice.dense == cpu::ScreenType::int16)
      screen_int16(first, count);
    else
      screen_float32(first, count);
  }

  void screen_int16(int64_t first, int64_t count) {
    const int64_t stride = cpu::int16_stride(layer_.hidden_size),
                  next = first + cpu::panel_features;
    ahead_.clear();
    if (busy_) ahead_.add(exact_.weights(first), count * exact_.row_bytes());
    if (next < unit_.last)
      ahead_.add(reinterpret_cast<const char*>(int16_ + next * stride),
                 2 * stride * std::min(cpu::panel_features, unit_.last - next));
    kernel_.product_int16(int16_row(w_, job_, 0), scale_, job_.rows, int16_ + first * stride,
                          int16_scale_ + first, count, layer_.hidden_size, packed_, scores_,
                          ahead_);
    watch_.add_to(screen_phase);
    const int64_t before = tally_.rescored;
    for (int64_t row = 0; row < job_.rows; ++row)
      gate(row, scores_ + row * cpu::panel_features, first, count, int16_residual_ + first,
           margin_[row].int16);
    rescore_spare(first, count);
    busy_ = tally_.rescored - before >= count;
    watch_.add_to(rescore_phase);
  }

  void screen_float32(int64_t first, int64_t count) {
    const auto product = kernel_.product[static_cast<int>(layer_.dtype)];
    for (int64_t begin = 0; begin < job_.rows; begin += w_.plan.block) {
      const int64_t rows = std::min(w_.plan.block, job_.rows - begin);
      product(hidden_row(w_, job_, begin), rows, exact_.weights(first), count, layer_.hidden_size,
              scores_);
      watch_.add_to(screen_phase);
      for (int64_t r = 0; r < rows; ++r)
        gate(begin + r, scores_ + r * count, first, count, gate_.norm + first,
             margin_[begin + r].float32);
      rescore_spare(first, count);
      watch_.add_to(rescore_phase);
    }
  }

  // What is to be computed of the row goes into spare_.
  void gate(int64_t row, const float* scores, int64_t first, int64_t count, const float* residual,
            Margin margin) {
    if (!is_finite(margin_[row])) return;
    if (spare_.size + count > w_.plan.survivors()) rescore_spare(first, count);
    const FeatureBounds gate = {gate_.norm + first, gate_.bias + first, gate_.min_active + first,
                                gate_.surely_out_below + first, gate_.surely_in_from + first};
    const int64_t found = kernel_.candidates(scores, gate, residual, count, margin,
                                             sink_.bound(row), candidates_, &sink_.active(row));
    for (int64_t i = 0; i < found; ++i) {
      const int64_t position = candidates_[i] >> 1, feature = first + position;
      const bool ambiguous = candidates_[i] & 1;
      if (!ambiguous) {
        // A feature surely active waits for a better bound. Its own bounds allow for their
        // roundings as Layer's do.
        const float slack =
            margin.per_norm * gate_.norm[feature] + margin.per_residual * residual[position];
        const double value = double{scores[position]} + gate_.bias[feature];
        const double rounding =
            (std::abs(value) + slack + layer_.max_bias) * 0x1p-20 + underflow(layer_.hidden_size);
        if (sink_.defer(row, {static_cast<float>(value - slack - rounding),
                              static_cast<float>(value + slack + rounding),
                              static_cast<uint32_t>(feature)}))
          continue;
      }
      spare_.push({static_cast<int32_t>(row), static_cast<uint32_t>(feature << 1) | ambiguous});
    }
  }

  void rescore_spare(int64_t first, int64_t count) {
    sort(spare_, first, count, refined_);
    rescore(refined_);
  }

  const Workspace& w_;
  const Unit& unit_;
  const Job& job_;
  const cpu::PreparedLayer& layer_;
  Sink sink_;
  const cpu::CpuKernels& kernel_;
  const cpu::Int8Layout layout_;
  const FeatureBounds gate_;
  const RowMargin* margin_;
  const cpu::Int16Scale* scale_;
  const Exact exact_;
  const int16_t* int16_ = nullptr;
  const float* int16_scale_ = nullptr;
  const float* int16_residual_ = nullptr;
  float* scores_;
  uint32_t* candidates_;
  uint64_t* masks_;
  cpu::Ahead ahead_;
  bool busy_ = false;  // whether most of the last panel's weights were needed to rescore
  SurvivorList fresh_, refined_, spare_;  // what the screen let through; what int16 did; empty
  int16_t* packed_;
  Tally& tally_;
  Stopwatch watch_;
};

}  // namespace sparse_transcoder
