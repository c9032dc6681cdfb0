// The tile registers of AMX: how they are set up, and what the compiler must know of them.
#pragma once

#include <immintrin.h>

#include "linear_vector.h"

namespace splitpoint::SPLITPOINT_ISA {

inline constexpr int64_t kTileRows = 16;
inline constexpr int64_t kPairRows = 2 * kTileRows;  // two tiles of x share each tile of weights
inline constexpr int64_t kTileDepth = 32;            // values of bf16 in a row of a tile

// The layout of the instruction's own operand: palette 1, and rows and bytes a row of each tile.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  // 0 to 3: sums; 4, 5: x; 6, 7: weights. A row of x is multiplied `step` bytes at a time.
  TileShapes(int64_t rows0, int64_t rows1, int64_t step) {
    const int64_t all[] = {rows0, rows0, rows1, rows1, rows0, rows1, step / 4, step / 4};
    for (int i = 0; i < 8; ++i) {
      rows[i] = static_cast<uint8_t>(all[i]);
      const bool of_x = i == 4 || i == 5;
      bytes[i] = all[i] ? static_cast<uint16_t>(of_x ? step : 64) : 0;
    }
  }
};

// The tile instructions are opaque to the compiler: what they read must have been written.
SPLITPOINT_INLINE void written() { __asm__ volatile("" ::: "memory"); }

// The tiles as they are set up for so many rows, and one depth of a step throughout; left empty, as
// everybody sets up their own.
class TileState {
 public:
  ~TileState() {
    if (rows_) _tile_release();
  }
  void use(int64_t rows, int64_t step = 64) {
    if (rows == rows_) return;
    const TileShapes shapes(rows < kTileRows ? rows : kTileRows,
                            rows < kTileRows ? 0 : rows - kTileRows, step);
    written();
    _tile_loadconfig(&shapes);
    rows_ = rows;
  }

 private:
  int64_t rows_ = 0;
};

}  // namespace splitpoint::SPLITPOINT_ISA
