// The int8 and int16 screens: integer sums to the bit, margins against wider arithmetic, rows made
// to break them.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "bounds.h"
#include "check.h"
#include "cpu/kernels/kernels.h"
#include "int8.h"

using namespace sparse_transcoder;
using namespace sparse_transcoder::cpu;

namespace {

constexpr int64_t sizes[] = {1,   2,   3,   4,   5,   31,   32,   33,   63,  64,  65,
                             100, 127, 128, 129, 191, 192,  193,  255,  256, 257, 511,
                             512, 513, 576, 577, 769, 1000, 1025, 2048, 3001};
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float largest = std::numeric_limits<float>::max();

std::mt19937 random_bits(23);

float normal() { return std::normal_distribution<float>()(random_bits); }
int between(int least, int most) {
  return least + static_cast<int>(random_bits() % (most - least + 1));
}

long double dot(const float* x, const float* w, int64_t size) {
  long double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += static_cast<long double>(x[i]) * w[i];
  return sum;
}

long double dot_of(const std::vector<double>& a, const std::vector<double>& b) {
  long double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += static_cast<long double>(a[i]) * b[i];
  return sum;
}

long double norm(const float* x, int64_t size) { return std::sqrt(dot(x, x, size)); }

float rounded_down(long double value) {
  float rounded = static_cast<float>(value);
  return rounded > value ? std::nextafter(rounded, -infinity) : rounded;
}

float rounded_up(long double value) { return -rounded_down(-value); }

using Maker = float (*)(int64_t i, int64_t size);
struct Kind {
  const char* name;
  Maker make;
};

// Rows and features alike. Products of two of them stay below what the engine screens, ||x|| ||w||
// <= 1e37.
constexpr Kind kinds[] = {
    {"gaussian", [](int64_t, int64_t) { return normal(); }},
    {"heavy tails", [](int64_t, int64_t) { return normal() * std::exp(2 * normal()); }},
    {"whole", [](int64_t, int64_t) { return static_cast<float>(between(-3, 3)); }},
    {"all equal", [](int64_t, int64_t) { return 0.7f; }},
    {"all negative", [](int64_t, int64_t) { return -1.3f; }},
    {"alternating", [](int64_t i, int64_t) { return i % 2 ? -1.0f : 1.0f; }},
    {"one huge", [](int64_t i, int64_t size) { return i == size / 2 ? 1e18f : normal(); }},
    {"one huge among zeros", [](int64_t i, int64_t size) { return i == size - 1 ? -3e17f : 0.0f; }},
    {"one group huge",
     [](int64_t i, int64_t size) { return (i < size / 3 ? 1e4f : 1e-4f) * normal(); }},
    {"zeros", [](int64_t, int64_t) { return 0.0f; }},
    {"denormal", [](int64_t, int64_t) { return 1e-41f * normal(); }},
    {"denormals beside ones",
     [](int64_t i, int64_t) { return i % 3 ? 1e-40f * normal() : normal(); }},
    {"tiny", [](int64_t, int64_t) { return 1e-18f * normal(); }},
    {"tinier", [](int64_t, int64_t) { return 1e-30f * normal(); }},
    {"large", [](int64_t, int64_t) { return 1e15f * normal(); }},
    {"halves", [](int64_t i, int64_t) { return i == 0 ? 127.0f : between(-126, 125) + 0.5f; }},
};

std::vector<float> make(const Kind& kind, int64_t rows, int64_t size) {
  std::vector<float> x(rows * size);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < size; ++i) x[r * size + i] = kind.make(i, size);
  return x;
}

struct Int8Rows {
  Int8Rows(const KernelTable& kernels, const Int8Layout& layout, const std::vector<float>& x,
           int64_t planes)
      : stride(planes * layout.row_bytes()), bytes(x.size() / layout.size * stride + 1, 77) {
    std::vector<float> rotated(layout.inputs + 1, -5);
    for (int64_t r = 0; r < static_cast<int64_t>(x.size()) / layout.size; ++r)
      kernels.quantise_row(layout, x.data() + r * layout.size, planes, row(r), rotated.data());
    EXPECT(bytes.back() == 77 && rotated.back() == -5);
  }
  int8_t* row(int64_t r) { return bytes.data() + r * stride; }

  int64_t stride;
  std::vector<int8_t> bytes;
};

std::vector<uint8_t> int8_panel(const KernelTable& kernels, const Int8Layout& layout,
                                const std::vector<float>& w) {
  std::vector<uint8_t> panel(layout.panel_bytes() + 1, 77);
  kernels.quantise_panel(layout, w.data(), static_cast<int64_t>(w.size()) / layout.size,
                         panel.data());
  EXPECT(panel.back() == 77);
  return panel;
}

// Masks of rows [first, first + count); every place that nothing may be written to is looked at.
std::vector<uint64_t> screen(const KernelTable& kernels, const Int8Layout& layout, Int8Rows& rows,
                             int64_t first, int64_t count, int64_t planes,
                             const std::vector<uint8_t>& panel, const std::vector<float>& low) {
  std::vector<uint64_t> masks(count + 1, 67890);
  Prefetcher prefetcher;
  prefetcher.add(panel.data(), layout.panel_bytes());
  kernels.screen_int8({layout, rows.row(first), count, planes, panel.data(), low.data()},
                      masks.data(), prefetcher);
  EXPECT_EQUAL(masks.back(), 67890u);
  masks.pop_back();
  return masks;
}

// Of the pairs of kinds, long rows take one in seven. SPARSE_TRANSCODER_TEST_ONE_IN=16 leaves one
// in 16 of those, for an emulator.
bool left_out(int64_t size) {
  static const char* setting = std::getenv("SPARSE_TRANSCODER_TEST_ONE_IN");
  static const uint64_t one_in = setting == nullptr ? 1 : std::stoul(setting);
  static uint64_t asked = 0;
  return ++asked % (size > 200 ? 7 * one_in : one_in) != 0;
}

std::string at(const KernelTable& kernels, const Kind& x, const Kind& w, int64_t size) {
  return std::string(kernels.name) + ", rows " + x.name + ", features " + w.name + ", size " +
         std::to_string(size);
}

}  // namespace

TEST(screening_layouts_hold_their_inputs) {
  for (int64_t size = 1; size <= 40000; size += 1 + size / 300) {
    const Int8Layout layout(size);
    EXPECT(layout.inputs >= size && layout.inputs < size + 64 && layout.inputs % 64 == 0);
    EXPECT(layout.mixed >= 64 && layout.inputs % layout.mixed == 0 &&
           (layout.mixed & (layout.mixed - 1)) == 0);
    EXPECT(layout.mixed == 64 || layout.inputs / layout.mixed >= 16);
    EXPECT(layout.row_bytes() % 128 == 64 &&
           layout.row_bytes() >= layout.inputs + static_cast<int64_t>(sizeof(Int8Row)));
    EXPECT(layout.row_bytes() < layout.inputs + static_cast<int64_t>(sizeof(Int8Row)) + 192);
    EXPECT_EQUAL(layout.panel_bytes(),
                 panel_features * layout.inputs + static_cast<int64_t>(sizeof(Int8Features)));
    EXPECT(int16_part_size(size) % 128 == 0 && int16_part_size(size) <= 640 &&
           (size > 640 || int16_part_size(size) >= size));
    EXPECT(int16_stride(size) >= size && int16_stride(size) % 32 == 0 &&
           int16_stride(size) <= size + 96);
  }
}

// Scales of one and sums below 2^24 leave float32 nothing to round: every instruction set must find
// the integer itself. The counts of rows are those of strips and tiles, and some beside them.
TEST(screening_int8_sums_are_exact) {
  for (const int64_t size : sizes)
    for (int64_t planes = 1; planes <= 2; ++planes)
      for (const bool extreme : {false, true}) {
        const Int8Layout layout(size);
        constexpr int64_t count = 37;
        Int8Rows rows(runnable_kernels().front(), layout, std::vector<float>(count * size), planes);
        std::vector<uint8_t> panel(layout.panel_bytes());
        std::vector<int64_t> sums(count * panel_features);
        Int8Features features = {};
        std::fill_n(features.scale, panel_features, 1.0f);
        std::memcpy(panel.data() + panel_features * layout.inputs, &features, sizeof(features));
        for (int64_t i = 0; i < panel_features * layout.inputs; ++i) {
          const int64_t feature = i / 4 % panel_features;
          panel[i] = static_cast<uint8_t>(!extreme || feature % 3 == 0 ? between(1, 255)
                                          : feature % 3 == 1           ? 1
                                                                       : 255);
        }
        for (int64_t r = 0; r < count * planes; ++r) {
          int8_t* row = rows.bytes.data() + r * layout.row_bytes();
          Int8Row terms = {1, 0, 0, 0};
          for (int64_t i = 0; i < layout.inputs; ++i) {
            // Some rows are as extreme as can be.
            row[i] = static_cast<int8_t>(!extreme || r % 2 == 0 ? between(-127, 127)
                                         : i < 1000 / planes    ? 127
                                                                : 0);
            terms.start -= 128 * row[i];
            for (int64_t f = 0; f < panel_features; ++f)
              sums[r / planes * panel_features + f] +=
                  row[i] * (panel[i / 4 * 4 * panel_features + 4 * f + i % 4] - 128);
          }
          std::memcpy(row + layout.inputs, &terms, sizeof(terms));
        }
        for (const int64_t sum : sums) EXPECT(std::abs(sum) < 1 << 24);
        for (const KernelTable& kernels : runnable_kernels())
          for (const int64_t some : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 37}) {
            if (size > 1000 && some % 4 != 1) continue;
            for (const int above : {0, 1}) {
              std::vector<float> low(panel_features);
              for (int64_t f = 0; f < panel_features;
                   ++f)  // every row is the one that is compared, in turn
                low[f] = static_cast<float>(sums[f % some * panel_features + f] + above);
              const auto masks = screen(kernels, layout, rows, 0, some, planes, panel, low);
              for (int64_t r = 0; r < some; ++r)
                for (int64_t f = 0; f < panel_features; ++f)
                  EXPECT_EQUAL(masks[r] >> f & 1,
                               static_cast<uint64_t>(sums[r * panel_features + f] >= low[f]));
            }
          }
      }
}

// Where no multiplication is fused with an addition, the bound is one number. A row passes where
// its bound is as large as the feature's limit and not where it is next below.
TEST(screening_int8_bound_in_float32) {
  constexpr int64_t count = 7;
  for (const int64_t size : {33, 129, 577, 1000})
    for (int64_t planes = 1; planes <= 2; ++planes)
      for (const KernelTable& kernels : runnable_kernels()) {
        if (kernels.name != "portable" && kernels.name != "neondot") continue;  // others fuse
        const Int8Layout layout(size);
        Int8Rows rows(kernels, layout, make(kinds[1], count, size), planes);
        const auto panel = int8_panel(kernels, layout, make(kinds[1], panel_features, size));
        const auto features = int8::read<Int8Features>(panel.data() + 64 * layout.inputs, 0);
        for (int64_t r = 0; r < count; ++r) {
          std::vector<float> low(panel_features);
          uint64_t expected = 0;
          for (int64_t f = 0; f < panel_features; ++f) {
            const auto terms = [&](int64_t plane) {
              return int8::read<Int8Row>(rows.row(r) + plane * layout.row_bytes() + layout.inputs,
                                         0);
            };
            float bound = 0;
            for (int64_t plane = 0; plane < planes; ++plane) {
              const int8_t* row = rows.row(r) + plane * layout.row_bytes();
              int32_t sum = 0;
              for (int64_t i = 0; i < layout.inputs; ++i)
                sum += row[i] * (panel[i / 4 * 4 * panel_features + 4 * f + i % 4] - 128);
              bound += static_cast<float>(sum) * (terms(plane).scale * features.scale[f]);
            }
            bound += terms(0).error * features.norm[f];
            bound += terms(0).norm * features.error[f];
            const bool passes = random_bits() % 2;
            low[f] = passes ? bound : std::nextafter(bound, infinity);
            expected |= uint64_t{passes} << f;
          }
          EXPECT_EQUAL(screen(kernels, layout, rows, 0, count, planes, panel, low)[r], expected);
        }
      }
}

TEST(screening_int8_is_an_upper_bound) {
  for (const int64_t size : sizes)
    for (const Kind& x_kind : kinds)
      for (const Kind& w_kind : kinds) {
        if (left_out(size)) continue;
        const int64_t rows = between(1, 13), count = between(1, 64);
        const std::vector<float> x = make(x_kind, rows, size), w = make(w_kind, count, size);
        const Int8Layout layout(size);
        std::vector<long double> exact(rows * count);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t f = 0; f < count; ++f)
            exact[r * count + f] = dot(x.data() + r * size, w.data() + f * size, size);
        for (const KernelTable& kernels : runnable_kernels()) {
          const auto panel = int8_panel(kernels, layout, w);
          std::vector<int8::Vector> features(count);
          for (int64_t f = 0; f < count; ++f)
            features[f] = int8::read_feature(layout, panel.data(), f);
          for (int64_t planes = 1; planes <= 2; ++planes) {
            Int8Rows packed(kernels, layout, x, planes);
            for (int64_t r = 0; r < rows; ++r) {
              const int8::Vector row = int8::read_row(layout, packed.row(r), planes);
              std::vector<float> low(panel_features, infinity), high = low;
              for (int64_t f = 0; f < count; ++f) {
                const long double value = exact[r * count + f];
                low[f] = rounded_down(value - underflow(size));
                long double margin = 0, magnitude = 0;
                for (size_t i = 0; i < row.margin.size(); ++i)
                  margin += static_cast<long double>(row.margin[i]) * features[f].margin[i];
                for (int64_t i = 0; i < layout.inputs; ++i)
                  magnitude +=
                      std::fabs(static_cast<long double>(row.values[i]) * features[f].values[i]);
                const long double error = std::fabs(dot_of(row.values, features[f].values) - value);
                if (!(error <= margin + underflow(size)))
                  check::fail(__FILE__, __LINE__, at(kernels, x_kind, w_kind, size));
                // The score is within a margin of the exact value, so its upper bound within two:
                // none is loose for nothing.
                high[f] = std::nextafter(rounded_up(value + 2 * margin * (1 + 0x1p-18L) +
                                                    magnitude * 0x1p-16L + underflow(size)),
                                         infinity);
              }
              const uint64_t all = count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
              if (screen(kernels, layout, packed, r, 1, planes, panel, low)[0] != all)
                check::fail(__FILE__, __LINE__, at(kernels, x_kind, w_kind, size));
              if (screen(kernels, layout, packed, r, 1, planes, panel, high)[0] != 0)
                check::fail(__FILE__, __LINE__, at(kernels, x_kind, w_kind, size));
            }
            // Rows of a call do not touch each other.
            std::vector<float> low(panel_features, infinity);
            for (int64_t f = 0; f < count; ++f)
              low[f] = static_cast<float>(exact[f % rows * count + f]);
            const auto together = screen(kernels, layout, packed, 0, rows, planes, panel, low);
            for (int64_t r = 0; r < rows; ++r)
              EXPECT_EQUAL(together[r],
                           screen(kernels, layout, packed, r, 1, planes, panel, low)[0]);
          }
        }
      }
}

TEST(screening_int8_margin_is_near_its_theory) {
  for (const int64_t size : {64, 256, 576, 2048})
    for (const KernelTable& kernels : runnable_kernels()) {
      const Int8Layout layout(size);
      const std::vector<float> x = make(kinds[0], 8, size), w = make(kinds[0], 64, size);
      const auto panel = int8_panel(kernels, layout, w);
      long double last = infinity;
      for (int64_t planes = 1; planes <= 2; ++planes) {
        Int8Rows packed(kernels, layout, x, planes);
        long double total = 0;
        for (int64_t r = 0; r < 8; ++r)
          for (int64_t f = 0; f < 64; ++f) {
            const int8::Vector row = int8::read_row(layout, packed.row(r), planes),
                               feature = int8::read_feature(layout, panel.data(), f);
            const long double margin = dot_of(row.margin, feature.margin);
            // n Gaussian inputs: largest about sqrt(2 ln n), so a step of that / 127, whose twelfth
            // is the variance.
            const long double step =
                std::sqrt(2 * std::log(static_cast<long double>(size))) / 127 / std::sqrt(12.0L);
            EXPECT(margin <
                   3.2L * step * norm(x.data() + r * size, size) * norm(w.data() + f * size, size));
            total += margin;
          }
        EXPECT(total < 0.75L * last);  // a second plane is worth its while
        last = total;
      }
    }
}

// A row that no number can stand for must not rule out anything.
TEST(screening_int8_of_rows_that_are_not_finite) {
  const int64_t size = 70;
  const Int8Layout layout(size);
  for (const float bad :
       {infinity, -infinity, std::numeric_limits<float>::quiet_NaN(), largest, -largest})
    for (const int64_t bad_inputs : {int64_t{1}, size})
      for (const KernelTable& kernels : runnable_kernels())
        for (int64_t planes = 1; planes <= 2; ++planes) {
          std::vector<float> x = make(kinds[0], 3, size), w = make(kinds[0], 64, size);
          std::fill_n(x.begin() + size, bad_inputs, bad);
          Int8Rows packed(kernels, layout, x, planes);
          const auto panel = int8_panel(kernels, layout, w);
          const std::vector<float> low(panel_features, 1e30f);
          const auto masks = screen(kernels, layout, packed, 0, 3, planes, panel, low);
          EXPECT_EQUAL(masks[0], uint64_t{0});
          EXPECT_EQUAL(masks[2], uint64_t{0});
          const uint64_t beside[] = {screen(kernels, layout, packed, 0, 1, planes, panel, low)[0]};
          EXPECT_EQUAL(masks[0], beside[0]);
          std::vector<int16_t> q(int16_stride(size));
          const Int16Scale scale = kernels.quantise_int16(x.data() + size, size, q.data());
          EXPECT(!std::isfinite(bad) ? !(scale.error < infinity) : scale.error >= 0);
        }
}

namespace {

struct Int16Rows {
  Int16Rows(const KernelTable& kernels, const std::vector<float>& x, int64_t size)
      : stride(int16_stride(size)), q(x.size() / size * stride, 77) {
    for (size_t r = 0; r < x.size() / size; ++r)
      scale.push_back(kernels.quantise_int16(x.data() + r * size, size, row(r)));
  }
  int16_t* row(int64_t r) { return q.data() + r * stride; }

  int64_t stride;
  std::vector<int16_t> q;
  std::vector<Int16Scale> scale;
};

// x . w, computed after `beside` products of another row.
int64_t dot_int16(const KernelTable& kernels, const int16_t* x, const int16_t* w, int64_t size,
                  int64_t beside) {
  const int16_t* rows[dot_rows] = {w, w, w, w};
  rows[beside] = x;
  int64_t sums[dot_rows];
  kernels.dot_int16(rows, beside + 1, w, size, sums);
  return sums[beside];
}

}  // namespace

TEST(screening_int16_of_one_row) {
  for (const int64_t size : sizes)
    for (const Kind& kind : kinds)
      for (const KernelTable& kernels : runnable_kernels()) {
        const std::vector<float> x = make(kind, 1, size);
        Int16Rows rows(kernels, x, size);
        const Int16Scale scale = rows.scale[0];
        long double squares = 0, off = 0, quantised = 0;
        for (int64_t i = 0; i < size; ++i) {
          EXPECT(rows.q[i] >= -32767);
          if (i % int16_part_size(size) == 0) squares = 0;
          squares += static_cast<long double>(rows.q[i]) * rows.q[i];
          const long double value = static_cast<long double>(scale.scale) * rows.q[i];
          off += (x[i] - value) * (x[i] - value);
          quantised += value * value;
          EXPECT(squares <=
                 2147483647.0L);  // so no product with another such row's part leaves int32
        }
        for (int64_t i = size; i < rows.stride; ++i) EXPECT_EQUAL(rows.q[i], 0);
        EXPECT(std::sqrt(off) <= scale.error && std::sqrt(quantised) <= scale.norm);
        const long double length = norm(x.data(), size);
        if (length > 1e-25L && length < 1e30L) {  // and none is larger than it need be
          EXPECT(scale.error <= length * std::max(1.2e-3L, 2e-3L * std::sqrt(size / 2048.0L)) ||
                 size < 3);
          EXPECT(scale.norm <= length * 1.001L);
        }
      }
}

TEST(screening_int16_products_are_exact_and_within_their_margin) {
  for (const int64_t size : sizes)
    for (const Kind& x_kind : kinds)
      for (const Kind& w_kind : kinds) {
        if (left_out(size)) continue;
        const int64_t rows = between(1, 13), count = between(1, 64);
        const std::vector<float> x = make(x_kind, rows, size), w = make(w_kind, count, size);
        for (const KernelTable& kernels : runnable_kernels()) {
          Int16Rows x_rows(kernels, x, size), w_rows(kernels, w, size);
          std::vector<float> w_scale, scores(rows * panel_features + 1, 12345);
          for (const Int16Scale& scale : w_rows.scale) w_scale.push_back(scale.scale);
          std::vector<int16_t> packed(panel_features * x_rows.stride + 1, 4321);
          Prefetcher prefetcher;
          prefetcher.add(x.data(), 4 * rows * size);
          kernels.product_int16({x_rows.q.data(), x_rows.scale.data(), rows, w_rows.q.data(),
                                 w_scale.data(), count, size, packed.data()},
                                scores.data(), prefetcher);
          EXPECT(scores.back() == 12345 && packed.back() == 4321);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t f = 0; f < count; ++f) {
              int64_t sum = 0, magnitude = 0;
              for (int64_t i = 0; i < size; ++i) {
                const int64_t term = int64_t{x_rows.row(r)[i]} * w_rows.row(f)[i];
                sum += term;
                magnitude = (i % int16_part_size(size) == 0 ? 0 : magnitude) + std::abs(term);
                EXPECT(magnitude <= 2147483647);  // a part's sums in any order stay within int32
              }
              EXPECT_EQUAL(dot_int16(kernels, x_rows.row(r), w_rows.row(f), size, r % dot_rows),
                           sum);
              const Int16Scale &a = x_rows.scale[r], &b = w_rows.scale[f];
              const float score = scores[r * panel_features + f];
              const long double scaled = static_cast<long double>(a.scale) * b.scale * sum;
              const long double rounding = static_cast<long double>(a.norm) * b.norm *
                                           int16_score_rounding(int16_part_count(size));
              if (!(std::fabs(score - scaled) <= rounding + underflow(size)))
                check::fail(__FILE__, __LINE__, "rounding: " + at(kernels, x_kind, w_kind, size));
              const long double exact = dot(x.data() + r * size, w.data() + f * size, size);
              const long double margin = a.error * norm(w.data() + f * size, size) +
                                         static_cast<long double>(a.norm) * b.error + rounding +
                                         underflow(size);
              if (!(std::fabs(score - exact) <= margin))
                check::fail(__FILE__, __LINE__, at(kernels, x_kind, w_kind, size));
            }
        }
      }
}

// The largest sums there can be: a row against itself, signs aligned, at every size.
TEST(screening_int16_at_the_end_of_int32) {
  for (int64_t size = 1; size <= 70000; size += 1 + size / 9)
    for (const Kind& kind : kinds)
      for (const KernelTable& kernels : runnable_kernels()) {
        std::vector<float> x = make(kind, 1, size);
        Int16Rows rows(kernels, x, size);
        int64_t sum = 0, part = 0;
        for (int64_t i = 0; i < size; ++i) {
          if (i % int16_part_size(size) == 0) part = 0;
          part += int64_t{rows.q[i]} * rows.q[i];
          EXPECT(part <= 2147483647);
          sum += int64_t{rows.q[i]} * rows.q[i];
        }
        for (int64_t beside = 0; beside < dot_rows; ++beside)
          EXPECT_EQUAL(dot_int16(kernels, rows.row(0), rows.row(0), size, beside), sum);
        for (float& value : x) value = -value;
        Int16Rows turned(kernels, x, size);
        EXPECT_EQUAL(dot_int16(kernels, rows.row(0), turned.row(0), size, 0), -sum);
      }
}

TEST(screening_prefetcher_counts_its_lines) {
  std::vector<char> memory(10000);
  Prefetcher prefetcher;
  EXPECT_EQUAL(prefetcher.lines(), 0);
  prefetcher.fetch(3);
  for (int turn = 0; turn < 2; ++turn) {
    prefetcher.add(memory.data(), 1000);
    prefetcher.add(memory.data() + 5000, 64);
    prefetcher.add(memory.data() + 9000, 1);
    EXPECT_EQUAL(prefetcher.lines(), 16 + 1 + 1);
    prefetcher.fetch(7);
    prefetcher.fetch(1000);  // more than there are
    prefetcher.clear();
    EXPECT_EQUAL(prefetcher.lines(), 0);
  }
}
