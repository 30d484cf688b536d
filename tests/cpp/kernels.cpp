// The inner loops: against wider arithmetic, and one instruction set against another.
#include "cpu/kernels/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "bounds.h"
#include "check.h"
#include "cpu/reservoir.h"

using namespace sparse_transcoder;
using namespace sparse_transcoder::cpu;

namespace {

constexpr int64_t sizes[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 577};
constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float quiet_nan = std::numeric_limits<float>::quiet_NaN();

// Elements of one type in a buffer of exactly their bytes, and what they are worth.
struct Elements {
  std::vector<char> stored;
  std::vector<double> value;

  const char* at(int64_t i) const { return stored.data() + i * (stored.size() / value.size()); }
};

// What 16 stored bits are worth, by the definition of a floating-point number.
double worth(Dtype type, unsigned bits) {
  const int fraction_bits = type == Dtype::bfloat16 ? 7 : 10;
  const int max_exponent = type == Dtype::bfloat16 ? 255 : 31;
  const int exponent = bits >> fraction_bits & max_exponent;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == max_exponent) return fraction == 0 ? sign * inf : quiet_nan;
  const int digits = exponent == 0 ? fraction : fraction + (1 << fraction_bits);
  return sign * std::ldexp(digits, std::max(exponent, 1) - max_exponent / 2 - fraction_bits);
}

// The bits of a finite number that is normal in bfloat16 and small enough for float16, cut off.
unsigned narrow(Dtype type, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (type == Dtype::bfloat16) return bits >> 16;
  // Float16 steps by 2^(exponent - 10), from 2^-14 on down by 2^-24.
  const int exponent = std::max(std::ilogb(value), -14);
  const auto digits = static_cast<unsigned>(std::ldexp(std::fabs(value), 10 - exponent));
  return bits >> 31 << 15 | (digits + ((exponent + 14) << 10));
}

const KernelTable& portable_kernels = runnable_kernels().front();

std::mt19937 random_bits(7);

float normal() { return std::normal_distribution<float>()(random_bits); }

Elements make(Dtype type, int64_t count) {
  Elements made;
  for (int64_t i = 0; i < count; ++i) {
    // Sizes over many octaves, so that the order of a sum matters.
    const float value = normal() * std::ldexp(1.0f, static_cast<int>(random_bits() % 17) - 8);
    const auto bits = static_cast<uint16_t>(type == Dtype::float32 ? 0 : narrow(type, value));
    made.value.push_back(type == Dtype::float32 ? value : worth(type, bits));
    const char* bytes = type == Dtype::float32 ? reinterpret_cast<const char*>(&value)
                                               : reinterpret_cast<const char*>(&bits);
    made.stored.insert(made.stored.end(), bytes, bytes + (type == Dtype::float32 ? 4 : 2));
  }
  return made;
}

const float* floats(const Elements& x, int64_t i = 0) {
  return reinterpret_cast<const float*>(x.at(i));
}

}  // namespace

TEST(kernels_dot) {
  for (int type = 0; type < 3; ++type)
    for (const int64_t size : sizes)
      for (int64_t skip = 0; skip < 2; ++skip) {  // also where no vector is aligned
        const Elements x = make(Dtype::float32, size + skip), w = make(Dtype(type), size + skip);
        long double exact = 0, magnitude = 0;
        for (int64_t i = skip; i < size + skip; ++i) {
          exact += static_cast<long double>(x.value[i]) * w.value[i];
          magnitude += std::fabs(static_cast<long double>(x.value[i]) * w.value[i]);
        }
        const Elements other = make(Dtype::float32, size);
        const float* const row = floats(x, skip);
        double first;
        portable_kernels.dot[type](&row, 1, w.at(skip), size, &first);
        for (const KernelTable& kernels : runnable_kernels())
          for (int64_t count = 1; count <= dot_rows; ++count)
            for (int64_t place = 0; place < count; ++place) {  // among rows of other numbers
              const float* beside[dot_rows] = {floats(other), floats(other), floats(other),
                                               floats(other)};
              beside[place] = row;
              double values[dot_rows];
              kernels.dot[type](beside, count, w.at(skip), size, values);
              EXPECT(std::fabs(values[place] - exact) <= magnitude * (size * 0x1p-53L));
              EXPECT(std::memcmp(&values[place], &first, sizeof(first)) == 0);
            }
      }
}

TEST(kernels_dot_keeps_its_order) {
  // Elements 5 and 37 share one of the 32 partial sums and cancel there; added in a row they would
  // swallow all between them.
  std::vector<float> x(64, 1), w(64, 1);
  x[5] = 0x1p60f;
  w[37] = -0x1p60f;
  for (const KernelTable& kernels : runnable_kernels()) {
    const float* const rows[] = {x.data(), x.data(), x.data(), x.data()};
    for (int64_t count = 1; count <= dot_rows; ++count) {
      double sums[dot_rows];
      kernels.dot[0](rows, count, w.data(), 64, sums);
      for (int64_t r = 0; r < count; ++r) EXPECT_EQUAL(sums[r], 62.0);
      kernels.dot[0](rows, count, w.data(), 0, sums);
      for (int64_t r = 0; r < count; ++r) EXPECT_EQUAL(sums[r], 0.0);
    }
  }
}

TEST(kernels_widen_every_value) {
  for (int type = 1; type < 3; ++type) {
    std::vector<uint16_t> stored(65536);
    for (size_t i = 0; i < stored.size(); ++i) stored[i] = static_cast<uint16_t>(i);
    for (const KernelTable& kernels : runnable_kernels()) {
      std::vector<float> wide(65536);
      kernels.widen[type](stored.data(), wide.data(), 65536);
      int64_t wrong = 0;
      for (int64_t i = 0; i < 65536; ++i) {
        const auto want = static_cast<float>(worth(Dtype(type), stored[i]));
        wrong += std::isnan(want) ? !std::isnan(wide[i])
                                  : std::memcmp(&wide[i], &want, sizeof(want)) != 0;
      }
      EXPECT_EQUAL(wrong, 0);
    }
  }
}

TEST(kernels_widen_every_size) {
  for (int type = 0; type < 3; ++type)
    for (const int64_t size : sizes) {
      const Elements w = make(Dtype(type), size);
      for (const KernelTable& kernels : runnable_kernels()) {
        std::vector<float> wide(size);
        kernels.widen[type](w.at(0), wide.data(), size);
        for (int64_t i = 0; i < size; ++i) EXPECT_EQUAL(wide[i], w.value[i]);
      }
    }
}

namespace {

// Every set's product of random rows and features, against float64. Nothing is written behind it.
void check_product(int type, int64_t rows, int64_t count, int64_t size) {
  const Elements x = make(Dtype::float32, rows * size), w = make(Dtype(type), count * size);
  for (const KernelTable& kernels : runnable_kernels()) {
    std::vector<float> scores(rows * count + 1, quiet_nan);
    scores.back() = 12345;
    kernels.product[type](floats(x), rows, w.at(0), count, size, scores.data());
    EXPECT_EQUAL(scores.back(), 12345);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t f = 0; f < count; ++f) {
        double exact = 0, xx = 0, ww = 0;
        for (int64_t i = 0; i < size; ++i) {
          const double a = x.value[r * size + i], b = w.value[f * size + i];
          exact += a * b, xx += a * a, ww += b * b;
        }
        EXPECT(std::fabs(scores[r * count + f] - exact) <=
               product_rounding(size) * std::sqrt(xx * ww));
      }
  }
}

}  // namespace

TEST(kernels_product_within_its_bound) {
  for (int type = 0; type < 3; ++type)
    for (const int64_t size : sizes)
      for (int64_t rows = 1; rows <= 9; ++rows)
        for (int64_t count = 1; count <= 10; count += 1 + (size > 64))
          check_product(type, rows, count, size);
}

// More rows than any set keeps in its caches, and a last few that fill no block.
TEST(kernels_product_of_many_rows) {
  for (int type = 0; type < 3; ++type) check_product(type, 75, 6, 577);
}

namespace {

// A panel of features as a layer prepares it, and one row's true values and scores.
struct Panel {
  std::vector<float> norm, bias, gate, low, high, residual, scores;
  std::vector<double> exact;

  FeatureBounds view() const {
    return {norm.data(), bias.data(), gate.data(), low.data(), high.data()};
  }
  bool active(int64_t i) const { return exact[i] >= gate[i]; }
};

Panel make_panel(int64_t count, Margin margin) {
  Panel p;
  for (int64_t i = 0; i < count; ++i) {
    p.norm.push_back(1 + random_bits() % 8 / 8.0f);
    p.residual.push_back(random_bits() % 8 / 8.0f);
    p.bias.push_back(normal());
    p.gate.push_back(1 + random_bits() % 3 / 2.0f);
    const double slack = (p.gate[i] + std::fabs(p.bias[i])) * 0x1p-21;
    p.low.push_back(static_cast<float>(double{p.gate[i]} - p.bias[i] - slack));
    p.high.push_back(static_cast<float>(double{p.gate[i]} - p.bias[i] + slack));
    // A third on the gate, a third near it, a third anywhere.
    const int kind = random_bits() % 3;
    const double slack_here =
        double{margin.per_norm} * p.norm[i] + double{margin.per_residual} * p.residual[i];
    const double away = kind == 0 ? 0 : normal() * (kind == 1 ? slack_here : 2);
    p.exact.push_back(double{static_cast<float>(p.gate[i] + (std::isfinite(away) ? away : 1))});
    const double error =
        std::isfinite(slack_here) ? slack_here * (random_bits() % 201 / 100.0 - 1) : 0;
    p.scores.push_back(static_cast<float>(p.exact[i] - p.bias[i] + error));
  }
  return p;
}

}  // namespace

TEST(kernels_gate_loses_and_miscounts_nothing) {
  for (const Margin margin : {Margin{0, 0}, {0.01f, 0}, {0, 0.02f}, {0.3f, 1}, {inf, 0}})
    for (const float min_value : {-inf, 0.0f, 2.0f, inf})
      for (int64_t count = 0; count <= 70; ++count) {
        const int64_t first = random_bits() % 3 * 5, all = first + count;
        const Panel p = make_panel(all, margin);
        const FeatureBounds bounds = p.view();
        int64_t active = 0;
        for (int64_t i = first; i < all; ++i) active += p.active(i);
        for (const KernelTable& kernels : runnable_kernels()) {
          std::vector<uint32_t> out(count);
          int64_t counted = 0;
          const int64_t found = kernels.gate_row(
              {p.scores.data() + first, bounds, p.residual.data(), first, count, margin, min_value},
              out.data(), &counted);
          EXPECT(found <= count);
          std::vector<bool> listed(all);
          for (int64_t j = 0; j < found; ++j) {
            const int64_t i = first + (out[j] >> 1);
            EXPECT(i < all && (j == 0 || out[j] >> 1 > out[j - 1] >> 1));
            listed[i] = true;
            if (out[j] & 1)
              counted += p.active(i);
            else
              EXPECT(p.active(i));
          }
          EXPECT_EQUAL(counted, active);
          for (int64_t i = first; i < all; ++i)
            EXPECT(listed[i] || !p.active(i) ||
                   p.exact[i] <= min_value + 1e-5 * (std::fabs(min_value) + std::fabs(p.bias[i])));
        }
      }
}

TEST(kernels_gate_is_the_same_everywhere) {
  const float odd[] = {0,
                       -0.0f,
                       inf,
                       -inf,
                       quiet_nan,
                       std::numeric_limits<float>::max(),
                       std::numeric_limits<float>::denorm_min()};
  for (const Margin margin :
       {Margin{0, 0}, {0.25f, 0}, {0.125f, 0.25f}, {inf, 0}, {quiet_nan, 0}, {0, quiet_nan}})
    for (const float min_value : {-inf, 1.0f, inf, quiet_nan})
      for (const int64_t count : {0, 1, 7, 8, 9, 16, 31, 250, 511, 512, 513}) {
        Panel p = make_panel(count, {0.125f, 0.125f});
        for (float& score : p.scores)
          if (random_bits() % 4 == 0) score = odd[random_bits() % std::size(odd)];
        std::vector<uint32_t> first(count), other(count);
        int64_t first_counted = 3, other_counted = 3;
        const FeatureBounds bounds = p.view();
        const auto run = [&](const KernelTable& kernels, std::vector<uint32_t>& out,
                             int64_t& counted) {
          return kernels.gate_row(
              {p.scores.data(), bounds, p.residual.data(), 0, count, margin, min_value}, out.data(),
              &counted);
        };
        const int64_t found = run(portable_kernels, first, first_counted);
        for (const KernelTable& kernels : runnable_kernels()) {
          other_counted = 3;
          EXPECT_EQUAL(run(kernels, other, other_counted), found);
          EXPECT(std::equal(first.begin(), first.begin() + found, other.begin()));
          EXPECT_EQUAL(other_counted, first_counted);
        }
        if (std::isnan(margin.per_norm + margin.per_residual))
          EXPECT_EQUAL(found, count);  // nothing is ruled out
      }
}

TEST(kernels_keys_order_by_value_then_by_lower_feature) {
  const float values[] = {std::numeric_limits<float>::denorm_min(),
                          std::numeric_limits<float>::min(),
                          1,
                          std::nextafter(1.0f, 2.0f),
                          std::numeric_limits<float>::max(),
                          inf};
  const int64_t features[] = {0, 1, 77, (int64_t{1} << 31) - 1};
  uint64_t last = 0;
  for (const float value : values)
    for (int i = 3; i >= 0; --i) {
      const uint64_t key = make_key(value, features[i]);
      EXPECT(key > last);
      EXPECT_EQUAL(key_value(key), value);
      EXPECT_EQUAL(key_feature(key), features[i]);
      last = key;
    }
}

TEST(kernels_sort_keys) {
  for (const KernelTable& kernels : runnable_kernels())
    for (int64_t count = 0; count <= 300; ++count) {
      std::vector<uint64_t> keys;
      for (int64_t f = 0; f < count; ++f)  // values that differ in any bit, and equal ones
        keys.push_back(
            make_key(f % 3 == 0 ? 1.0f : std::ldexp(1 + std::abs(normal()), f % 120), f));
      std::shuffle(keys.begin(), keys.end(), random_bits);
      std::vector<uint64_t> sorted = keys;
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      kernels.sort_keys(keys.data(), count);
      EXPECT(keys == sorted);
    }
}

TEST(kernels_reservoir_keeps_the_best) {
  for (const int64_t features : {1, 2, 31, 33, 70, 500, 3000})
    for (const int64_t wanted : {1, 2, 31, 32, 33, 64, 65, 200, 3000})
      for (const int different : {1, 3, 1 << 20}) {
        const int64_t k = std::min(wanted, features), capacity = reservoir_capacity(k, features);
        EXPECT(capacity >= k && capacity <= features);
        std::vector<uint64_t> keys(capacity), all;
        Reservoir reservoir = {keys.data(), nullptr, k, capacity};
        for (int64_t f = 0; f < features; ++f) {
          all.push_back(make_key(1.0f + random_bits() % different, f));
          reservoir.add(all.back());
          EXPECT(reservoir.size <= capacity);
          if (reservoir.kth_best != 0)  // what it turns away must be beaten k times
            EXPECT(std::count_if(all.begin(), all.end(),
                                 [&](uint64_t key) { return key >= reservoir.kth_best; }) >= k);
        }
        reservoir.shrink_to_k();
        EXPECT_EQUAL(reservoir.size, k);
        std::sort(keys.begin(), keys.begin() + k, std::greater<>());
        std::sort(all.begin(), all.end(), std::greater<>());
        EXPECT(std::equal(all.begin(), all.begin() + k, keys.begin()));
      }
}

TEST(kernels_reservoir_may_defer_what_it_computes) {
  for (const int64_t features : {1, 2, 33, 70, 500, 3000})
    for (const int64_t wanted : {1, 2, 31, 64, 200, 3000})
      for (const float width : {0.0f, 0.01f, 0.5f, 100.0f})
        for (const int order : {-1, 0, 1}) {  // falling, any, rising
          const int64_t k = std::min(wanted, features), capacity = reservoir_capacity(k, features);
          std::vector<uint64_t> keys(capacity), all;
          std::vector<DeferredFeature> deferred(capacity);
          Reservoir reservoir = {keys.data(), deferred.data(), k, capacity};
          const auto compute_deferred = [&] {
            for (int64_t i = 0; i < reservoir.deferred_count; ++i)
              reservoir.add(all[deferred[i].feature]);
            reservoir.deferred_count = 0;
          };
          for (int64_t f = 0; f < features; ++f) {
            const float value =
                1 + (order == 0 ? random_bits() % 1000 / 500.0f : 1 + order * (f / 5) / 1000.0f);
            all.push_back(make_key(value, f));
            const float lower = value - width * (random_bits() % 5 / 4.0f),
                        upper = value + width * (random_bits() % 5 / 4.0f);
            if (reservoir.defer({lower, upper, static_cast<uint32_t>(f)})) continue;
            compute_deferred();
            reservoir.add(all.back());
          }
          EXPECT(reservoir.deferred_count <= capacity);
          if (reservoir.deferred_kth_best > 0)  // what it turns away must be beaten k times
            EXPECT(std::count_if(all.begin(), all.end(), [&](uint64_t key) {
                     return key_value(key) >= reservoir.deferred_kth_best;
                   }) >= k);
          EXPECT(reservoir.min_activation() >= reservoir.deferred_kth_best);
          reservoir.drop_beaten();
          compute_deferred();
          reservoir.shrink_to_k();
          EXPECT_EQUAL(reservoir.size, k);
          std::sort(keys.begin(), keys.begin() + k, std::greater<>());
          std::sort(all.begin(), all.end(), std::greater<>());
          EXPECT(std::equal(all.begin(), all.begin() + k, keys.begin()));
        }
}

TEST(kernels_are_chosen_by_name) {
  const char* forced = std::getenv("SPARSE_TRANSCODER_CPU");
  const std::string_view expected = forced ? forced : runnable_kernels().back().name;
  EXPECT_EQUAL(active_kernels().name, expected);
}

TEST(kernels_have_every_loop_and_a_name_of_their_own) {
  std::vector<std::string_view> names;
  for (const KernelTable& kernels : runnable_kernels()) {
    EXPECT(std::find(names.begin(), names.end(), kernels.name) == names.end());
    names.push_back(kernels.name);
    for (int type = 0; type < 3; ++type)
      EXPECT(kernels.dot[type] && kernels.product[type] && kernels.widen[type]);
    EXPECT(kernels.gate_row && kernels.quantise_row && kernels.quantise_panel &&
           kernels.screen_int8 && kernels.quantise_int16 && kernels.dot_int16 &&
           kernels.product_int16 && kernels.sort_keys);
  }
  EXPECT_EQUAL(names.front(), "portable");
}
