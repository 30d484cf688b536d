// The lists of survivors, against the pairs that they are made of.
#include <random>
#include <vector>

#include "check.h"
#include "cpu/kernels/kernels.h"

using namespace sparse_transcoder::cpu;

namespace {

// Masks in which a share of 1 / 2^sparseness of the bits is set.
std::vector<uint64_t> random_masks(int64_t rows, int sparseness, std::mt19937_64& random) {
  std::vector<uint64_t> masks(rows, ~uint64_t{0});
  for (uint64_t& mask : masks)
    for (int i = 0; i < sparseness; ++i) mask &= random();
  return masks;
}

}  // namespace

TEST(survivors_are_listed_by_feature) {
  std::mt19937_64 random(1);
  constexpr int64_t first = 640;
  for (const KernelTable& kernels : runnable_kernels())
    for (int64_t count : {1, 2, 15, 16, 17, 63, 64, 65, 130, 255, 256})
      for (int sparseness : {0, 1, 3, 6, 9, 64}) {
        const std::vector<uint64_t> masks = random_masks(count, sparseness, random);
        // No more than is promised, so that a sanitizer sees what is written beyond.
        std::vector<Survivor> pairs(count * sparse_transcoder::panel_features, {-1, 0, false});
        std::vector<uint64_t> rows(mask_count(count), ~uint64_t{0});
        std::vector<MaskWord> words(mask_count(count) + 2, {~uint64_t{0}, -1, -1});
        std::copy(masks.begin(), masks.end(), rows.begin());
        const ListedSurvivors listed =
            kernels.list_survivors({rows.data(), words.data()}, count, first, pairs.data());
        int64_t at = 0;
        uint64_t any = 0;
        for (int64_t bit = 0; bit < sparse_transcoder::panel_features; ++bit)
          for (int64_t row = 0; row < count; ++row) {
            if (!(masks[row] >> bit & 1)) continue;
            any |= uint64_t{1} << bit;
            EXPECT(at < listed.count);
            if (at >= listed.count) return;
            const Survivor& pair = pairs[at++];
            EXPECT(pair.row() == row && pair.feature() == first + bit && pair.ambiguous());
          }
        EXPECT_EQUAL(at, listed.count);
        EXPECT(listed.features == any);
      }
}
