// Every element of every result is written, whatever the shape and whatever others change
// meanwhile: all memory that torch gives out holds 0xff, which is no result.
#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <sparse_transcoder/engine.h>

#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "check.h"

using namespace sparse_transcoder;

namespace {

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float quiet_nan = std::numeric_limits<float>::quiet_NaN();

constexpr Screening screenings[] = {Screening::automatic, Screening::off, Screening::int16,
                                    Screening::int8};

// Fills what it gives out, and lets a test act at that moment. Stays installed: blocks it gave out
// may outlive a test.
class PoisoningAllocator final : public c10::Allocator {
 public:
  std::function<void(size_t)> before;  // called with the size of each block

  c10::DataPtr allocate(size_t size) override {
    if (before) before(size);
    c10::DataPtr memory = inner_->allocate(size);
    if (size > 0) std::memset(memory.get(), 0xff, size);
    return memory;
  }
  c10::DeleterFnPtr raw_deleter() const override { return inner_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t count) const override {
    inner_->copy_data(to, from, count);
  }

 private:
  c10::Allocator* inner_ = c10::GetCPUAllocator();
};

PoisoningAllocator& poisoned() {
  static PoisoningAllocator* const allocator = [] {
    auto* made = new PoisoningAllocator;
    c10::SetCPUAllocator(made, 255);
    return made;
  }();
  return *allocator;
}

bool is_written(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits != 0xffffffff;
}

int64_t unwritten_floats(const at::Tensor& t) {
  int64_t count = 0;
  for (int64_t i = 0; i < t.numel(); ++i) count += !is_written(t.const_data_ptr<float>()[i]);
  return count;
}

// Indices that are no feature, as those of memory that nothing wrote are.
int64_t strange(const at::Tensor& indices, int64_t features) {
  return ((indices < 0) | (indices >= features)).sum().item<int64_t>();
}

void check_written(const Features& out, int64_t features) {
  EXPECT_EQUAL(unwritten_floats(out.activations), 0);
  EXPECT_EQUAL(unwritten_floats(out.sparsity), 0);
  EXPECT_EQUAL(strange(out.indices, features), 0);
  if (out.indices.size(-1) < 2) return;
  const at::Tensor sorted = std::get<0>(out.indices.sort(-1));
  EXPECT((sorted.diff() > 0).all().item<bool>());
}

void check_written(const SparseFeatures& out, int64_t features) {
  EXPECT_EQUAL(unwritten_floats(out.activations), 0);
  EXPECT_EQUAL(strange(out.features, features), 0);
  EXPECT_EQUAL(out.row_begin[0].item<int64_t>(), 0);
  EXPECT_EQUAL(out.row_begin[-1].item<int64_t>(), out.features.numel());
  EXPECT((out.row_begin.diff() >= 0).all().item<bool>());
  EXPECT(((out.activations > 0) | out.activations.isnan()).all().item<bool>());
}

LayerWeights make_layer(int64_t features, int64_t size, bool top_k = false) {
  LayerWeights w;
  w.W_enc = at::randn({features, size}) / std::sqrt(static_cast<double>(size));
  w.b_enc = at::randn({features});
  w.W_dec = at::randn({size, features});
  w.b_dec = at::randn({size});
  if (top_k) w.k = std::max<int64_t>(1, features / 3);
  return w;
}

}  // namespace

TEST(written_results_of_every_shape) {
  at::manual_seed(3);
  poisoned();
  for (const int64_t features : {1, 63, 64, 65, 300, 513})
    for (const bool top_k : {false, true}) {
      const LayerWeights w = make_layer(features, 9, top_k);
      for (const int64_t rows : {0, 1, 2, 15, 16, 17, 33})
        for (const int64_t chunk_size : {1, 7, 512})
          for (const float threshold : {0.0f, 0.5f, inf})
            for (const Screening screening : screenings) {
              at::Tensor hidden = at::randn({rows, 9});
              if (rows > 2) hidden[1][4] = quiet_nan;
              if (rows > 15) hidden[9].mul_(1e30);  // too large to screen
              const int64_t k = std::array<int64_t, 4>{1, 20, features, features + 7}[rows % 4];
              const Engine engine({{0, w}, {1, w}}, {.top_k = k,
                                                     .activation_threshold = threshold,
                                                     .chunk_size = chunk_size,
                                                     .lanes = 3,
                                                     .screening = screening});
              for (const auto& [id, out] : engine.encode({{0, hidden}, {1, hidden}})) {
                check_written(out, features);
                EXPECT_EQUAL(unwritten_floats(engine.decode(id, out.activations, out.indices)), 0);
              }
              for (const auto& [id, out] : engine.encode_sparse({{0, hidden}, {1, hidden}})) {
                check_written(out, features);
                EXPECT_EQUAL(unwritten_floats(engine.decode(id, out)), 0);
              }
            }
    }
}

// Someone else changes hidden states after they were counted and before they are written.
TEST(written_where_hidden_states_change_in_a_call) {
  at::manual_seed(4);
  PoisoningAllocator& memory = poisoned();
  const std::function<void(at::Tensor)> changes[] = {
      [](at::Tensor x) { x.zero_(); },     [](at::Tensor x) { x.neg_(); },
      [](at::Tensor x) { x.mul_(3); },     [](at::Tensor x) { x.fill_(quiet_nan); },
      [](at::Tensor x) { x.normal_(); },   [](at::Tensor x) { x.slice(0, 5).fill_(inf); },
      [](at::Tensor x) { x[0].fill_(1); },
  };
  for (const bool top_k : {false, true})
    for (const Screening screening : screenings)
      for (const auto& change : changes) {
        LayerWeights w = make_layer(300, 12, top_k);
        w.b_enc.zero_();
        const Engine engine({{5, w}}, {.activation_threshold = 0.2f, .screening = screening});
        const at::Tensor hidden = at::randn({21, 12});
        hidden[0].fill_(quiet_nan);
        int64_t blocks = 0;
        memory.before = [&](size_t size) {
          if (size < 8 * 300 || ++blocks > 1) return;  // row_begin is smaller, features are not
          change(hidden);
        };
        try {
          check_written(engine.encode_sparse(5, hidden), 300);
        } catch (const c10::ValueError& error) {
          EXPECT(std::strstr(error.what_without_backtrace(), "layer 5: ") != nullptr);
          blocks = -1;
        }
        memory.before = nullptr;
        EXPECT(top_k || blocks == -1);  // a top-k coder may have as many entries as before
        check_written(engine.encode_sparse(5, at::randn({21, 12})), 300);
      }
}

// A change that no version counter and no sample shows.
TEST(written_where_a_feature_changes_unseen) {
  at::manual_seed(5);
  poisoned();
  for (const Screening screening : screenings) {
    const LayerWeights w = make_layer(300, 12);
    const Engine engine({{5, w}}, {.activation_threshold = 0.2f, .screening = screening});
    const at::Tensor hidden = at::randn({1, 12}) * 10;
    const int64_t best = engine.encode(5, hidden).indices[0][0].item<int64_t>();
    w.W_enc.variable_data()[best].neg_();
    // What these let through they compute before they count it.
    if (screening == Screening::off || screening == Screening::int8) {
      EXPECT(engine.encode(5, hidden).indices[0][0].item<int64_t>() != best);
      continue;
    }
    EXPECT_THROWS(c10::ValueError, "layer 5: weights must stay as they were",
                  engine.encode(5, hidden));
    EXPECT_THROWS(c10::ValueError, "layer 5: weights must stay as they were",
                  engine.encode_sparse(5, hidden));
    engine.encode(5, at::zeros({1, 12}));  // a call's contradiction is not the next one's
  }
}

TEST(written_never_with_changed_weights) {
  at::manual_seed(6);
  const std::pair<const char*, at::Tensor LayerWeights::*> fields[] = {
      {"W_enc", &LayerWeights::W_enc},           {"b_enc", &LayerWeights::b_enc},
      {"W_dec", &LayerWeights::W_dec},           {"b_dec", &LayerWeights::b_dec},
      {"threshold", &LayerWeights::threshold},   {"W_skip", &LayerWeights::W_skip},
      {"input_bias", &LayerWeights::input_bias}, {"ln_weight", &LayerWeights::ln_weight},
      {"ln_bias", &LayerWeights::ln_bias}};
  const std::function<void(at::Tensor&)> changes[] = {
      [](at::Tensor& t) { t.add_(1); },
      [](at::Tensor& t) { t.view({-1})[1] = 2; },
      [](at::Tensor& t) { t.variable_data().add_(1); },
      [](at::Tensor& t) { t.set_data(t.detach().clone()); },
      [](at::Tensor& t) { t.set_data(t.detach().to(at::kHalf)); },
      [](at::Tensor& t) { t.storage().unsafeGetStorageImpl()->set_data_ptr_noswap({}); },
  };
  for (const auto& [name, field] : fields)
    for (const auto& change : changes) {
      LayerWeights w = make_layer(40, 6);
      w.threshold = at::rand({40});
      w.W_skip = at::randn({6, 6});
      w.input_bias = at::randn({6});
      w.ln_weight = at::ones({6});
      w.ln_bias = at::zeros({6});
      const Engine engine({{9, w}, {4, make_layer(40, 6)}}, {.activation_threshold = 0});
      const at::Tensor hidden = at::randn({3, 6});
      const Features before = engine.encode(9, hidden);
      engine.decode(9, before.activations, before.indices, hidden);
      change(w.*field);
      const std::string words =
          std::string("layer 9: ") + name + " must stay as it was when the encoder was built";
      EXPECT_THROWS(c10::ValueError, words, engine.encode(9, hidden));
      EXPECT_THROWS(c10::ValueError, words, engine.encode({{4, hidden}, {9, hidden}}));
      EXPECT_THROWS(c10::ValueError, words, engine.encode_sparse(9, hidden));
      EXPECT_THROWS(c10::ValueError, words, engine.explain(9, hidden));
      EXPECT_THROWS(c10::ValueError, words,
                    engine.decode(9, before.activations, before.indices, hidden));
      EXPECT_THROWS(c10::ValueError, words, engine.check_unchanged(9));
      engine.encode(4, hidden);
    }
}
