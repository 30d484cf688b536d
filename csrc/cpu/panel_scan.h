// One worker streams over a range of features for all rows of a block, panel by panel:
//
//   screen     makes approximate products in int8, int16 or float32. A pair whose upper bound
//              misses its gate is gone.
//   rescreen   multiplies again in int16 what survived int8. Surely active pairs are counted; those
//              of them under the running k-th best are gone.
//   compute    computes the rest exactly. This value alone decides whether a feature is active, and
//              its rank.
//
// No stage rules out a pair that could count. So the result depends neither on the arithmetic, nor
// on the panels and their order.
#pragma once

#include <cmath>

#include "bounds.h"
#include "cpu/batch.h"
#include "cpu/collectors.h"
#include "cpu/kernels/gate-inl.h"
#include "cpu/workspace.h"

namespace sparse_transcoder::cpu {

// Collector: see collectors.h. It gets every active feature of each row that may be of use to it,
// ascending but for those that it deferred.
template <typename Collector>
class PanelScan {
 public:
  PanelScan(const Workspace& workspace, const FeatureRange& range, int64_t worker)
      : PanelScan(workspace, range, worker, Collector{workspace, *range.block, worker}) {}

  PanelScan(const Workspace& workspace, const FeatureRange& range, int64_t worker,
            Collector collector)
      : workspace_(workspace),
        range_(range),
        collector_(collector),
        kernels_(active_kernels()),
        bounds_(layer().bounds.from(layer(), 0)),
        int8_(layer().copies.int8_panels(layer().hidden_size)),
        int16_(layer().copies.int16_rows()),
        exact_(workspace, block(), worker),
        buffers_(workspace.workers[worker]),
        all_rows_screened_(all_rows_screened()),
        queue_(buffers_.survivors, workspace.plan.survivor_capacity(), buffers_.positions),
        watch_(*buffers_.counters, workspace.timed) {}

  void run() {
    // Panels that the dense screen takes after one with many survivors; then int8 is tried again.
    constexpr int64_t retry = 15;
    const ScreenType sparse = screen().sparse;
    const int64_t tile_features =
        sparse == ScreenType::float32 ? workspace_.plan.tile_features : panel_features;
    int64_t dense_panels = 0;
    for (int64_t first = range_.first; first < range_.last; first += tile_features) {
      const Tile tile = {first, std::min(tile_features, range_.last - first)};
      if (sparse == ScreenType::int8 && dense_panels == 0) {
        if (!screen_int8(tile)) dense_panels = retry;
      } else {
        screen_densely(tile);
        if (dense_panels > 0) --dense_panels;
      }
    }
    empty_queue();
  }

 private:
  const RowBlock& block() const { return *range_.block; }
  const PreparedLayer& layer() const { return *block().layer; }
  const ScreenChoice& screen() const { return block().screen; }
  Counters& counters() const { return *buffers_.counters; }

  // False where too many pairs survive int8. Then the rows have had the dense screen instead.
  bool screen_int8(Tile panel) {
    const uint8_t* weights = int8_.panel(panel.first);
    const bool last = panel.first + panel.count >= range_.last;
    plan_prefetches(last ? nullptr : int8_.panel(panel.first + panel_features));
    kernels_.screen_int8({int8_.layout, int8_row(workspace_, block(), 0), block().row_count,
                          screen().planes, weights, bounds_.surely_out_below + panel.first},
                         buffers_.masks.rows, prefetcher_);
    if (!all_rows_screened_ || panel.count < panel_features) correct_masks(panel);
    SurvivorList& incoming = queue_.incoming();
    incoming.take(panel.first, kernels_.list_survivors(buffers_.masks, block().row_count,
                                                       panel.first, incoming.pairs));
    watch_.add_to(screen_phase);
    const int64_t pairs = block().row_count * panel.count;
    const int64_t survivors = incoming.size;
    if (survivors > screen().max_share * static_cast<double>(pairs)) {
      incoming.clear();
      empty_queue();
      screen_densely(panel);
      return false;
    }
    counters().pairs[static_cast<int>(ScreenType::int8)] += pairs;
    counters().survivors += survivors;
    advance();
    return true;
  }

  // Lets every pair of a row through that is too large to screen, and none of a row that is not
  // finite.
  void correct_masks(Tile panel) {
    const uint64_t all =
        panel.count == panel_features ? ~uint64_t{0} : (uint64_t{1} << panel.count) - 1;
    const RowMargin* margins = &margin(workspace_, block(), 0);
    uint64_t* masks = buffers_.masks.rows;
    for (int64_t row = 0; row < block().row_count; ++row)
      masks[row] = margins[row].is_screened() ? masks[row] & all
                   : margins[row].is_finite() ? all
                                              : 0;
  }

  bool all_rows_screened() const {
    const RowMargin* margins = &margin(workspace_, block(), 0);
    return std::all_of(margins, margins + block().row_count,
                       [](const RowMargin& one) { return one.is_screened(); });
  }

  // What the next stages of the queue, and the next panel, will read.
  void plan_prefetches(const uint8_t* next_panel) {
    // With fewer rows the screen itself is a stream through memory.
    constexpr int64_t many_rows = 7;
    prefetcher_.clear();
    prefetch_features(queue_.rescreened(), exact_.weights(0), exact_.row_bytes());
    if (int16_.rows != nullptr)
      prefetch_features(queue_.screened(), reinterpret_cast<const char*>(int16_.rows),
                        2 * int16_.stride);
    else
      prefetch_features(queue_.screened(), exact_.weights(0), exact_.row_bytes());
    if (next_panel != nullptr && block().row_count * screen().planes >= many_rows)
      prefetcher_.add(next_panel, int8_.layout.panel_bytes());
  }

  // Adds the weights of every feature of a list.
  void prefetch_features(const SurvivorList& list, const char* weights, int64_t row_bytes) {
    for (uint64_t bits = list.features; bits != 0; bits &= bits - 1)
      prefetcher_.add(weights + (list.first_feature + __builtin_ctzll(bits)) * row_bytes,
                      row_bytes);
  }

  // Computes the pairs that were rescreened, moves the queue on, and rescreens those that were
  // screened.
  void advance() {
    exact_.compute(queue_.rescreened(), false, collector_);
    watch_.add_to(compute_phase);
    queue_.advance();
    if (int16_.rows != nullptr) rescreen(queue_.rescreened());
    watch_.add_to(rescreen_phase);
  }

  void empty_queue() {
    advance();
    advance();
  }

  // Makes the int16 products of a list's pairs.
  void multiply_int16(const SurvivorList& list) {
    const int16_t* rows = int16_row(workspace_, block(), 0);
    for (int64_t i = 0, count = 0; i < list.size; i += count) {
      count = list.run_length(i);
      const int16_t* x[dot_rows];
      for (int64_t j = 0; j < count; ++j) x[j] = rows + list.pairs[i + j].row() * int16_.stride;
      kernels_.dot_int16(x, count, int16_.rows + list.pairs[i].feature() * int16_.stride,
                         layer().hidden_size, buffers_.products + i);
    }
  }

  // Leaves the pairs that int16 cannot settle.
  void rescreen(SurvivorList& list) {
    multiply_int16(list);
    const RowMargin* margins = &margin(workspace_, block(), 0);
    const Int16Scale* scales = &int16_scale(workspace_, block(), 0);
    int64_t kept = 0;
    uint64_t features = 0;
    for (int64_t i = 0; i < list.size; ++i) {
      const int64_t row = list.pairs[i].row(), feature = list.pairs[i].feature();
      const float score =
          static_cast<float>(buffers_.products[i]) * (scales[row].scale * int16_.scale[feature]);
      const Gate<Scalar> gate(
          bounds_, feature, score,
          margin_at<Scalar>(margins[row].int16, bounds_.norm, int16_.error, feature));
      const unsigned sure = gate.surely_active();
      list.pairs[kept] = {row, feature, !sure};
      collector_.active_count(row) += sure;
      // About half of them may be active, and are surely active, so without a branch.
      const unsigned keep =
          gate.may_be_active() & (~sure | gate.may_reach(collector_.min_value(row))) & 1;
      features |= uint64_t{keep} << (feature - list.first_feature);
      kept += keep;
    }
    list.size = kept;
    list.features = features;
  }

  // Screens in the arithmetic whose speed does not depend on how many pairs survive. The queue must
  // be empty, and is left empty.
  void screen_densely(Tile tile) {
    counters().pairs[static_cast<int>(screen().dense)] += block().row_count * tile.count;
    if (screen().dense == ScreenType::int16)
      screen_int16(tile);
    else
      screen_float32(tile);
  }

  void screen_int16(Tile panel) {
    const int64_t next = panel.first + panel_features;
    prefetcher_.clear();
    if (weights_needed_)
      prefetcher_.add(exact_.weights(panel.first), panel.count * exact_.row_bytes());
    if (next < range_.last)
      prefetcher_.add(int16_.rows + next * int16_.stride,
                      2 * int16_.stride * std::min(panel_features, range_.last - next));
    kernels_.product_int16(
        {int16_row(workspace_, block(), 0), &int16_scale(workspace_, block(), 0), block().row_count,
         int16_.rows + panel.first * int16_.stride, int16_.scale + panel.first, panel.count,
         layer().hidden_size, buffers_.int16_panel},
        buffers_.scores, prefetcher_);
    watch_.add_to(screen_phase);
    const int64_t before = counters().computed;
    gate_rows(panel, {0, block().row_count, panel_features, int16_.error, &RowMargin::int16});
    compute_incoming(panel);
    weights_needed_ = counters().computed - before >= panel.count;
    watch_.add_to(compute_phase);
  }

  void screen_float32(Tile tile) {
    const auto product = kernels_.product[static_cast<int>(layer().dtype)];
    const int64_t tile_rows = workspace_.plan.tile_rows;
    for (int64_t first = 0; first < block().row_count; first += tile_rows) {
      const int64_t rows = std::min(tile_rows, block().row_count - first);
      product(normed_row(workspace_, block(), first), rows, exact_.weights(tile.first), tile.count,
              layer().hidden_size, buffers_.scores);
      watch_.add_to(screen_phase);
      gate_rows(tile, {first, rows, tile.count, bounds_.norm, &RowMargin::float32});
      compute_incoming(tile);
      watch_.add_to(compute_phase);
    }
  }

  // The rows [first, first + count) whose scores of a tile are in the buffer, and what bounds the
  // scores' errors.
  struct ScoredRows {
    int64_t first, count;
    int64_t stride;         // between the scores of two rows
    const float* residual;  // of all features
    Margin RowMargin::* margin;
  };

  // Queues what must be computed of the rows.
  void gate_rows(Tile tile, const ScoredRows& rows) {
    const RowMargin* margins = &margin(workspace_, block(), rows.first);
    GateArgs args = {buffers_.scores, bounds_, rows.residual, tile.first, tile.count, {}, 0};
    for (int64_t r = 0; r < rows.count; ++r, args.scores += rows.stride) {
      if (!margins[r].is_finite()) continue;
      if (!queue_.has_room(tile.count)) compute_incoming(tile);
      const int64_t row = rows.first + r;
      args.margin = margins[r].*rows.margin;
      args.min_value = collector_.min_value(row);
      const int64_t found =
          kernels_.gate_row(args, buffers_.candidates, &collector_.active_count(row));
      for (int64_t i = 0; i < found; ++i) queue_candidate(row, buffers_.candidates[i], args);
    }
  }

  // candidate: as KernelTable::gate_row writes it.
  void queue_candidate(int64_t row, uint32_t candidate, const GateArgs& args) {
    const int64_t position = candidate >> 1;
    const bool ambiguous = candidate & 1;
    if (!ambiguous && collector_.defer(row, deferred(position, args))) return;
    queue_.incoming().push({row, args.first + position, ambiguous});
  }

  // A surely active feature, which may wait for a better k-th best. Its interval allows for the
  // roundings of its own ends.
  DeferredFeature deferred(int64_t position, const GateArgs& args) const {
    const int64_t feature = args.first + position;
    const float margin = margin_at<Scalar>(args.margin, bounds_.norm, args.residual, feature);
    const double value = double{args.scores[position]} + bounds_.bias[feature];
    const double rounding = (std::abs(value) + margin + layer().max_bias) * kth_best_rounding +
                            underflow(layer().hidden_size);
    return {static_cast<float>(value - margin - rounding),
            static_cast<float>(value + margin + rounding), static_cast<uint32_t>(feature)};
  }

  void compute_incoming(Tile tile) {
    queue_.group(tile);
    exact_.compute(queue_.rescreened(), false, collector_);
  }

  const Workspace& workspace_;
  const FeatureRange& range_;
  const Collector collector_;
  const KernelTable& kernels_;
  const FeatureBounds bounds_;
  const Int8Panels int8_;
  const Int16Rows int16_;
  const ExactDot exact_;
  const WorkerBuffers& buffers_;
  const bool all_rows_screened_;
  SurvivorQueue queue_;
  Prefetcher prefetcher_;
  Stopwatch watch_;
  bool weights_needed_ = false;  // whether most stored weights of the last panel were read
};

// All features of a batch's blocks.
template <typename Collector>
void scan(const Batch& batch, const Workspace& workspace) {
  batch.for_features([&](int64_t worker, const FeatureRange& range) {
    PanelScan<Collector>(workspace, range, worker).run();
  });
}

}  // namespace sparse_transcoder::cpu
