// The products of attention of many rows, on tiles.
#pragma once

#include "amx_tiles.h"
#include "attention_wide.h"

namespace splitpoint::SPLITPOINT_ISA {

// All tiles are 16 rows of 64 bytes: 0 to 2 hold results, 4 to 6 what differs between registers of
// rows, 3 what they share.
struct TilePairs : Pairs {
  static constexpr bool kTiles = true;
  // Sums come to the tiles and go once for each piece.
  static constexpr int64_t kChunk = 128;
  static constexpr int64_t kStripBytes = kStrip * sizeof(float);

  // Sizes of the heads of queries and of values that tiles serve.
  static SPLITPOINT_INLINE bool fits(int64_t size, int64_t value_size) {
    return size % kTileDepth == 0 && value_size % kTileRows == 0;
  }

  // to[j to j + 16, kStrip] = keys[j to j + 16, size] @ queries^T, whose pairs lie
  // [size / 2][kStrip].
  template <int kVecs>
  static SPLITPOINT_INLINE void scores(const Bf16* queries, const WideRows<Bf16>& keys,
                                       int64_t j, int64_t size, float* to) {
    const int64_t row_bytes = keys.stride * static_cast<int64_t>(sizeof(Bf16));
    written();
    zero<kVecs>();
    for (int64_t k = 0; k < size; k += kTileDepth) {
      _tile_loadd(3, keys.data + j * keys.stride + k, row_bytes);
      multiply<kVecs>(queries + k * kStrip);
    }
    keep<kVecs>(to + j * kStrip);
  }

  // sums[size, kStrip] += values^T @ weights, whose pairs lie [keys / 2][kStrip].
  template <int kVecs>
  static SPLITPOINT_INLINE void add_values(const Bf16* values, const Bf16* weights, int64_t keys,
                                           int64_t size, float* sums) {
    written();
    for (int64_t c = 0; c < size; c += kTileRows) {
      float* to = sums + c * kStrip;
      _tile_loadd(0, to, kStripBytes);
      if (kVecs > 1) _tile_loadd(1, to + kLanes, kStripBytes);
      if (kVecs > 2) _tile_loadd(2, to + 2 * kLanes, kStripBytes);
      for (int64_t j = 0; j < keys; j += kTileDepth) {
        _tile_loadd(3, values + c * kChunk + j, kChunk * sizeof(Bf16));
        multiply<kVecs>(weights + j * kStrip);
      }
      keep<kVecs>(to);
    }
  }

  // to[size][kChunk] = values[count, size]^T, zeros for keys up to the next multiple of
  // kTileKeys.
  static SPLITPOINT_INLINE void turn_values(const WideRows<Bf16>& values, int64_t count,
                                            int64_t size, Bf16* to) {
    for (int64_t j = 0; j < count; j += kTileKeys) {
      for (int64_t c = 0; c < size; c += kLanes) {
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const int64_t key = j + 2 * i;
          const Bf16* even = values.data + key * values.stride + c;
          const BitVec low = key < count ? widened(load_bits<HalfVec>(even)) : BitVec{};
          const BitVec high =
              key + 1 < count ? widened(load_bits<HalfVec>(even + values.stride)) << 16 : BitVec{};
          square[i] = (Vec)(low | high);
        }
        turn(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          __builtin_memcpy(to + (c + i) * kChunk + j, &square[i], sizeof(Vec));
        }
      }
    }
  }

 private:
  template <int kVecs>
  static SPLITPOINT_INLINE void zero() {
    _tile_zero(0);
    if (kVecs > 1) _tile_zero(1);
    if (kVecs > 2) _tile_zero(2);
  }
  // Tile 3 by what lies [pairs][kStrip], added to the results.
  template <int kVecs>
  static SPLITPOINT_INLINE void multiply(const Bf16* pairs) {
    _tile_loadd(4, pairs, kStripBytes);
    _tile_dpbf16ps(0, 3, 4);
    if (kVecs > 1) {
      _tile_loadd(5, pairs + 2 * kLanes, kStripBytes);
      _tile_dpbf16ps(1, 3, 5);
    }
    if (kVecs > 2) {
      _tile_loadd(6, pairs + 4 * kLanes, kStripBytes);
      _tile_dpbf16ps(2, 3, 6);
    }
  }
  template <int kVecs>
  static SPLITPOINT_INLINE void keep(float* to) {
    _tile_stored(0, to, kStripBytes);
    if (kVecs > 1) _tile_stored(1, to + kLanes, kStripBytes);
    if (kVecs > 2) _tile_stored(2, to + 2 * kLanes, kStripBytes);
  }
};

}  // namespace splitpoint::SPLITPOINT_ISA
