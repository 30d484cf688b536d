// The engine against plain float64 loops, from many threads, and in what it allocates and refuses.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <sparse_transcoder/engine.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <thread>

#include "check.h"

using namespace sparse_transcoder;

namespace {

constexpr at::ScalarType F32 = at::kFloat, BF16 = at::kBFloat16, F16 = at::kHalf;
constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float quiet_nan = std::numeric_limits<float>::quiet_NaN();

constexpr Screening screenings[] = {Screening::automatic, Screening::off, Screening::int16,
                                    Screening::int8};

enum class Data {
  coarse,  // multiples of 1/8: every sum is exact in float32, ties abound, and the result has but
           // one right answer
  normal,
};

struct Case {
  int64_t F, H, B, T;
  int64_t top_k;
  float threshold;
  const char* kind = "relu";  // relu, jumprelu, topk, bias (of the input), layer norm
  at::ScalarType weights = F32, hidden = F32;
  int64_t chunk_size = 512, lanes = 2;
};

// Workers of an engine that does not choose them, before any test of this program runs.
const bool four_workers = (at::set_num_threads(4), true);

std::mt19937 random_bits(11);

at::Tensor random(at::IntArrayRef shape, Data data, float scale = 1) {
  at::Tensor t = at::empty(shape, F32);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < t.numel(); ++i)
    t.data_ptr<float>()[i] =
        scale * (data == Data::coarse ? static_cast<float>(random_bits() % 17) / 8 - 1
                                      : normal(random_bits));
  return t;
}

LayerWeights make_layer(const Case& c, Data data) {
  const std::string kind = c.kind;
  const auto make = [&](at::IntArrayRef shape, float scale) {
    return random(shape, data, scale).to(c.weights);
  };
  LayerWeights w;
  w.W_enc = make({c.F, c.H}, data == Data::coarse ? 1 : 1 / std::sqrt(static_cast<float>(c.H)));
  w.b_enc = make({c.F}, 1);
  if (kind == "jumprelu") w.threshold = make({c.F}, 4);
  if (kind == "topk") w.k = std::max<int64_t>(1, c.F / 3);
  if (kind == "bias") w.input_bias = make({c.H}, 1);
  if (kind == "layer norm") {
    w.ln_weight = make({c.H}, 1);
    w.ln_bias = make({c.H}, 1);
  }
  return w;
}

std::vector<double> wide(const at::Tensor& t) {
  if (!t.defined()) return {};
  const at::Tensor d = t.to(at::kDouble).contiguous();
  return {d.data_ptr<double>(), d.data_ptr<double>() + d.numel()};
}

// What the contract says of one row, in float64.
struct Row {
  std::vector<double> masked;  // [F]
  std::vector<double> pre;     // [F]
  std::vector<int64_t> order;  // stable descending sort of masked
  int64_t kept;
  bool finite = true;
};

std::vector<Row> reference(const Case& c, const LayerWeights& w, const at::Tensor& hidden) {
  const auto W = wide(w.W_enc), b = wide(w.b_enc), threshold = wide(w.threshold),
             input_bias = wide(w.input_bias), ln_weight = wide(w.ln_weight),
             ln_bias = wide(w.ln_bias), all = wide(hidden);
  std::vector<Row> rows(all.size() / c.H);
  for (size_t n = 0; n < rows.size(); ++n) {
    Row& row = rows[n];
    std::vector<double> x(all.begin() + n * c.H, all.begin() + (n + 1) * c.H);
    for (const double value : x) row.finite &= std::isfinite(value);
    for (size_t i = 0; i < input_bias.size(); ++i) x[i] -= input_bias[i];
    if (!ln_weight.empty()) {
      const double mean = std::accumulate(x.begin(), x.end(), 0.0) / c.H;
      double variance = 0;
      for (const double value : x) variance += (value - mean) * (value - mean) / c.H;
      for (int64_t i = 0; i < c.H; ++i)
        x[i] = (x[i] - mean) / std::sqrt(variance + 1e-5) * ln_weight[i] + ln_bias[i];
    }
    for (int64_t f = 0; f < c.F; ++f) {
      double sum = b[f];
      for (int64_t i = 0; i < c.H; ++i) sum += x[i] * W[f * c.H + i];
      row.pre.push_back(sum);
    }
    row.order.resize(c.F);
    std::iota(row.order.begin(), row.order.end(), 0);
    const auto sort = [&row](const std::vector<double>& by) {
      std::stable_sort(row.order.begin(), row.order.end(),
                       [&by](int64_t i, int64_t j) { return by[i] > by[j]; });
    };
    std::vector<double> act = row.pre;
    if (w.k) {
      sort(act);
      for (int64_t i = *w.k; i < c.F; ++i) act[row.order[i]] = 0;
    }
    for (size_t f = 0; f < threshold.size(); ++f)
      if (!(act[f] > threshold[f])) act[f] = 0;
    row.kept = 0;
    for (double& value : act) {
      if (!(value > 0 && value >= c.threshold)) value = 0;
      row.kept += value > 0;
    }
    row.masked = act;
    std::iota(row.order.begin(), row.order.end(), 0);
    sort(act);
  }
  return rows;
}

template <typename T>
const T* data(const at::Tensor& t) {
  return t.const_data_ptr<T>();
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && a.is_contiguous() &&
         b.is_contiguous() && std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
}

bool same_bits(const Features& a, const Features& b) {
  return same_bits(a.activations, b.activations) && same_bits(a.indices, b.indices) &&
         same_bits(a.sparsity, b.sparsity);
}

bool same_bits(const SparseFeatures& a, const SparseFeatures& b) {
  return same_bits(a.row_begin, b.row_begin) && same_bits(a.features, b.features) &&
         same_bits(a.activations, b.activations);
}

bool same_bits(const std::map<int64_t, Features>& a, const std::map<int64_t, Features>& b) {
  bool same = a.size() == b.size();
  for (const auto& [id, features] : a) same = same && b.count(id) && same_bits(features, b.at(id));
  return same;
}

void check_shapes(const Case& c, const at::Tensor& hidden, const Features& out) {
  std::vector<int64_t> rows(hidden.sizes().begin(), hidden.sizes().end() - 1), slots = rows;
  slots.push_back(std::min(c.top_k, c.F));
  EXPECT_EQUAL(out.activations.sizes(), at::IntArrayRef(slots));
  EXPECT_EQUAL(out.indices.sizes(), at::IntArrayRef(slots));
  EXPECT_EQUAL(out.sparsity.sizes(), at::IntArrayRef(rows));
  EXPECT(out.activations.scalar_type() == at::kFloat && out.indices.scalar_type() == at::kLong &&
         out.sparsity.scalar_type() == at::kFloat);
  EXPECT(!out.activations.requires_grad() && out.activations.is_contiguous());
}

// Where every sum is exact there is one right answer, ties and empty slots included.
void check_exactly(const Case& c, const std::vector<Row>& rows, const Features& out) {
  const int64_t k = std::min(c.top_k, c.F);
  for (size_t n = 0; n < rows.size(); ++n) {
    for (int64_t i = 0; i < k; ++i) {
      EXPECT_EQUAL(data<int64_t>(out.indices)[n * k + i], rows[n].order[i]);
      EXPECT_EQUAL(data<float>(out.activations)[n * k + i],
                   static_cast<float>(rows[n].masked[rows[n].order[i]]));
    }
    EXPECT_EQUAL(data<float>(out.sparsity)[n],
                 static_cast<float>(static_cast<double>(rows[n].kept) / c.F));
  }
}

void check_exactly(const std::vector<Row>& rows, const SparseFeatures& out) {
  EXPECT_EQUAL(out.row_begin.numel(), static_cast<int64_t>(rows.size()) + 1);
  int64_t entry = 0;
  for (size_t n = 0; n < rows.size(); ++n) {
    EXPECT_EQUAL(data<int64_t>(out.row_begin)[n], entry);
    for (size_t f = 0; f < rows[n].masked.size(); ++f) {
      if (rows[n].masked[f] == 0 || entry >= out.features.numel()) continue;
      EXPECT_EQUAL(data<int64_t>(out.features)[entry], static_cast<int64_t>(f));
      EXPECT_EQUAL(data<float>(out.activations)[entry++], static_cast<float>(rows[n].masked[f]));
    }
  }
  EXPECT_EQUAL(data<int64_t>(out.row_begin)[rows.size()], entry);
  EXPECT(out.features.numel() == entry && out.activations.numel() == entry);
}

void check_nearly(const Case& c, const LayerWeights& w, const std::vector<Row>& rows,
                  const Features& out) {
  const int64_t k = std::min(c.top_k, c.F);
  const auto threshold = wide(w.threshold);
  for (size_t n = 0; n < rows.size(); ++n) {
    const Row& row = rows[n];
    const float* activations = data<float>(out.activations) + n * k;
    const int64_t* indices = data<int64_t>(out.indices) + n * k;
    if (!row.finite) {
      for (int64_t i = 0; i < k; ++i) EXPECT(std::isnan(activations[i]));
      EXPECT(std::isnan(data<float>(out.sparsity)[n]));
      continue;
    }
    const auto slack = [](double value) { return 1e-5 * std::max(1.0, std::fabs(value)); };
    std::vector<bool> listed(c.F);
    for (int64_t i = 0; i < k; ++i) {
      EXPECT(indices[i] >= 0 && indices[i] < c.F && !listed[indices[i]]);
      listed[indices[i]] = true;
      const double value = row.masked[row.order[i]];
      EXPECT(std::fabs(activations[i] - value) <= slack(value));
      if (activations[i] > 0)
        EXPECT(std::fabs(activations[i] - row.pre[indices[i]]) <= slack(value));
      EXPECT(i == 0 || activations[i - 1] >= activations[i]);
    }
    const double last = row.masked[row.order[k - 1]];
    for (int64_t f = 0; f < c.F; ++f) EXPECT(listed[f] || row.masked[f] <= last + slack(last));
    if (w.k) continue;  // its cut may fall between two values that float64 rounds differently
    int64_t least = 0, most = 0;
    for (int64_t f = 0; f < c.F; ++f) {
      const double gate = std::max<double>({c.threshold, 0, threshold.empty() ? 0 : threshold[f]});
      least += row.pre[f] >= gate + slack(gate);
      most += row.pre[f] >= gate - slack(gate);
    }
    const double counted = double{data<float>(out.sparsity)[n]} * c.F;
    EXPECT(counted > least - 0.5 && counted < most + 0.5);
  }
}

const Case cases[] = {
    {1, 1, 1, 1, 1, 0.5f},
    {2, 3, 1, 5, 4, 0.5f},
    {33, 7, 2, 3, 1, 0},
    {33, 31, 2, 3, 33, 0.25f},
    {64, 32, 1, 17, 31, 0.5f},
    {65, 33, 3, 5, 32, 1},
    {511, 40, 1, 9, 33, 1},
    {512, 65, 1, 4, 20, 1, "relu", F32, F32, 1},
    {513, 64, 2, 20, 20, 1, "relu", BF16, F32, 7},
    {1500, 96, 1, 40, 50, 2, "relu", F16, BF16, 16, 4},
    {1500, 24, 1, 3, 2000, 0, "relu", F32, F16, 512, 3},
    {700, 48, 2, 11, 20, 0.5f, "jumprelu"},
    {700, 48, 2, 11, 20, -3, "jumprelu", BF16, BF16, 5, 9},
    {90, 40, 1, 30, 50, 0.5f, "topk"},
    {600, 17, 1, 8, 5, 0, "topk", F16, F32, 3},
    {600, 50, 1, 8, 12, 0.5f, "bias", BF16, F32, 3},
    {300, 20, 1, 8, 12, 1e30f},
    {300, 20, 1, 8, 12, inf},
};

}  // namespace

TEST(engine_has_the_one_right_answer) {
  for (const Case& c : cases) {
    const LayerWeights w = make_layer(c, Data::coarse);
    const at::Tensor hidden = random({c.B, c.T, c.H}, Data::coarse).to(c.hidden);
    const std::vector<Row> rows = reference(c, w, hidden);
    for (const Screening screening : screenings) {
      const Engine engine({{3, w}}, {.top_k = c.top_k,
                                     .activation_threshold = c.threshold,
                                     .chunk_size = c.chunk_size,
                                     .lanes = c.lanes,
                                     .screening = screening});
      const Features out = engine.encode(3, hidden);
      check_shapes(c, hidden, out);
      check_exactly(c, rows, out);
      check_exactly(rows, engine.encode_sparse(3, hidden));
      check_shapes(c, hidden[0], engine.encode(3, hidden[0]));
    }
  }
}

// The results of one layer in arrays of the caller's.
struct Arrays {
  Arrays(const Engine& engine, int64_t layer, int64_t row_count)
      : k(engine.ranks(layer)),
        activations(row_count * k, -1.0f),
        indices(row_count * k, -1),
        active(row_count, -2),
        sparsity(row_count, -1.0f) {}
  LayerRows rows(int64_t layer, const at::Tensor& hidden) {
    return {layer,           hidden.const_data_ptr(), hidden.size(0), activations.data(),
            indices.data(),  sparsity.data(),         active.data(),  hidden.scalar_type(),
            hidden.stride(0)};
  }
  Features features() {
    const auto n = static_cast<int64_t>(sparsity.size());
    return {at::from_blob(activations.data(), {n, k}),
            at::from_blob(indices.data(), {n, k}, at::kLong), at::from_blob(sparsity.data(), {n})};
  }

  int64_t k;
  std::vector<float> activations;
  std::vector<int64_t> indices, active;
  std::vector<float> sparsity;
};

TEST(engine_encodes_from_and_to_the_callers_memory) {
  for (const Case& c : cases) {
    const LayerWeights w = make_layer(c, Data::coarse),
                       beside = make_layer({40, 5, 1, 1, 1, 1}, Data::coarse);
    const at::Tensor wide = random({c.B * c.T, c.H + 3}, Data::coarse).to(c.hidden),
                     hidden = wide.narrow(1, 2, c.H), other = random({7, 5}, Data::coarse);
    const std::vector<Row> rows = reference(c, w, hidden);
    for (const Screening screening : screenings) {
      const Engine engine({{3, w}, {8, beside}}, {.top_k = c.top_k,
                                                  .activation_threshold = c.threshold,
                                                  .chunk_size = c.chunk_size,
                                                  .lanes = c.lanes,
                                                  .screening = screening});
      Arrays one(engine, 3, c.B * c.T), again(engine, 3, 1), small(engine, 8, 7);
      const LayerRows layers[] = {one.rows(3, hidden), small.rows(8, other),
                                  again.rows(3, hidden.narrow(0, c.B * c.T - 1, 1))};
      engine.encode(layers);
      const Case of_beside = {40, 5, 1, 7, c.top_k, c.threshold};
      check_exactly(c, rows, one.features());
      check_exactly(c, {rows.back()}, again.features());
      check_exactly(of_beside, reference(of_beside, beside, other), small.features());
      for (size_t n = 0; n < rows.size(); ++n) EXPECT_EQUAL(one.active[n], rows[n].kept);
    }
  }
}

TEST(engine_marks_rows_of_the_caller_that_are_not_finite) {
  const Case c = {60, 8, 1, 3, 4, 0.5f};
  const LayerWeights w = make_layer(c, Data::normal);
  const at::Tensor hidden = random({3, 8}, Data::normal);
  hidden[1][5] = inf;
  const Engine engine({{0, w}}, {.top_k = 4, .activation_threshold = 0.5f});
  Arrays out(engine, 0, 3);
  const LayerRows layers[] = {out.rows(0, hidden)};
  engine.encode(layers);
  check_nearly(c, w, reference(c, w, hidden), out.features());
  EXPECT_EQUAL(out.active[1], -1);
}

TEST(engine_obeys_lanes_and_not_torchs_threads) {
  const LayerWeights w = make_layer({4000, 64, 1, 1, 1, 1}, Data::normal);
  const at::Tensor hidden = random({1, 64}, Data::normal);
  const Engine chosen({{0, w}}, {.lanes = 3}), unchosen({{0, w}});
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  EXPECT_EQUAL(chosen.explain(0, hidden).workers, 3);
  EXPECT_EQUAL(unchosen.explain(0, hidden).workers, 1);
  at::set_num_threads(threads);
  EXPECT_EQUAL(unchosen.explain(0, hidden).workers, threads);
}

TEST(engine_decoder_directions) {
  LayerWeights w = make_layer({30, 8, 1, 1, 1, 1}, Data::normal);
  w.W_dec = random({16, 30}, Data::normal).to(BF16);
  w.write_layers = 2;
  const Engine engine({{4, w}}),
      encoder_alone({{4, make_layer({30, 8, 1, 1, 1, 1}, Data::normal)}});
  const std::vector<double> all = wide(w.W_dec);
  const std::vector<float> direction = engine.decoder_direction(4, 29);
  EXPECT_EQUAL(direction.size(), size_t{16});
  for (size_t i = 0; i < direction.size(); ++i) EXPECT_EQUAL(direction[i], all[i * 30 + 29]);
  EXPECT_THROWS(c10::ValueError, "layer 4: feature must be in [0, 30), got 30",
                engine.decoder_direction(4, 30));
  EXPECT_THROWS(c10::ValueError, "layer 4: decoder_direction needs W_dec",
                encoder_alone.decoder_direction(4, 0));
  EXPECT_THROWS(c10::IndexError, "layer 5: there is no transcoder", engine.decoder_direction(5, 0));
}

TEST(engine_is_near_float64) {
  for (const bool odd_rows : {false, true})
    for (Case c : cases)
      for (const bool norm : {false, true}) {
        if (norm) c.kind = "layer norm";
        const LayerWeights w = make_layer(c, Data::normal);
        at::Tensor hidden = random({c.B, c.T, c.H}, Data::normal);
        if (odd_rows && !norm) {
          hidden[0][0].fill_(0);
          hidden[0][c.T / 2].mul_(1e15f);  // the screen's bound is infinite above 1e37
          hidden[0][c.T - 1].select(0, c.H / 2) = c.T % 2 ? quiet_nan : -inf;
        }
        hidden = hidden.to(c.hidden);
        const std::vector<Row> rows = reference(c, w, hidden);
        for (const Screening screening : screenings) {
          const Engine engine({{3, w}}, {.top_k = c.top_k,
                                         .activation_threshold = c.threshold,
                                         .chunk_size = c.chunk_size,
                                         .lanes = c.lanes,
                                         .screening = screening});
          const Features out = engine.encode(3, hidden);
          check_shapes(c, hidden, out);
          check_nearly(c, w, rows, out);
        }
      }
}

TEST(engine_row_near_overflow) {
  Case c = {100, 16, 1, 3, 7, 1};
  LayerWeights w = make_layer(c, Data::normal);
  w.W_enc.mul_(1e10f);
  const at::Tensor hidden = random({1, 3, 16}, Data::normal);
  hidden[0][1].mul_(1e27f);
  const Engine engine({{0, w}}, {.top_k = c.top_k});
  check_nearly(c, w, reference(c, w, hidden), engine.encode(0, hidden));
}

TEST(engine_gives_the_same_bits_however_it_is_asked) {
  const Case c = {1100, 72, 2, 37, 24, 0.5f, "jumprelu", BF16, F32};
  const LayerWeights w = make_layer(c, Data::normal),
                     beside = make_layer({300, 9, 1, 1, 1, 1}, Data::normal);
  const at::Tensor hidden = random({2, 37, 72}, Data::normal),
                   other = random({50, 9}, Data::normal);
  const auto engine = [&](int64_t chunk_size, int64_t lanes, Screening screening) {
    return Engine({{0, w}, {1, beside}}, {.top_k = 24,
                                          .activation_threshold = 0.5f,
                                          .chunk_size = chunk_size,
                                          .lanes = lanes,
                                          .screening = screening});
  };
  const Features first = engine(512, 1, Screening::off).encode(0, hidden);
  for (const int64_t chunk_size : {1, 2, 5, 36, 37, 74, 100000})
    for (const int64_t lanes : {0, 1, 2, 3, 8})
      for (const Screening screening : screenings) {
        const Engine e = engine(chunk_size, lanes, screening);
        EXPECT(same_bits(e.encode(0, hidden), first));
        EXPECT(same_bits(e.encode({{0, hidden}, {1, other}}).at(0), first));
        const Features row = e.encode(0, hidden[1].narrow(0, 20, 1));
        EXPECT(same_bits(row.activations[0], first.activations[1][20]) &&
               same_bits(row.indices[0], first.indices[1][20]));
      }
  const Engine e = engine(16, 2, Screening::automatic);
  const at::Tensor turned =
      hidden.permute({2, 1, 0}).contiguous().permute({2, 1, 0});  // strides 1, B, B * T
  const at::Tensor spread = at::stack({hidden, at::zeros_like(hidden)}, 3).select(3, 0);
  EXPECT(!turned.is_contiguous() && !spread.is_contiguous());
  EXPECT(same_bits(e.encode(0, turned), first));
  EXPECT(same_bits(e.encode(0, spread), first));
  EXPECT(same_bits(e.encode(0, hidden.detach().requires_grad_()), first));
  const Features repeated = e.encode(0, hidden.narrow(1, 4, 1).expand({2, 6, 72}));
  for (int64_t i = 0; i < 6; ++i)
    EXPECT(same_bits(repeated.activations[1][i], first.activations[1][4]));
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  EXPECT(same_bits(e.encode(0, hidden), first));
  at::set_num_threads(threads);
}

TEST(engine_sparse_is_all_that_encode_finds) {
  for (const char* kind : {"relu", "jumprelu", "topk", "layer norm"}) {
    const Case c = {900, 48, 2, 21, 900, 0.5f, kind, BF16, F32};
    const LayerWeights w = make_layer(c, Data::normal);
    const at::Tensor hidden = random({2, 21, 48}, Data::normal);
    hidden[0][3][5] = quiet_nan;
    const Features all =
        Engine({{0, w}}, {.top_k = c.F, .activation_threshold = c.threshold}).encode(0, hidden);
    at::Tensor dense = at::zeros({42, c.F}).scatter_(1, all.indices.view({42, c.F}),
                                                     all.activations.view({42, c.F}));
    dense[3].zero_();
    dense[3][0] = quiet_nan;
    SparseFeatures first;
    for (const int64_t chunk_size : {512, 1, 10})
      for (const int64_t lanes : {1, 3, 8}) {
        const Engine engine({{0, w}}, {.top_k = 5,
                                       .activation_threshold = c.threshold,
                                       .chunk_size = chunk_size,
                                       .lanes = lanes});
        const SparseFeatures out = engine.encode_sparse(0, hidden);
        if (!first.features.defined()) first = out;
        EXPECT(same_bits(out, first));
      }
    const at::Tensor rows = at::repeat_interleave(at::arange(42), first.row_begin.diff());
    at::Tensor scattered =
        at::zeros({42, c.F}).index_put_({rows, first.features}, first.activations);
    EXPECT(at::equal(scattered.nan_to_num(-1), dense.nan_to_num(-1)));
  }
}

// What a sink gets of layers encoded at once, against encode_sparse and encode, which other tests
// hold against float64.
TEST(engine_gives_a_sink_every_row) {
  const Case cases[] = {{900, 48, 1, 70, 5, 0.5f},
                        {300, 48, 1, 33, 5, 0.5f, "topk", BF16},
                        {5000, 16, 1, 9, 5, 0.0f, "jumprelu"}};
  std::map<int64_t, LayerWeights> weights;
  std::map<int64_t, at::Tensor> hidden;
  for (const Case& c : cases) {
    weights[c.F] = make_layer(c, Data::normal);
    hidden[c.F] = random({c.T, c.H}, Data::normal);
  }
  hidden[900][3][5] = quiet_nan;
  for (const int64_t chunk_size : {512, 7})
    for (const int64_t lanes : {1, 3}) {
      const Engine engine(
          weights,
          {.top_k = 5, .activation_threshold = 0.5f, .chunk_size = chunk_size, .lanes = lanes});
      for (const bool only_top_k : {false, true}) {
        std::map<int64_t, int64_t> rows, entries;
        engine.encode_sparse(
            hidden,
            [&](const SparseRows& got) {
              const int64_t id = got.layer, count = got.features.row_begin.numel() - 1;
              EXPECT(count >= 1 && count <= chunk_size);
              EXPECT_EQUAL(got.first_row, rows[id]);
              EXPECT_EQUAL(got.clamped, 0);
              const at::Tensor some = hidden.at(id).narrow(0, rows[id], count);
              SparseFeatures want = engine.encode_sparse(id, some);
              if (only_top_k) {
                const Features top = engine.encode(id, some);
                const at::Tensor kept = top.activations > 0, sound = ~at::isnan(top.sparsity);
                EXPECT(at::equal(got.features.row_begin.diff().masked_select(sound),
                                 kept.sum(1).masked_select(sound)));
              } else {
                EXPECT(at::equal(got.features.row_begin, want.row_begin));
                EXPECT(at::equal(got.features.features.to(at::kLong), want.features));
                EXPECT(at::equal(got.features.activations.nan_to_num(-1),
                                 want.activations.to(at::kHalf).nan_to_num(-1)));
              }
              rows[id] += count;
              entries[id] += got.features.features.numel();
            },
            {at::kUInt16, at::kHalf, only_top_k});
        for (const Case& c : cases) {
          EXPECT_EQUAL(rows[c.F], c.T);
          EXPECT(entries[c.F] > c.T);
        }
      }
    }
}

TEST(engine_decodes) {
  for (const int64_t written : {1, 3})  // layers that the decoder writes to
    for (const bool skip : {false, true}) {
      if (skip && written > 1) continue;
      const Case c = {70, 12, 2, 9, 70, 0.5f, "relu", BF16};
      LayerWeights w = make_layer(c, Data::normal);
      w.W_dec = random({written * c.H, c.F}, Data::normal).to(BF16);
      w.b_dec = random({written * c.H}, Data::normal);
      w.write_layers = written;
      if (skip) w.W_skip = random({c.H, c.H}, Data::normal);
      const at::Tensor hidden = random({2, 9, 12}, Data::normal);
      const Engine engine({{6, w}}, {.top_k = 70, .activation_threshold = 0.5f});
      const Features out = engine.encode(6, hidden);
      const at::Tensor y = engine.decode(6, out.activations, out.indices, hidden),
                       flat = y.view({18, written * c.H});
      EXPECT_EQUAL(y.sizes(), at::IntArrayRef({2, 9, written * c.H}));
      const auto rows = reference(c, w, hidden);
      const auto W = wide(w.W_dec), b = wide(w.b_dec), S = wide(w.W_skip), x = wide(hidden);
      for (int64_t n = 0; n < 18; ++n)
        for (int64_t j = 0; j < written * c.H; ++j) {
          double sum = b[j];
          for (int64_t f = 0; f < c.F; ++f) sum += rows[n].masked[f] * W[j * c.F + f];
          for (int64_t i = 0; skip && i < c.H; ++i) sum += x[n * c.H + i] * S[j * c.H + i];
          EXPECT(std::fabs(flat[n][j].item<double>() - sum) <= 1e-4);
        }
      const at::Tensor sparse = engine.decode(6, engine.encode_sparse(6, hidden), hidden);
      EXPECT(at::allclose(sparse, flat, 1e-5, 1e-5));
      if (skip)
        EXPECT_THROWS(c10::ValueError, "layer 6: the skip connection needs the hidden states",
                      engine.decode(6, out.activations, out.indices));
      EXPECT_THROWS(c10::ValueError, "layer 6: features must be in [0, 70)",
                    engine.decode(6, out.activations, out.indices + 1, hidden));
      EXPECT_THROWS(c10::ValueError, "layer 6: features must be in [0, 70)",
                    engine.decode(6, out.activations, out.indices - 1, hidden));
      EXPECT_THROWS(c10::ValueError, "layer 6: hidden must have the features' 18 rows, got [9, 12]",
                    engine.decode(6, out.activations, out.indices, hidden[0]));
      EXPECT_THROWS(c10::ValueError, "layer 6: row_begin must ascend from 0",
                    engine.decode(6,
                                  SparseFeatures{at::full({2}, 7, at::kLong),
                                                 at::zeros({7}, at::kLong), at::zeros({7})},
                                  hidden));
    }
}

TEST(engine_gives_every_thread_the_same_bits) {
  std::map<int64_t, LayerWeights> weights;
  std::map<int64_t, at::Tensor> hidden;
  const Case layers[] = {{900, 40, 1, 60, 0, 0},
                         {33, 129, 1, 60, 0, 0, "topk", F16},
                         {2000, 16, 1, 5, 0, 0, "jumprelu", BF16},
                         {1, 1, 1, 33, 0, 0}};
  for (const Case& c : layers) {
    const auto id = static_cast<int64_t>(2 * weights.size());
    weights[id] = make_layer(c, Data::normal);
    hidden[id] = random({c.T, c.H}, Data::normal);
  }
  const Engine alone(weights, {.top_k = 12, .activation_threshold = 0.5f, .lanes = 1});
  const auto expected = alone.encode(hidden);
  std::map<int64_t, SparseFeatures> sparse;
  for (const auto& [id, rows] : hidden) sparse[id] = alone.encode_sparse(id, rows);
  for (const int threads : {4, 8}) {
    const Engine engine(weights,
                        {.top_k = 12, .activation_threshold = 0.5f, .chunk_size = 32, .lanes = 3});
    std::vector<std::thread> callers;
    for (int caller = 0; caller < threads; ++caller)
      callers.emplace_back([&, caller] {
        for (int i = 0; i < 12; ++i) {
          EXPECT(same_bits(engine.encode(hidden), expected));
          const int64_t id = 2 * ((caller + i) % 4);
          EXPECT(same_bits(engine.encode(id, hidden.at(id)), expected.at(id)));
          EXPECT(same_bits(engine.encode_sparse(id, hidden.at(id)), sparse.at(id)));
          EXPECT(engine.memory().workspace_bytes > 0);
        }
      });
    for (std::thread& caller : callers) caller.join();
  }
}

TEST(engine_ignores_the_callers_rounding) {
  const Case c = {600, 32, 1, 40, 9, 0.01f};
  LayerWeights w = make_layer(c, Data::normal);
  w.W_enc.mul_(0x1p120f);
  w.b_enc.zero_();
  const at::Tensor hidden =
      random({40, 32}, Data::normal, 0x1p-128f);  // most are too small to be normal numbers
  const Engine engine({{0, w}}, {.top_k = 9, .activation_threshold = 0.01f, .lanes = 3});
  const Features first = engine.encode(0, hidden);
  check_nearly(c, w, reference(c, w, hidden), first);
  if (at::globalContext().setFlushDenormal(true)) {
    for (int i = 0; i < 20; ++i) EXPECT(same_bits(engine.encode(0, hidden), first));
    at::globalContext().setFlushDenormal(false);
  }
  std::fesetround(FE_UPWARD);
  for (int i = 0; i < 20; ++i) EXPECT(same_bits(engine.encode(0, hidden), first));
  EXPECT_EQUAL(std::fegetround(), FE_UPWARD);
  std::fesetround(FE_TONEAREST);
}

TEST(engine_empty_inputs) {
  const Engine engine({{0, make_layer({30, 8, 1, 1, 1, 1}, Data::normal)}}, {.top_k = 5});
  const Case c = {30, 8, 1, 1, 5, 1};
  for (const auto& shape : std::vector<std::vector<int64_t>>{{0, 8}, {0, 4, 8}, {4, 0, 8}}) {
    const at::Tensor hidden = at::empty(shape);
    check_shapes(c, hidden, engine.encode(0, hidden));
    EXPECT_EQUAL(engine.encode_sparse(0, hidden).features.numel(), 0);
  }
  EXPECT(engine.encode(std::map<int64_t, at::Tensor>()).empty());
}

TEST(engine_shares_what_it_is_given) {
  const Case c = {40, 8, 1, 2, 5, 0.5f};
  const LayerWeights w = make_layer(c, Data::normal), twin = make_layer(c, Data::normal);
  Engine first({{5, w}, {2, twin}},
               {.top_k = 5, .activation_threshold = 0.5f, .screening = Screening::off});
  const Engine engine(std::move(first));
  EXPECT(engine.weights(5).W_enc.const_data_ptr() == w.W_enc.const_data_ptr());
  EXPECT((engine.layers() == std::vector<int64_t>{2, 5}));
  EXPECT_EQUAL(engine.options().top_k, 5);
  const Memory memory = engine.memory();
  EXPECT_EQUAL(memory.weight_bytes, 2 * (40 * 8 + 40) * 4);
  EXPECT_EQUAL(memory.screening_bytes, 0);
  EXPECT(memory.gate_bytes >= 40 * 4 && memory.workspace_bytes > 0);
  const at::Tensor hidden = random({2, 8}, Data::normal);
  check_nearly(c, twin, reference(c, twin, hidden), engine.encode(2, hidden));
}

TEST(engine_top_k_of_each_layer) {
  LayerWeights three = make_layer({40, 8, 1, 1, 1, 1}, Data::normal), many = three;
  three.k = 3;
  many.k = 1000;
  const Engine engine({{0, three}, {1, many}}, {.top_k = Options::layer_k});
  EXPECT_EQUAL(engine.encode(0, at::ones({1, 8})).indices.size(1), 3);
  EXPECT_EQUAL(engine.encode(1, at::ones({1, 8})).indices.size(1), 40);
}

TEST(engine_encodes_in_a_forked_child) {
  const Case c = {600, 32, 1, 40, 9, 0.5f};
  const LayerWeights w = make_layer(c, Data::normal);
  const at::Tensor hidden = random({40, 32}, Data::normal);
  auto engine = std::make_unique<Engine>(std::map<int64_t, LayerWeights>{{0, w}},
                                         Options{.top_k = 9, .lanes = 4});
  const Features expected = engine->encode(0, hidden);
  const pid_t child = fork();
  if (child == 0) {
    alarm(300);
    bool same = true;
    for (int i = 0; i < 10; ++i) same &= same_bits(engine->encode(0, hidden), expected);
    engine.reset();
    _exit(same ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_EQUAL(status, 0);
}

namespace {

// The CPU allocator, counted. Stays installed: blocks it gave out may outlive a test.
class CountingAllocator final : public c10::Allocator {
 public:
  std::atomic<int64_t> blocks{0}, bytes{0}, most_bytes{std::numeric_limits<int64_t>::max()};

  c10::DataPtr allocate(size_t size) override {
    TORCH_CHECK(static_cast<int64_t>(size) <= most_bytes,
                "not enough memory: you tried to allocate ", size, " bytes");
    ++blocks;
    bytes += static_cast<int64_t>(size);
    return inner_->allocate(size);
  }
  c10::DeleterFnPtr raw_deleter() const override { return inner_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t count) const override {
    inner_->copy_data(to, from, count);
  }

 private:
  c10::Allocator* inner_ = c10::GetCPUAllocator();
};

CountingAllocator& counted() {
  static CountingAllocator* const allocator = [] {
    auto* made = new CountingAllocator;
    c10::SetCPUAllocator(made, 255);
    return made;
  }();
  return *allocator;
}

std::atomic<int64_t> news{0};

}  // namespace

// Every allocation of C++, in the library too. Not inlined: gcc would take free for a mismatch.
[[gnu::noinline]] void* operator new(size_t size) {
  ++news;
  if (void* const block = std::malloc(size)) return block;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(size_t size, const std::nothrow_t&) noexcept {
  ++news;
  return std::malloc(size);
}
[[gnu::noinline]] void operator delete(void* block) noexcept { std::free(block); }
[[gnu::noinline]] void operator delete(void* block, size_t) noexcept { std::free(block); }

TEST(engine_allocates_nothing_for_rows_of_the_caller) {
  CountingAllocator& memory = counted();
  std::map<int64_t, LayerWeights> weights;
  for (int64_t id = 0; id < 3; ++id)
    weights[id] = make_layer({900, 40, 1, 1, 1, 1, id == 1 ? "topk" : "layer norm"}, Data::normal);
  const at::Tensor hidden = random({45, 40}, Data::normal);
  for (const Screening screening : screenings) {
    const Engine engine(weights, {.top_k = 10,
                                  .activation_threshold = 0.5f,
                                  .chunk_size = 16,
                                  .lanes = 3,
                                  .screening = screening});
    Arrays outs[] = {{engine, 0, 45}, {engine, 1, 45}, {engine, 2, 45}};
    const LayerRows layers[] = {outs[0].rows(0, hidden), outs[1].rows(1, hidden),
                                outs[2].rows(2, hidden)};
    Explanation explanation;
    engine.encode(layers, &explanation);  // warm-up
    const int64_t blocks = memory.blocks, before = news;
    for (int i = 0; i < 5; ++i) engine.encode(layers, i % 2 ? &explanation : nullptr);
    EXPECT_EQUAL(news - before, 0);
    EXPECT_EQUAL(memory.blocks - blocks, 0);
    EXPECT_EQUAL(explanation.rows, 3 * 45);
    EXPECT_EQUAL(explanation.features, 3 * 900);
    EXPECT_EQUAL(explanation.workers, 3);
    EXPECT(explanation.computed > 0 && explanation.finish_ms > 0);
  }
}

TEST(engine_allocates_its_outputs_and_nothing_else) {
  CountingAllocator& memory = counted();
  std::map<int64_t, LayerWeights> weights;
  std::map<int64_t, at::Tensor> hidden;
  for (int64_t id = 0; id < 3; ++id) {
    weights[id] =
        make_layer({700, 24 + id, 1, 1, 1, 1, id == 1 ? "jumprelu" : "relu", id == 2 ? BF16 : F32},
                   Data::normal);
    hidden[id] = random({2, 45, 24 + id}, Data::normal).to(id == 0 ? F16 : F32);
  }
  hidden[1] = hidden[1].transpose(0, 1).contiguous().transpose(0, 1);
  for (const Screening screening : screenings) {
    const Engine engine(weights, {.top_k = 10,
                                  .activation_threshold = 0.5f,
                                  .chunk_size = 16,
                                  .lanes = 3,
                                  .screening = screening});
    const int64_t workspace = engine.memory().workspace_bytes;
    engine.encode(hidden);  // warm-up
    const int64_t blocks = memory.blocks, bytes = memory.bytes;
    const auto results = engine.encode(hidden);
    EXPECT_EQUAL(memory.blocks - blocks, 3 * 3);
    EXPECT_EQUAL(memory.bytes - bytes, 3 * 90 * (10 * (4 + 8) + 4));
    EXPECT_EQUAL(engine.memory().workspace_bytes, workspace);
  }
}

TEST(engine_workspace_does_not_grow_with_the_input) {
  CountingAllocator& memory = counted();
  const auto workspace = [](int64_t features, int64_t chunk_size) {
    const Engine engine({{0, make_layer({features, 16, 1, 1, 1, 1}, Data::normal)}},
                        {.chunk_size = chunk_size, .lanes = 2});
    return engine.memory().workspace_bytes;
  };
  EXPECT_EQUAL(workspace(2000, 64), workspace(20000, 64));
  EXPECT(workspace(2000, 64) < workspace(2000, 128));
  const int64_t bytes = memory.bytes;
  const Engine engine({{0, make_layer({2000, 16, 1, 1, 1, 1}, Data::normal)}},
                      {.chunk_size = 64, .lanes = 2});
  EXPECT(memory.bytes - bytes >= engine.memory().workspace_bytes);
}

TEST(engine_names_the_bytes_it_cannot_have) {
  CountingAllocator& memory = counted();
  const LayerWeights w = make_layer({40, 8, 1, 1, 1, 1}, Data::normal),
                     large = make_layer({400, 64, 1, 1, 1, 1}, Data::normal);
  const at::Tensor hidden = random({1000, 8}, Data::normal);
  const Engine engine({{4, w}}, {.top_k = 10, .chunk_size = 8});
  memory.most_bytes = 9000;
  EXPECT_THROWS(c10::OutOfMemoryError,
                "layer 4: out of memory: the result needs 124000 bytes; a lower top_k needs less, "
                "got top_k 10",
                engine.encode(4, hidden));
  EXPECT_THROWS(c10::OutOfMemoryError, "a lower chunk_size needs less, got chunk_size 512",
                Engine({{4, w}}, {.top_k = 10}));
  EXPECT_THROWS(
      c10::OutOfMemoryError,
      "layer 4: out of memory: the screening copy needs 76800 bytes; screening \"off\" makes none",
      Engine({{4, large}}, {.screening = Screening::int16}));
  memory.most_bytes = std::numeric_limits<int64_t>::max();
  engine.encode(4, hidden);
}

TEST(engine_refuses_wrong_hidden_states) {
  const Engine engine({{41, make_layer({30, 8, 1, 1, 1, 1}, Data::normal)},
                       {7, make_layer({30, 4, 1, 1, 1, 1}, Data::normal)}});
  const auto encode = [&](const at::Tensor& hidden) { engine.encode(41, hidden); };
  EXPECT_THROWS(c10::ValueError, "layer 41: hidden must be [.., 8], got [1, 2, 9]",
                encode(at::zeros({1, 2, 9})));
  EXPECT_THROWS(c10::ValueError, "layer 41: hidden must be [B, T, H] or [T, H], got [8]",
                encode(at::zeros({8})));
  EXPECT_THROWS(c10::ValueError, "layer 41: hidden must be [B, T, H] or [T, H], got [1, 1, 1, 8]",
                encode(at::zeros({1, 1, 1, 8})));
  EXPECT_THROWS(c10::ValueError, "layer 41: hidden must be dense, got Sparse",
                encode(at::zeros({2, 8}).to_sparse()));
  EXPECT_THROWS(c10::ValueError, "layer 41: hidden must be on cpu like the weights, got meta",
                encode(at::zeros({2, 8}, at::kMeta)));
  EXPECT_THROWS(c10::TypeError,
                "layer 41: hidden must be float32, bfloat16 or float16, got float64",
                encode(at::zeros({2, 8}, at::kDouble)));
  EXPECT_THROWS(c10::TypeError, "layer 41: hidden must be float32, bfloat16 or float16, got int64",
                encode(at::zeros({2, 8}, at::kLong)));
  EXPECT_THROWS(c10::TypeError, "layer 41: hidden must be a tensor, got none",
                encode(at::Tensor()));
  EXPECT_THROWS(c10::IndexError, "layer 12: there is no transcoder for it, only for layers 7, 41",
                engine.encode(12, at::zeros({2, 8})));
  EXPECT_THROWS(c10::IndexError, "layer 12: there is no transcoder", engine.weights(12));
  EXPECT_THROWS(c10::ValueError, "layer 41: hidden must be [.., 8], got [2, 4]",
                engine.encode({{7, at::zeros({2, 4})}, {41, at::zeros({2, 4})}}));
  EXPECT_EQUAL(engine.encode(41, at::zeros({2, 8})).indices.size(0), 2);  // and goes on
}

TEST(engine_refuses_wrong_rows_of_the_caller) {
  const Engine engine({{41, make_layer({30, 8, 1, 1, 1, 1}, Data::normal)}});
  const at::Tensor hidden = at::zeros({2, 8});
  Arrays out(engine, 41, 2);
  const auto encode = [&](auto change) {
    LayerRows layers[] = {out.rows(41, hidden)};
    change(layers[0]);
    engine.encode(layers);
  };
  EXPECT_THROWS(c10::IndexError, "layer 40: there is no transcoder for it, only for layers 41",
                encode([](LayerRows& rows) { rows.layer = 40; }));
  EXPECT_THROWS(c10::ValueError, "layer 41: row_count must be at least 0, got -1",
                encode([](LayerRows& rows) { rows.row_count = -1; }));
  EXPECT_THROWS(c10::TypeError,
                "layer 41: hidden must be float32, bfloat16 or float16, got float64",
                encode([](LayerRows& rows) { rows.dtype = at::kDouble; }));
  EXPECT_THROWS(c10::ValueError, "layer 41: stride must be at least 0, got -8",
                encode([](LayerRows& rows) { rows.stride = -8; }));
  EXPECT_THROWS(c10::ValueError,
                "layer 41: hidden, activations, indices and sparsity must not be null",
                encode([](LayerRows& rows) { rows.indices = nullptr; }));
  encode([](LayerRows& rows) { rows.row_count = 0; });
  EXPECT_EQUAL(out.active[0], -2);
  encode([](LayerRows& rows) { rows.stride = 0; });
  EXPECT(out.active[1] >= 0);
}

TEST(engine_refuses_wrong_weights_and_options) {
  const auto build = [](auto change, Options options = {}) {
    LayerWeights w = make_layer({30, 8, 1, 1, 1, 1}, Data::normal);
    change(w);
    Engine({{9, w}}, options);
  };
  const auto as_it_is = [](LayerWeights&) {};
  build(as_it_is);
  EXPECT_THROWS(c10::ValueError, "layer 9: W_enc [F, H] and b_enc [F] are needed, got no b_enc",
                build([](LayerWeights& w) { w.b_enc = at::Tensor(); }));
  EXPECT_THROWS(c10::ValueError, "layer 9: W_enc must be [F, H] and not empty, got [30]",
                build([](LayerWeights& w) { w.W_enc = w.b_enc; }));
  EXPECT_THROWS(c10::ValueError, "layer 9: W_enc must be [F, H] and not empty, got [0, 8]",
                build([](LayerWeights& w) { w.W_enc = at::zeros({0, 8}); }));
  EXPECT_THROWS(c10::ValueError, "layer 9: b_enc must be [30], got [31]",
                build([](LayerWeights& w) { w.b_enc = at::zeros({31}); }));
  EXPECT_THROWS(
      c10::ValueError, "layer 9 (a file): threshold must be [30], got [30, 1]",
      build([](LayerWeights& w) { w.threshold = at::zeros({30, 1}), w.source = "a file"; }));
  EXPECT_THROWS(c10::TypeError,
                "layer 9: W_enc must be a dense float32, bfloat16 or float16 tensor, got float64",
                build([](LayerWeights& w) { w.W_enc = w.W_enc.to(at::kDouble); }));
  EXPECT_THROWS(c10::ValueError, "layer 9: W_enc must be finite, got NaN or Inf in feature 17",
                build([](LayerWeights& w) { w.W_enc[17][3] = quiet_nan; }));
  EXPECT_THROWS(c10::ValueError, "layer 9: b_enc must be finite",
                build([](LayerWeights& w) { w.b_enc[29] = inf; }));
  EXPECT_THROWS(c10::ValueError, "layer 9: k must be at least 1, got 0",
                build([](LayerWeights& w) { w.k = 0; }));
  EXPECT_THROWS(c10::ValueError, "layer 9: LayerNorm needs both ln_weight and ln_bias",
                build([](LayerWeights& w) { w.ln_weight = at::ones({8}); }));
  EXPECT_THROWS(c10::ValueError, "top_k must be at least 1", build(as_it_is, {.top_k = -1}));
  EXPECT_THROWS(c10::ValueError,
                "layer 9: top_k=None takes k from the checkpoint, which declares none",
                build(as_it_is, {.top_k = Options::layer_k}));
  EXPECT_THROWS(c10::ValueError, "chunk_size must be at least 1, got 0",
                build(as_it_is, {.chunk_size = 0}));
  EXPECT_THROWS(c10::ValueError, "lanes must be at least 1, or 0 to choose, got -1",
                build(as_it_is, {.lanes = -1}));
  EXPECT_THROWS(c10::ValueError, "activation_threshold must be a number, got NaN",
                build(as_it_is, {.activation_threshold = quiet_nan}));
  EXPECT_THROWS(c10::ValueError, "at least one layer", Engine({}));
}
