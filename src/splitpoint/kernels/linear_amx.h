// The product over a packed weight on AMX: tiles of 16 rows by 16 columns, multiplied 32 values of
// k at a time. The packed layout of bf16 (pairs of k, column by column) is what the instruction
// takes, so a weight is read where it lies; int8 and 4 bits are widened a slice at a time.
//
// All else, and few rows, for which the tiles would stay empty, runs on the kernels of AVX-512.
#pragma once

#include "amx_tiles.h"
#include "linear_int4.h"

namespace splitpoint::SPLITPOINT_ISA {

inline constexpr int64_t kPanelRowBytes = 2 * kBlock * sizeof(Bf16);  // a pair of k's, all columns

// Rows at and above which the tiles are worth it.
inline constexpr int64_t kFewestRows = 4;

// Depth of a slice: its weights stay in the first-level cache, 32 KiB of 48, for all rows.
inline constexpr int64_t kSliceDepth = 512;
// bf16 that is not deeper than this is not sliced: writing and reading sums once more takes longer
// than reading weights from the second-level cache (10 % at a depth of 1,536).
inline constexpr int64_t kWholeDepth = 4096;

// Bytes of the rows of x that stay in the second-level cache, of 2 MiB on every CPU with AMX,
// while all weights pass by.
inline constexpr int64_t kGroupBytes = 768 * 1024;
inline constexpr int64_t kMostGroupRows = 512;

// sums[rows, kBlock] (+)= x[rows, depth] @ panel[kBlock, depth]^T for up to kPairRows rows, and
// what is fetched meanwhile: `fetch_step` bytes a step of kTileDepth.
struct Pair {
  const Bf16* x;
  int64_t stride;
  const Bf16* w;
  int64_t depth;
  int64_t rows;
  float* sums;
  bool accumulate;
  const char* fetch;
  int64_t fetch_step;
};

// What is left of x and the panel after whole steps, padded with zeros (0 * NaN is not 0, so both
// sides are).
struct alignas(64) Rest {
  Bf16 x[kPairRows][kTileDepth];
  Bf16 w[kTileRows][2 * kBlock];
};

template <bool kTwo>
SPLITPOINT_INLINE void multiply(const void* x, int64_t x_bytes, const void* w) {
  _tile_loadd(4, x, x_bytes);
  _tile_loadd(6, w, kPanelRowBytes);
  _tile_loadd(7, static_cast<const char*>(w) + kPanelRowBytes / 2, kPanelRowBytes);
  _tile_dpbf16ps(0, 4, 6);
  if (kTwo) _tile_loadd(5, static_cast<const char*>(x) + kTileRows * x_bytes, x_bytes);
  _tile_dpbf16ps(1, 4, 7);
  if (kTwo) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <bool kTwo>
inline void run_pair(const Pair& p) {
  constexpr int64_t kSumBytes = kBlock * sizeof(float);
  float* second = p.sums + kTileRows * kBlock;
  written();
  if (p.accumulate) {
    _tile_loadd(0, p.sums, kSumBytes);
    _tile_loadd(1, p.sums + kTileRows, kSumBytes);
    if (kTwo) {
      _tile_loadd(2, second, kSumBytes);
      _tile_loadd(3, second + kTileRows, kSumBytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  const Bf16* x = p.x;
  const Bf16* w = p.w;
  const char* fetch = p.fetch;
  const int64_t x_bytes = p.stride * static_cast<int64_t>(sizeof(Bf16));
  for (int64_t left = p.depth; left >= kTileDepth; left -= kTileDepth) {
    for (int64_t i = 0; i < p.fetch_step; i += 64) __builtin_prefetch(fetch + i, 0, 2);
    fetch += p.fetch_step;
    multiply<kTwo>(x, x_bytes, w);
    x += kTileDepth;
    w += kTileDepth * kBlock;
  }
  if (const int64_t left = p.depth % kTileDepth) {
    Rest rest{};
    for (int64_t r = 0; r < p.rows; ++r) {
      __builtin_memcpy(rest.x[r], x + r * p.stride, left * sizeof(Bf16));
    }
    __builtin_memcpy(rest.w, w, ceil_div(left, 2) * kPanelRowBytes);
    written();
    multiply<kTwo>(rest.x, sizeof(rest.x[0]), rest.w);
  }
  _tile_stored(0, p.sums, kSumBytes);
  _tile_stored(1, p.sums + kTileRows, kSumBytes);
  if (kTwo) {
    _tile_stored(2, second, kSumBytes);
    _tile_stored(3, second + kTileRows, kSumBytes);
  }
}

// Where a product's weights come from: `read` gives a slice of a panel, from k0 on, as pairs of
// bf16, and `end_of` where it ends as it is stored.

struct Bf16Source {
  static constexpr int64_t kMostDepth = kWholeDepth;
  static constexpr int64_t kDepthBytes = kBlock * sizeof(Bf16);  // of one k
  Panels<Dot<Bf16Pairs>> panels;

  Bf16Source(const LinearArgs& a, const Part& part) : panels(a, part) {}
  const Bf16* read(int64_t block, int half, int64_t k0, int64_t) const {
    return panels.at(block, half) + k0 * kBlock;
  }
  const char* end_of(int64_t block, int half, int64_t k) const {
    return reinterpret_cast<const char*>(panels.at(block, half) + k * kBlock);
  }
};

struct Int8Source {
  static constexpr int64_t kMostDepth = kSliceDepth;
  static constexpr int64_t kDepthBytes = kBlock;
  Panels<Dot<Int8Pairs>> panels;
  alignas(64) Bf16 pairs[kSliceDepth * kBlock];

  Int8Source(const LinearArgs& a, const Part& part) : panels(a, part) {}
  const Bf16* read(int64_t block, int half, int64_t k0, int64_t depth) {
    const int8_t* w = panels.at(block, half) + k0 * kBlock;
    for (int64_t k = 0; k < depth; k += 2) {
      for (int v = 0; v < kBlockVecs; ++v) {
        const auto pair = Int8Pairs::pairs(w + k * kBlock, v);
        __builtin_memcpy(pairs + k * kBlock + v * 2 * kLanes, &pair, sizeof(pair));
      }
    }
    return pairs;
  }
  const char* end_of(int64_t block, int half, int64_t k) const {
    return reinterpret_cast<const char*>(panels.at(block, half) + k * kBlock);
  }
};

struct Int4Source {
  static constexpr int64_t kMostDepth = kSliceDepth;  // a multiple of every group
  static constexpr int64_t kDepthBytes = kBlock / 2;
  Int4Panels panels;
  Int4Groups groups;
  alignas(64) Bf16 pairs[kSliceDepth * kBlock];

  Int4Source(const LinearArgs& a, const Part& part) : panels(a, part), groups(a) {}
  const Bf16* read(int64_t block, int half, int64_t k0, int64_t depth) {
    int4_unpack(groups, end_of(block, half, k0), depth / groups.group, pairs);
    return pairs;
  }
  const char* end_of(int64_t block, int half, int64_t k) const {
    return panels.at(block, half) + k / groups.group * groups.bytes();
  }
};

// The loops, from outside in: groups of rows, column blocks, the one or two weights, slices of k,
// pairs of row tiles.
template <class Source>
inline void amx_part(const LinearArgs& a, const Part& part) {
  const auto* x = static_cast<const Bf16*>(a.x);
  Source source(a, part);
  const int64_t slices = a.k > Source::kMostDepth ? ceil_div(a.k, kSliceDepth) : 1;
  const int64_t slice = slices == 1 ? a.k : kSliceDepth;
  const int64_t fitting = kGroupBytes / (a.k * static_cast<int64_t>(sizeof(Bf16)) + 1);
  const int64_t most = fitting < kPairRows         ? kPairRows
                       : fitting > kMostGroupRows ? kMostGroupRows
                                                  : fitting / kPairRows * kPairRows;
  const int halves = a.gated ? 2 : 1;
  alignas(64) float sums[2][kMostGroupRows * kBlock];
  TileState tiles;

  for (int64_t t0 = part.t0; t0 < part.t1; t0 += most) {
    const int64_t rows = part.t1 - t0 < most ? part.t1 - t0 : most;
    const int64_t pairs = ceil_div(rows, kPairRows);
    // Each pair fetches its part of the slice that is read after this one.
    const int64_t step_bytes = ceil_div(kTileDepth * Source::kDepthBytes, pairs * 64) * 64;
    for (int64_t block = part.block0; block < part.block1; ++block) {
      for (int half = 0; half < halves; ++half) {
        for (int64_t s = 0; s < slices; ++s) {
          const int64_t k0 = s * slice;
          const int64_t depth = a.k - k0 < slice ? a.k - k0 : slice;
          const bool ends = s + 1 == slices && half + 1 == halves;
          const char* next = s + 1 == slices ? source.panels.after(block, half)
                                             : source.end_of(block, half, k0 + depth);
          const Bf16* w = source.read(block, half, k0, depth);
          for (int64_t i = 0; i < pairs; ++i) {
            const int64_t r0 = i * kPairRows;
            const int64_t count = rows - r0 < kPairRows ? rows - r0 : kPairRows;
            tiles.use(count);
            const Pair pair{x + (t0 + r0) * a.x_stride + k0,
                            a.x_stride,
                            w,
                            depth,
                            count,
                            sums[half] + r0 * kBlock,
                            s > 0,
                            next ? next + i * step_bytes * (depth / kTileDepth) : nullptr,
                            next ? step_bytes : 0};
            if (count > kTileRows) {
              run_pair<true>(pair);
            } else {
              run_pair<false>(pair);
            }
            if (ends) {
              finish_tile<Bf16>(a, sums[0] + r0 * kBlock, sums[1] + r0 * kBlock, t0 + r0, count,
                                block);
            }
          }
        }
      }
    }
  }
}

}  // namespace splitpoint::SPLITPOINT_ISA
