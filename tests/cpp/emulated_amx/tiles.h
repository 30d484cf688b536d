// The tiles of AMX in plain C++, as Intel's manual documents LDTILECFG, TILERELEASE, TILEZERO,
// TILELOADD, TILESTORED and TDPBSUD. What a processor would stop at ends the process.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_amx {

constexpr int max_tiles = 8, max_rows = 16, max_row_bytes = 64;

struct Tile {
  int rows, row_bytes;  // 0 and 0 where the tile is not used
  uint8_t bytes[max_rows][max_row_bytes];
};

struct Registers {
  bool configured = false;
  Tile tiles[max_tiles];
};

inline Registers& registers() {
  static thread_local Registers of_this_thread;
  return of_this_thread;
}

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "emulated AMX: a processor would stop here: %s\n", what);
  std::abort();
}

inline Tile& used(int tile) {
  require(registers().configured, "the tiles are not configured");
  require(registers().tiles[tile].rows > 0, "the tile has no shape");
  return registers().tiles[tile];
}

inline void configure(const void* shapes) {
  const auto* bytes = static_cast<const uint8_t*>(shapes);
  require(bytes[0] == 1 && bytes[1] == 0, "the palette is 1 and no row is started");
  for (int i = 2; i < 16; ++i) require(bytes[i] == 0, "reserved bytes are 0");
  for (int i = 0; i < 16; ++i) {
    const int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
    require(rows <= (i < max_tiles ? max_rows : 0), "a tile has too many rows");
    require(row_bytes <= (i < max_tiles ? max_row_bytes : 0), "a tile has too many bytes");
    require((rows == 0) == (row_bytes == 0),
            "a tile has rows without bytes, or bytes without rows");
    if (i < max_tiles) registers().tiles[i] = {rows, row_bytes, {}};
  }
  registers().configured = true;
}

inline void release() { registers().configured = false; }

inline void zero(int tile) { std::memset(used(tile).bytes, 0, sizeof(Tile::bytes)); }

inline void load(int tile, const void* from, int64_t stride) {
  Tile& to = used(tile);
  std::memset(to.bytes, 0, sizeof(to.bytes));
  for (int r = 0; r < to.rows; ++r)
    std::memcpy(to.bytes[r], static_cast<const char*>(from) + r * stride, to.row_bytes);
}

inline void store(int tile, void* to, int64_t stride) {
  const Tile& from = used(tile);
  for (int r = 0; r < from.rows; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, from.bytes[r], from.row_bytes);
}

inline void add_products(int sums, int rows, int columns) {
  Tile& c = used(sums);
  const Tile &a = used(rows), &b = used(columns);
  require(sums != rows && sums != columns && rows != columns, "the three tiles differ");
  require(c.row_bytes % 4 == 0 && a.row_bytes % 4 == 0, "rows are whole int32");
  require(c.rows == a.rows && a.row_bytes / 4 == b.rows && c.row_bytes == b.row_bytes,
          "the shapes of the three tiles fit");
  for (int m = 0; m < c.rows; ++m) {
    uint32_t total[max_row_bytes / 4];  // unsigned, for sums that wrap around
    std::memcpy(total, c.bytes[m], sizeof(total));
    for (int k = 0; k < a.row_bytes / 4; ++k)
      for (int n = 0; n < c.row_bytes / 4; ++n)
        for (int i = 0; i < 4; ++i)
          total[n] += static_cast<uint32_t>(static_cast<int8_t>(a.bytes[m][4 * k + i]) *
                                            int32_t{b.bytes[k][4 * n + i]});
    std::memcpy(c.bytes[m], total, c.row_bytes);
  }
}

}  // namespace emulated_amx
