// The product over a packed weight on AMX: tiles of 16 rows by 16 columns, multiplied 64 bytes of x
// at a time. The packed layouts of bf16 (pairs of k, column by column) and of int8 for an x that is
// rounded too (fours of k) are what the instructions take, so these weights are read where they lie;
// int8 and 4 bits beside an x in bf16 are widened a slice at a time.
//
// All else, and few rows, for which the tiles would stay empty, runs on the kernels of AVX-512.
#pragma once

#include "amx_tiles.h"
#include "linear_int4.h"

namespace splitpoint::SPLITPOINT_ISA {

// Bytes of x that a tile's row holds, and of the values of all columns that four of them meet.
inline constexpr int64_t kStepBytes = 64;
inline constexpr int64_t kPanelRowBytes = 4 * kBlock;

// Rows from which tiles are worth it: of bf16, of int8 beside an x in bf16, and of int8 on both sides.
inline constexpr int64_t kFewestRows = 2, kFewestInt8Rows = 3, kFewestRoundedRows = 4;

// Bytes of a slice's weights, at most: they stay in the first-level cache of 48 KiB for all rows of x,
// which passes by, beside the next slice where more than two pairs of row tiles give memory the time to
// deliver that; so do those that are unpacked, beside what they are unpacked from.
inline constexpr int64_t kTileSliceBytes = 40 * 1024, kManyRowsSliceBytes = 20 * 1024;
inline constexpr int64_t kUnpackedBytes = 32 * 1024;

// Bytes of the rows of x that stay in the second-level cache, of 2 MiB on every CPU with AMX,
// while all weights pass by: 64 rows at a depth of 8,192 in bf16, since for 32 reading the weights
// takes longer than multiplying.
inline constexpr int64_t kGroupBytes = 1152 * 1024;
inline constexpr int64_t kMostGroupRows = 512;

// sums[rows, kBlock] (+)= x[rows, depth] @ panel[kBlock, depth]^T for up to kPairRows rows, and
// what is fetched meanwhile: `fetch_step` bytes a step of kStepBytes. Strides and depth in bytes.
struct Pair {
  const char* x;
  int64_t stride;
  const char* w;
  int64_t depth;
  int64_t rows;
  float* sums;            // of bf16, or int32 of int8
  bool accumulate;
  const char* fetch;
  int64_t fetch_step;
  bool is_first;          // of several that read these weights: they are in no cache yet
};

// What is left of x and the panel after whole steps, padded with zeros (0 * NaN is not 0, so both
// sides are).
struct alignas(64) Rest {
  char x[kPairRows][kStepBytes];
  char w[kTileRows][kPanelRowBytes];
};

// The instructions take the numbers of their tiles as they are written. With kPasses, x passes by the
// weights in the first-level cache.
template <class Value, bool kTwo, bool kPasses>
SPLITPOINT_INLINE void multiply(const void* x, int64_t x_stride, const void* w) {
  constexpr bool kInt8 = sizeof(Value) == 1;
  if constexpr (kPasses) {
    _tile_stream_loadd(4, x, x_stride);
  } else {
    _tile_loadd(4, x, x_stride);
  }
  _tile_loadd(6, w, kPanelRowBytes);
  _tile_loadd(7, static_cast<const char*>(w) + kPanelRowBytes / 2, kPanelRowBytes);
  if constexpr (kInt8) {
    _tile_dpbssd(0, 4, 6);
  } else {
    _tile_dpbf16ps(0, 4, 6);
  }
  const char* second = static_cast<const char*>(x) + kTileRows * x_stride;
  if constexpr (kTwo && kPasses) {
    _tile_stream_loadd(5, second, x_stride);
  } else if constexpr (kTwo) {
    _tile_loadd(5, second, x_stride);
  }
  if constexpr (kInt8) {
    _tile_dpbssd(1, 4, 7);
    if (kTwo) {
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  } else {
    _tile_dpbf16ps(1, 4, 7);
    if (kTwo) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// Sums lie in tiles 0 to 3: rows 0 to 15 and then 16 to 31, each in two halves of the columns.
template <bool kTwo>
SPLITPOINT_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
}
template <bool kTwo>
SPLITPOINT_INLINE void load_sums(const float* from) {
  constexpr int64_t kSumBytes = kBlock * sizeof(float);
  _tile_loadd(0, from, kSumBytes);
  _tile_loadd(1, from + kTileRows, kSumBytes);
  if (kTwo) {
    _tile_loadd(2, from + kTileRows * kBlock, kSumBytes);
    _tile_loadd(3, from + kTileRows * kBlock + kTileRows, kSumBytes);
  }
}
template <bool kTwo>
SPLITPOINT_INLINE void store_sums(float* to) {
  constexpr int64_t kSumBytes = kBlock * sizeof(float);
  _tile_stored(0, to, kSumBytes);
  _tile_stored(1, to + kTileRows, kSumBytes);
  if (kTwo) {
    _tile_stored(2, to + kTileRows * kBlock, kSumBytes);
    _tile_stored(3, to + kTileRows * kBlock + kTileRows, kSumBytes);
  }
}

template <class Value, bool kTwo, bool kPasses>
inline void run_pair(const Pair& p) {
  written();
  if (p.accumulate) {
    load_sums<kTwo>(p.sums);
  } else {
    zero_sums<kTwo>();
  }
  const char* x = p.x;
  const char* w = p.w;
  const char* fetch = p.fetch;
  for (int64_t left = p.depth; left >= kStepBytes; left -= kStepBytes) {
    for (int64_t i = 0; i < p.fetch_step; i += 64) __builtin_prefetch(fetch + i, 0, 2);
    fetch += p.fetch_step;
    if (p.is_first) {
      const char* soon = w + kTileRows * kPanelRowBytes;
      for (int64_t i = 0; i < kTileRows * kPanelRowBytes; i += 64) __builtin_prefetch(soon + i, 0, 3);
    }
    multiply<Value, kTwo, kPasses>(x, p.stride, w);
    x += kStepBytes;
    w += kTileRows * kPanelRowBytes;
  }
  if (const int64_t left = p.depth % kStepBytes) {
    Rest rest{};
    for (int64_t r = 0; r < p.rows; ++r) __builtin_memcpy(rest.x[r], x + r * p.stride, left);
    __builtin_memcpy(rest.w, w, ceil_div(left, 4) * kPanelRowBytes);
    written();
    multiply<Value, kTwo, kPasses>(rest.x, sizeof(rest.x[0]), rest.w);
  }
  store_sums<kTwo>(p.sums);
}

// Where a product's weights come from: `read` gives a slice of a panel, from k0 on, as the tiles take
// it, in values of x's type, and `end_of` where it ends as it is stored. `kInPlace`: the slice is the
// panel's own memory, and not in a cache yet.

// Bf16 in pairs, or int8 in fours.
template <class W, class V>
struct AsTheyLie {
  using Value = V;
  static constexpr bool kInPlace = true;
  static constexpr int64_t kSliceBytes = kTileSliceBytes;
  static constexpr int64_t kDepthBytes = kBlock * sizeof(V);  // of one k, as it is stored
  Panels<W> panels;

  AsTheyLie(const LinearArgs& a, const Part& part) : panels(a, part) {}
  const void* read(int64_t block, int half, int64_t k0, int64_t) const {
    return panels.at(block, half) + k0 * kBlock;
  }
  const char* end_of(int64_t block, int half, int64_t k) const {
    return reinterpret_cast<const char*>(panels.at(block, half) + k * kBlock);
  }
};

struct Int8Fours {
  using Stored = int8_t;
  static constexpr int kDepth = 4;
};

using Bf16Source = AsTheyLie<Dot<Bf16Pairs>, Bf16>;
using QuadsSource = AsTheyLie<Int8Fours, int8_t>;

struct Int8Source {
  using Value = Bf16;
  static constexpr bool kInPlace = false;
  static constexpr int64_t kSliceBytes = kUnpackedBytes;
  static constexpr int64_t kDepthBytes = kBlock;
  Panels<Dot<Int8Pairs>> panels;
  alignas(64) Bf16 pairs[kUnpackedBytes / sizeof(Bf16)];

  Int8Source(const LinearArgs& a, const Part& part) : panels(a, part) {}
  const void* read(int64_t block, int half, int64_t k0, int64_t depth) {
    const int8_t* w = panels.at(block, half) + k0 * kBlock;
    for (int64_t k = 0; k < depth; k += 2) {
      // One pair of tiles alone does not fetch enough while it multiplies.
      __builtin_prefetch(w + k * kBlock + kAheadBytes, 0, 2);
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
  using Value = Bf16;
  static constexpr bool kInPlace = false;
  static constexpr int64_t kSliceBytes = kUnpackedBytes;
  static constexpr int64_t kDepthBytes = kBlock / 2;
  Int4Panels panels;
  Int4Groups groups;
  alignas(64) Bf16 pairs[kUnpackedBytes / sizeof(Bf16)];

  Int4Source(const LinearArgs& a, const Part& part) : panels(a, part), groups(a) {}
  const void* read(int64_t block, int half, int64_t k0, int64_t depth) {
    int4_unpack(groups, end_of(block, half, k0), depth / groups.group, pairs);
    return pairs;
  }
  const char* end_of(int64_t block, int half, int64_t k) const {
    return panels.at(block, half) + k / groups.group * groups.bytes();
  }
};

// Sums of rows of x as fp32, times the rows' scales; what they are before is int32 or fp32.
template <class Sum>
inline void scale_rows(float* sums, const float* scales, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < kBlock; v += kLanes) {
      float* to = sums + r * kBlock + v;
      store(to, __builtin_convertvector(load_bits<Sum>(to), Vec) * scales[r]);
    }
  }
}

// The loops, from outside in: groups of rows, column blocks, the one or two weights, slices of k,
// pairs of row tiles.
template <class Source, class Y>
inline void amx_part(const LinearArgs& a, const Part& part) {
  using Value = typename Source::Value;
  constexpr int64_t kItem = sizeof(Value);
  const auto* x = static_cast<const char*>(a.x);
  const int64_t x_stride = a.x_stride * kItem;
  Source source(a, part);
  const bool many = Source::kInPlace && part.t1 - part.t0 > 2 * kPairRows;
  const int64_t most_depth = (many ? kManyRowsSliceBytes : Source::kSliceBytes) / (kBlock * kItem);
  const int64_t slices = ceil_div(a.k, most_depth);
  const int64_t together = kStepBytes / kItem > a.group ? kStepBytes / kItem : a.group;
  const int64_t slice = ceil_div(ceil_div(a.k, slices), together) * together;
  const int64_t fitting = kGroupBytes / (a.k * kItem + 1);
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
    const int64_t step_bytes =
        ceil_div(kStepBytes / kItem * Source::kDepthBytes, pairs * 64) * 64;
    for (int64_t block = part.block0; block < part.block1; ++block) {
      for (int half = 0; half < halves; ++half) {
        for (int64_t s = 0; s < slices; ++s) {
          const int64_t k0 = s * slice;
          const int64_t depth = a.k - k0 < slice ? a.k - k0 : slice;
          const bool whole = s + 1 == slices;
          const char* next = whole ? source.panels.after(block, half)
                                   : source.end_of(block, half, k0 + depth);
          const void* w = source.read(block, half, k0, depth);
          for (int64_t i = 0; i < pairs; ++i) {
            const int64_t r0 = i * kPairRows;
            const int64_t count = rows - r0 < kPairRows ? rows - r0 : kPairRows;
            tiles.use(count);
            const int64_t fetched = i * step_bytes * (depth * kItem / kStepBytes);
            float* of_pair = sums[half] + r0 * kBlock;
            const Pair pair{x + (t0 + r0) * x_stride + k0 * kItem,
                            x_stride,
                            static_cast<const char*>(w),
                            depth * kItem,
                            count,
                            of_pair,
                            s > 0,
                            next ? next + fetched : nullptr,
                            next ? step_bytes : 0,
                            Source::kInPlace && i == 0 && pairs > 1};
            if (count <= kTileRows) {
              run_pair<Value, false, false>(pair);
            } else if (pairs == 1) {
              run_pair<Value, true, false>(pair);
            } else {
              run_pair<Value, true, true>(pair);
            }
            if (!whole) continue;
            if (kItem == 1) scale_rows<IntVec>(of_pair, a.x_scales + t0 + r0, count);
            if (half + 1 == halves) {
              finish_tile<Y>(a, sums[0] + r0 * kBlock, sums[1] + r0 * kBlock, t0 + r0, count,
                             block);
            }
          }
        }
      }
    }
  }
}

}  // namespace splitpoint::SPLITPOINT_ISA
