// Measures how far each screen is from the exact dot products, as a share of the margin that it
// claims: never above one. SPARSE_TRANSCODER_SOUNDNESS_PAIRS sets how many (row, feature) pairs are
// looked at.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <sparse_transcoder/weights.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "bounds.h"
#include "check.h"
#include "cpu/kernels/kernels.h"
#include "int8.h"

using namespace sparse_transcoder;
using namespace sparse_transcoder::cpu;

namespace {

constexpr int64_t row_count = 192, panels = 8, feature_count = panels * panel_features;
constexpr at::ScalarType types[] = {at::kFloat, at::kBFloat16, at::kHalf};  // in the order of Dtype
const char* const row_kinds[] = {
    "gaussian", "planted",        "heavy tails",          "over many decades", "one outlier",
    "sparse",   "worst for int8", "worst for two planes", "worst for int16"};
const char* const weight_kinds[] = {"gaussian", "heavy tails",    "over many decades",
                                    "real",     "worst for int8", "worst for int16",
                                    "signs"};
constexpr int64_t block_sizes[] = {576, 64, 200, 257, 576, 1000, 33, 768, 2048, 7};

at::Tensor sign(at::IntArrayRef shape) { return at::where(at::rand(shape) < 0.5, 1.0, -1.0); }
at::Tensor decades(int64_t count, double low, double high) {
  return at::pow(10.0, at::rand({count, 1}, at::kDouble) * (high - low) + low);
}

// As near the middle between two multiples of the int16 scale as can be, on the side that `side`
// says. What that does to the scale is made up for by one input of the part that decides it.
at::Tensor at_halves_of_int16(const at::Tensor& start, const at::Tensor& side) {
  const int64_t H = start.size(1);
  at::Tensor x = start.contiguous().clone();
  std::vector<int16_t> q(int16_stride(H));
  for (int64_t i = 0; i < x.size(0); ++i) {
    at::Tensor row = x[i];
    const auto scale = [&] {
      const at::Tensor narrow = row.to(at::kFloat);
      return double{runnable_kernels()
                        .front()
                        .quantise_int16(narrow.const_data_ptr<float>(), H, q.data())
                        .scale};
    };
    const double wanted = scale();
    row.copy_((at::round(row / wanted) + 0.495 * side[i]) * wanted);
    for (int turn = 0; turn < 4; ++turn) {
      const double change = std::pow(wanted / scale(), 2) - 1;
      at::Tensor part;
      for (const at::Tensor& other : row.split(int16_part_size(H)))
        if (!part.defined() || other.norm().item<double>() > part.norm().item<double>())
          part = other;
      const double square =
          std::pow(part[0].item<double>(), 2) + change * std::pow(part.norm().item<double>(), 2);
      if (square > 0) part[0].fill_(part[0].sign().item<double>() * std::sqrt(square));
    }
  }
  return x;
}

// Rows as the int8 screen rotates them, and back.
at::Tensor transformed(const Int8Layout& layout, at::Tensor x) {
  const int64_t count = x.size(0);
  for (int64_t half = layout.inputs / layout.mixed; half < layout.inputs; half *= 2) {
    const at::Tensor pairs = x.reshape({count, -1, 2, half}), a = pairs.select(2, 0),
                     b = pairs.select(2, 1);
    x = at::stack({a + b, a - b}, 2).reshape({count, layout.inputs});
  }
  return x;
}
at::Tensor signs_of(const Int8Layout& layout) {
  at::Tensor signs = at::ones({layout.inputs}, at::kDouble);
  for (uint32_t i = 0; i < layout.size; ++i) {
    const uint32_t bits = i * 0x9e3779b1u;
    if ((bits ^ bits >> 15) * 0x85ebca77u >> 31) signs[i].neg_();
  }
  return signs;
}
at::Tensor rotated(const Int8Layout& layout, const at::Tensor& x) {
  return transformed(layout,
                     at::constant_pad_nd(x, {0, layout.inputs - layout.size}) * signs_of(layout));
}
at::Tensor rotated_back(const Int8Layout& layout, const at::Tensor& y) {
  const at::Tensor x =
      transformed(layout, y) * signs_of(layout) / static_cast<double>(layout.mixed);
  return x.narrow(1, 0, layout.size).contiguous();
}

// Rotated, all of one size but the largest, and half a step beside, on the side that `side` says.
at::Tensor at_halves_of_int8(const Int8Layout& layout, int64_t count, const at::Tensor& signs,
                             const at::Tensor& side) {
  at::Tensor y = at::floor(at::rand({count, 1}, at::kDouble) * 125 + 1) * signs + 0.4999 * side;
  y.select(1, 0).fill_(127);
  return rotated_back(layout, y * decades(count, -3, 3));
}

// What a second plane leaves, too, is half a step.
at::Tensor at_halves_of_second_plane(const Int8Layout& layout, int64_t count,
                                     const at::Tensor& signs, const at::Tensor& side) {
  const at::Tensor second = at::floor(at::rand({count, 1}, at::kDouble) * 120) + 0.499;
  at::Tensor y =
      at::floor(at::rand({count, 1}, at::kDouble) * 100 + 1) * signs + second / 254 * side;
  y.select(1, 0).fill_(127);
  return rotated_back(layout, y);
}

struct Block {
  std::string name;
  at::Tensor x, w, stored;  // [rows, H], [features, H] float64; the weights as they are stored
  int type;
};

Block make_block(int64_t number) {
  const std::string x_kind = row_kinds[number % std::size(row_kinds)];
  const std::string w_kind = weight_kinds[number / 3 % std::size(weight_kinds)];
  const int64_t H = w_kind == "real" ? 576 : block_sizes[number / 2 % std::size(block_sizes)];
  const Int8Layout layout(H);
  const at::Tensor a = sign({H}).to(at::kDouble), a8 = sign({layout.inputs}).to(at::kDouble);
  at::Tensor b = sign({H}).to(at::kDouble), w, x, decoder;
  const auto normal = [&](int64_t count) { return at::randn({count, H}, at::kDouble); };
  if (w_kind == "heavy tails") {
    w = normal(feature_count) * at::exp(2 * normal(feature_count));
  } else if (w_kind == "over many decades") {
    w = normal(feature_count) * decades(feature_count, -17, 10);
  } else if (w_kind == "real") {
    static std::map<int64_t, sparse_transcoder::LayerWeights> real =
        sparse_transcoder::load_weights(EXAMPLES);
    const auto& layer = std::next(real.begin(), number / 6 % real.size())->second;
    const int64_t first = number * 64 % (layer.W_enc.size(0) - feature_count);
    w = layer.W_enc.narrow(0, first, feature_count).to(at::kDouble);
    decoder = layer.W_dec.to(at::kDouble).t();
  } else if (w_kind == "worst for int8") {
    w = at_halves_of_int8(layout, feature_count, sign({layout.inputs}), a8);
  } else if (w_kind == "worst for int16") {
    w = at_halves_of_int16(b * decades(feature_count, -2, 2), a.expand({feature_count, H}));
  } else if (w_kind == "signs") {  // int8 holds them without error: what is left is the rows'
    w = sign({feature_count, H}).to(at::kDouble);
  } else {
    w = normal(feature_count);
  }
  int type = static_cast<int>(number % 3);
  if (w_kind.rfind("worst", 0) == 0) type = 0;
  if (type == 2 && !w.to(at::kHalf).isfinite().all().item<bool>()) type = 1;
  const at::Tensor stored = w.to(types[type]).contiguous();
  w = stored.to(at::kDouble);
  b = at::where(w[0] < 0, -1.0, 1.0).to(at::kDouble);
  const at::Tensor b8 =
      at::where(rotated(layout, w.narrow(0, 0, 1))[0] < 0, -1.0, 1.0).to(at::kDouble);

  if (x_kind == "planted") {
    const at::Tensor from = decoder.defined() ? decoder : w;
    const at::Tensor unit = from / from.norm(2, {1}, true).clamp_min(1e-300);
    x = at::rand({row_count, from.size(0)}, at::kDouble);
    x = at::where(x < 30.0 / from.size(0), x * from.size(0) / 10, 0).matmul(unit) +
        0.1 * normal(row_count);
  } else if (x_kind == "heavy tails") {
    x = normal(row_count) * at::exp(2 * normal(row_count)) * at::exp(normal(1));
  } else if (x_kind == "over many decades") {
    x = normal(row_count) * decades(row_count, -18, 14);
  } else if (x_kind == "one outlier") {
    x = normal(row_count);
    x.select(1, number % H).mul_(decades(row_count, 0, 12).squeeze(1));
  } else if (x_kind == "sparse") {
    x = at::where(at::rand({row_count, H}) < 0.02, normal(row_count), 0);
  } else if (x_kind == "worst for int8") {
    x = at_halves_of_int8(layout, row_count, a8, b8);
  } else if (x_kind == "worst for two planes") {
    x = at_halves_of_second_plane(layout, row_count, a8, b8);
  } else if (x_kind == "worst for int16") {
    x = at_halves_of_int16(a * decades(row_count, -2, 2), b.expand({row_count, H}));
  } else {
    x = normal(row_count);
  }
  return {x_kind + " rows, " + w_kind + " weights of " + at::toString(types[type]) + ", H " +
              std::to_string(H),
          x.to(at::kFloat).to(at::kDouble).contiguous(), w, stored, type};
}

struct Stage {
  double worst = 0;
  int64_t pairs = 0;
  std::string where;

  void add(const at::Tensor& error, const at::Tensor& margin, const Block& block) {
    const at::Tensor share = error.abs() / (margin + underflow(block.x.size(1)));
    const double most = share.max().item<double>();
    pairs += error.numel();
    if (!(most <= worst)) {
      worst = most;
      where = block.name;
    }
  }
};

using Stages = std::map<std::string, Stage>;

at::Tensor wide(const std::vector<int8::Vector>& vectors,
                std::vector<double> int8::Vector::* part) {
  const auto size = static_cast<int64_t>((vectors[0].*part).size());
  at::Tensor out = at::empty({static_cast<int64_t>(vectors.size()), size}, at::kDouble);
  for (size_t i = 0; i < vectors.size(); ++i)
    std::copy((vectors[i].*part).begin(), (vectors[i].*part).end(),
              out.mutable_data_ptr<double>() + static_cast<int64_t>(i) * size);
  return out;
}

void measure_int8(const KernelTable& kernels, const Block& block, const at::Tensor& x,
                  const at::Tensor& w, const at::Tensor& exact, Stages& stages) {
  const int64_t H = x.size(1);
  const Int8Layout layout(H);
  std::vector<uint8_t> panel(panels * layout.panel_bytes());
  std::vector<int8::Vector> features(feature_count), rows(row_count);
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      uint8_t* at = panel.data() + p * layout.panel_bytes();
      kernels.quantise_panel(layout, w.const_data_ptr<float>() + p * panel_features * H,
                             panel_features, at);
      for (int64_t f = 0; f < panel_features; ++f)
        features[p * panel_features + f] = int8::read_feature(layout, at, f);
    }
  });
  const at::Tensor values = wide(features, &int8::Vector::values).t(),
                   margins = wide(features, &int8::Vector::margin).t();
  // The largest float32 that the exact value reaches: the screen must find that its upper bound
  // does, too.
  const at::Tensor least = exact - underflow(H), near = least.to(at::kFloat);
  const at::Tensor low =
      at::where(near > least,
                at::nextafter(near, at::full_like(near, -std::numeric_limits<float>::infinity())),
                near)
          .contiguous();
  for (int64_t planes = 1; planes <= 2; ++planes) {
    const int64_t bytes = planes * layout.row_bytes();
    std::vector<int8_t> packed(row_count * bytes);
    std::vector<float> scratch(layout.inputs);
    for (int64_t r = 0; r < row_count; ++r) {
      kernels.quantise_row(layout, x.const_data_ptr<float>() + r * H, planes,
                           packed.data() + r * bytes, scratch.data());
      rows[r] = int8::read_row(layout, packed.data() + r * bytes, planes);
    }
    stages[planes == 1 ? "int8" : "int8, two planes"].add(
        wide(rows, &int8::Vector::values).matmul(values) - exact,
        wide(rows, &int8::Vector::margin).matmul(margins), block);
    std::atomic<int64_t> lost{0};
    at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      Prefetcher prefetcher;
      for (int64_t p = begin; p < end; ++p)
        for (int64_t r = 0; r < row_count; ++r) {
          // A row alone, or one of eight: the loops of few rows may be others.
          const int64_t together = r / 8 % 2 == 0 ? 1 : 8, first = r / together * together;
          uint64_t masks[8];
          kernels.screen_int8(
              {layout, packed.data() + first * bytes, together, planes,
               panel.data() + p * layout.panel_bytes(),
               low.const_data_ptr<float>() + r * feature_count + p * panel_features},
              masks, prefetcher);
          lost += __builtin_popcountll(~masks[r - first]);
        }
    });
    if (lost > 0)
      check::fail(__FILE__, __LINE__, std::string(kernels.name) + " loses pairs of " + block.name);
  }
}

void measure_int16(const KernelTable& kernels, const Block& block, const at::Tensor& x,
                   const at::Tensor& w, const at::Tensor& exact, const at::Tensor& w_norm,
                   Stages& stages) {
  const int64_t H = x.size(1), stride = int16_stride(H);
  const auto quantise = [&](const at::Tensor& from, std::vector<int16_t>& q,
                            std::vector<Int16Scale>& scales) {
    q.resize(from.size(0) * stride);
    for (int64_t i = 0; i < from.size(0); ++i)
      scales.push_back(
          kernels.quantise_int16(from.const_data_ptr<float>() + i * H, H, q.data() + i * stride));
    at::Tensor all = at::empty({3, from.size(0)}, at::kDouble);
    for (int64_t i = 0; i < from.size(0); ++i) {
      all.data_ptr<double>()[i] = scales[i].scale;
      all.data_ptr<double>()[from.size(0) + i] = scales[i].error;
      all.data_ptr<double>()[2 * from.size(0) + i] = scales[i].norm;
    }
    return all;
  };
  std::vector<int16_t> x_q, w_q;
  std::vector<Int16Scale> x_scales, w_scales;
  const at::Tensor x_all = quantise(x, x_q, x_scales), w_all = quantise(w, w_q, w_scales);
  const at::Tensor w_scale = w_all[0].to(at::kFloat),
                   scores = at::empty({panels, row_count, panel_features});
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    std::vector<int16_t> packed(panel_features * stride);
    Prefetcher prefetcher;
    for (int64_t p = begin; p < end; ++p)
      kernels.product_int16(
          {x_q.data(), x_scales.data(), row_count, w_q.data() + p * panel_features * stride,
           w_scale.const_data_ptr<float>() + p * panel_features, panel_features, H, packed.data()},
          scores.data_ptr<float>() + p * row_count * panel_features, prefetcher);
  });
  // As layers and rows combine them.
  const at::Tensor margin =
      x_all[1].unsqueeze(1) * w_norm +
      x_all[2].unsqueeze(1) * (w_all[1] + w_all[2] * int16_score_rounding(int16_part_count(H)));
  stages["int16"].add(
      scores.transpose(0, 1).reshape({row_count, feature_count}).to(at::kDouble) - exact, margin,
      block);
}

void measure_product(const KernelTable& kernels, const Block& block, const at::Tensor& x,
                     const at::Tensor& exact, const at::Tensor& w_norm, Stages& stages) {
  const int64_t H = x.size(1), some = 48;
  const at::Tensor scores = at::empty({row_count, feature_count});
  at::parallel_for(0, row_count / some, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.product[block.type](x.const_data_ptr<float>() + i * some * H, some,
                                  block.stored.const_data_ptr(), feature_count, H,
                                  scores.data_ptr<float>() + i * some * feature_count);
  });
  stages["float32"].add(scores.to(at::kDouble) - exact,
                        product_rounding(H) * block.x.norm(2, {1}, true) * w_norm, block);
}

}  // namespace

TEST(soundness_no_screen_is_further_off_than_it_says) {
  at::manual_seed(3);
  const char* wanted = std::getenv("SPARSE_TRANSCODER_SOUNDNESS_PAIRS");
  const double pairs = wanted ? std::atof(wanted) : 1.2e7;
  std::map<std::string, Stages> all;
  const std::vector<KernelTable>& runnable = runnable_kernels();
  for (int64_t number = 0; static_cast<double>(number) * row_count * feature_count < pairs;
       ++number) {
    const Block block = make_block(number);
    const at::Tensor x = block.x.to(at::kFloat), w = block.w.to(at::kFloat),
                     exact = block.x.matmul(block.w.t());
    const at::Tensor w_norm = block.w.norm(2, {1}).unsqueeze(0);
    for (const KernelTable& kernels : runnable) {
      if (&kernels != &runnable.back() && number % 17 != 0) continue;  // the slower ones see a part
      Stages& stages = all[std::string(kernels.name)];
      measure_int8(kernels, block, x, w, exact, stages);
      measure_int16(kernels, block, x, w, exact, w_norm, stages);
      measure_product(kernels, block, x, exact, w_norm, stages);
    }
  }
  for (const auto& [set, stages] : all)
    for (const auto& [name, stage] : stages) {
      std::fprintf(stderr, "  %-10s %-16s error / margin at most %.4f over %.3g pairs: %s\n",
                   set.c_str(), name.c_str(), stage.worst, static_cast<double>(stage.pairs),
                   stage.where.c_str());
      EXPECT(stage.worst <= 1);
    }
  // Rows made for it come near: a margin that is any smaller would be seen.
  for (const auto& [name, least] : std::map<std::string, double>{{"int8", 0.9}, {"int16", 0.9}})
    EXPECT(all[std::string(runnable.back().name)][name].worst > least);
}
