// AMX: Intel's server processors since 2023. Tiles multiply what avx512vnni multiplies in vectors,
// from the same copies, and give the same integers. All that follows them is avx512vnni's code, and
// so are the other loops. The crossovers are avx512vnni's, too: nobody has measured them on such a
// machine.
//
// This file is compiled with the flags of avx512vnni.cpp and called only where the machine has
// both.
#include "cpu/kernels/amx-inl.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/screen_avx512-inl.h"

namespace sparse_transcoder::cpu {
namespace {

// Tiles hold 16 rows of 64 bytes: 64 inputs of each of 16 rows; 64 inputs of 16 features, four of
// each feature side by side, as they lie in a panel; the sums of 16 rows and 16 features.
constexpr int64_t tile_rows = 16, tile_features = 16, tile_bytes = 64;
// Two tiles of rows times two of features, so that each tile that is loaded is used twice.
constexpr int64_t block_rows = 2 * tile_rows, block_features = 2 * tile_features;
// Tiles 0 to 3 hold sums: the first rows' and then the second rows', each with both features'.
constexpr int first_rows = 4, second_rows = 5, first_features = 6, second_features = 7;

// The tiles' shapes as the processor reads them. A tile that is not used has neither rows nor
// bytes.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t count) {
    rows[tile] = static_cast<uint8_t>(count);
    row_bytes[tile] = count > 0 ? tile_bytes : 0;
  }
};
static_assert(sizeof(Shapes) == 64);

// The tiles' shapes belong to the thread, and any library that runs on it may set others. So each
// call of the screen sets its own and releases the tiles at its end.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { amx::release(); }

  // For a block of this many rows.
  void shape(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    const int64_t in_first = std::min(rows, tile_rows), in_second = rows - in_first;
    Shapes shapes;
    for (const int tile : {0, 1, first_rows}) shapes.set(tile, in_first);
    for (const int tile : {2, 3, second_rows}) shapes.set(tile, in_second);
    for (const int tile : {first_features, second_features}) shapes.set(tile, tile_bytes / 4);
    amx::configure(&shapes);
  }

 private:
  int64_t rows_ = 0;
};

// sums[r * panel_features + f] = the products of a block's rows and of block_features features,
// without what Int8Row::start adds. `weights` is where the panel holds the first of the features,
// and `both` says whether the block has a second tile of rows.
template <bool both>
void multiply_block(const Panel& panel, const int8_t* x, const uint8_t* weights, int32_t* sums) {
  constexpr int64_t weight_stride = 4 * panel_features, sum_stride = 4 * panel_features;
  const int64_t stride = panel.layout.row_bytes();
  amx::zero<0>();
  amx::zero<1>();
  if constexpr (both) {
    amx::zero<2>();
    amx::zero<3>();
  }
  for (int64_t i = 0; i < panel.layout.inputs; i += tile_bytes) {
    const uint8_t* w = weights + i * panel_features;
    amx::load<first_rows>(x + i, stride);
    amx::load<first_features>(w, weight_stride);
    panel.prefetcher.fetch(panel.lines);
    amx::add_products<0, first_rows, first_features>();
    amx::load<second_features>(w + 4 * tile_features, weight_stride);
    panel.prefetcher.fetch(panel.lines);
    amx::add_products<1, first_rows, second_features>();
    if constexpr (both) {
      amx::load<second_rows>(x + i + tile_rows * stride, stride);
      panel.prefetcher.fetch(panel.lines);
      amx::add_products<2, second_rows, first_features>();
      panel.prefetcher.fetch(panel.lines);
      amx::add_products<3, second_rows, second_features>();
    }
  }
  amx::store<0>(sums, sum_stride);
  amx::store<1>(sums + tile_features, sum_stride);
  if constexpr (both) {
    sums += tile_rows * panel_features;
    amx::store<2>(sums, sum_stride);
    amx::store<3>(sums + tile_features, sum_stride);
  }
}

// The masks of `rows` rows, planes counted, from their sums.
template <int planes>
void compare_block(const Panel& panel, const int8_t* x, int64_t rows, const int32_t* sums,
                   uint64_t* masks) {
  const int64_t stride = panel.layout.row_bytes();
  const auto terms = [&](int64_t r) -> const Int8Row& {
    return *reinterpret_cast<const Int8Row*>(x + r * stride + panel.layout.inputs);
  };
  const auto sum = [&](int64_t r, int v) {
    return _mm512_add_epi32(_mm512_load_si512(sums + r * panel_features + 16 * v),
                            _mm512_set1_epi32(terms(r).start));
  };
  for (int64_t r = 0; r < rows; r += planes) {
    const int64_t last = r + planes - 1;
    uint64_t mask = 0;
    for (int v = 0; v < 4; ++v)
      mask |= may_reach<planes>(panel.features(), panel.surely_out_below, v, terms(r), sum(r, v),
                                terms(last), sum(last, v));
    masks[r / planes] = mask;
  }
}

void screen_int8_in_tiles(const Int8ScreenArgs& args, uint64_t* masks, Prefetcher& prefetcher) {
  const int64_t count = args.row_count * args.planes, stride = args.layout.row_bytes();
  // So few rows wait for the panel to come from memory, however fast they are multiplied. They keep
  // the loop for which Crossovers::two_planes_rows was measured.
  if (count <= strip_rows) return screen_int8(args, masks, prefetcher);
  // The number of add_products.
  const int64_t steps = args.layout.inputs / tile_bytes * (panel_features / tile_features) *
                        ((count + tile_rows - 1) / tile_rows);
  const Panel panel = {args.layout, args.panel, args.surely_out_below, prefetcher,
                       (prefetcher.lines() + steps - 1) / steps};
  alignas(64) int32_t sums[block_rows * panel_features];
  Tiles tiles;
  for (int64_t r = 0; r < count; r += block_rows) {
    const int8_t* x = args.rows + r * stride;
    const int64_t rows = std::min(block_rows, count - r);
    tiles.shape(rows);
    const auto multiply = rows > tile_rows ? multiply_block<true> : multiply_block<false>;
    for (int64_t f = 0; f < panel_features; f += block_features)
      multiply(panel, x, args.panel + 4 * f, sums + f);
    const auto compare = args.planes == 1 ? compare_block<1> : compare_block<2>;
    compare(panel, x, rows, sums, masks + r / args.planes);
  }
}

}  // namespace

bool has_amx() { return amx::is_usable(); }

void use_avx512amx(KernelTable& kernels) { kernels.screen_int8 = screen_int8_in_tiles; }

}  // namespace sparse_transcoder::cpu
