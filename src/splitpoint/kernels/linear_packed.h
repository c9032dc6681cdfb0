// The skinny matrix product over a packed weight: a register-blocked kernel that reads each
// weight once for up to 14 rows of x, and the loops around it.
#pragma once

#include "linear_multipliers.h"

namespace splitpoint::SPLITPOINT_ISA {

inline constexpr int kBlockVecs = kBlock / kLanes;

// Rows of x that a kernel call takes at most: as many as there are accumulators for, with two
// registers of columns each.
inline constexpr int kMaxRows = kAccumulators / (kBlockVecs < 2 ? kBlockVecs : 2);

// Registers of columns that a kernel for so many rows takes side by side, beside their weights and
// a value of x.
constexpr int vecs_for(int rows) {
  int vecs = kBlockVecs;
  while (vecs > 1 && (rows + 1) * vecs + 1 > kRegisters) vecs /= 2;
  return vecs;
}

// Steps of k that are written out one after the other. All of them are added to the same sums, in
// the order of k, so that a row's result does not depend on how many rows there are; that memory
// feeds few rows takes longer than their additions do, which wait for each other.
constexpr int unroll_for(int rows) {
  const int sets = kAccumulators / (rows * vecs_for(rows));
  return sets >= 4 ? 4 : sets >= 2 ? 2 : 1;
}

// What a tile kernel fetches while it multiplies: at every step the lines at `at` and half a `step`
// after it, which then moves on by `step` bytes; after `steps` of them it goes to `next`.
struct TileAhead {
  const char* at;
  int64_t step;
  int64_t steps;  // 0: all
  const char* next;
};

// What a tile kernel is given: sums[rows][kBlock] (+)= x[rows, depth] @ block[kBlock, depth]^T.
template <class W>
struct Tile {
  const typename W::X* x;
  int64_t stride;
  const typename W::Stored* w;
  int64_t depth;
  float* sums;
  bool accumulate;
  TileAhead ahead;
  const int32_t* x_starts;  // of these rows, or null; see LinearArgs
  const float* x_scales;    // of these rows once their sums are whole; until then null
};

// Lines of a step that are fetched while it is multiplied.
enum class Lines { none, one, two };

template <class W, int kRows, int kVecs, Lines kLines>
SPLITPOINT_INLINE void tile_columns(const Tile<W>& t, const typename W::Stored* w, float* sums) {
  constexpr int kUnroll = unroll_for(kRows);
  constexpr int64_t kStored = W::kDepth * kBlock;
  using Sum = typename W::Sum;
  Sum acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      acc[r][v] =
          t.accumulate ? load_bits<Sum>(sums + r * kBlock + v * kLanes) : W::start(t, r);
    }
  }
  Rows<typename W::X, kRows> rows(t.x, t.stride);
  const char* ahead = t.ahead.at;
  int64_t ahead_steps = t.ahead.steps;
  int64_t steps = t.depth / W::kDepth;
  for (; steps >= kUnroll; steps -= kUnroll) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const auto* soon = reinterpret_cast<const char*>(w + u * kStored) + kSoonBytes;
      if constexpr (kLines != Lines::none) {
        __builtin_prefetch(ahead, 0, 2);
        __builtin_prefetch(soon, 0, 3);
      }
      if constexpr (kLines == Lines::two) {
        __builtin_prefetch(ahead + t.ahead.step / 2, 0, 2);
        __builtin_prefetch(soon + 64, 0, 3);
      }
      if constexpr (kLines != Lines::none) {
        ahead = --ahead_steps == 0 ? t.ahead.next : ahead + t.ahead.step;
      }
      W::template step<kRows, kVecs>(acc, rows, u * W::kDepth, w + u * kStored);
    }
    rows.advance(kUnroll * W::kDepth);
    w += kUnroll * kStored;
  }
  if (kUnroll > 1) {
    for (; steps > 0; --steps) {
      W::template step<kRows, kVecs>(acc, rows, 0, w);
      rows.advance(W::kDepth);
      w += kStored;
    }
  }
  if (t.depth % W::kDepth) W::template last<kRows, kVecs>(acc, rows, w);
  W::keep(t, acc, sums);
}

// Bytes of a block that are read once for each pass over its columns, and those of kManyRows: they
// stay in the first-level cache.
inline constexpr int64_t kPassBytes = 16 * 1024;
inline constexpr int64_t kManyPassBytes = 24 * 1024;
inline constexpr int64_t kManyRows = 64;

// Where the registers are too few for all columns, there are several passes over them, slice by
// slice of k. What is fetched ahead is shared out among the passes, so that memory idles in none.
template <class W, int kRows>
void tile(const Tile<W>& t) {
  constexpr int kVecs = vecs_for(kRows), kPasses = kBlockVecs / kVecs;
  if constexpr (kPasses == 1) return tile_columns<W, kRows, kVecs, Lines::two>(t, W::columns(t.w, 0), t.sums);
  constexpr int64_t kSlice = kPassBytes / (kBlock * sizeof(typename W::Stored));  // of k
  static_assert(kSlice % (4 * W::kDepth) == 0);
  Tile<W> part = t;
  part.ahead.step = t.ahead.step / kPasses;
  const int64_t until = t.ahead.steps * kPasses;  // steps of a pass, to where `next` begins
  int64_t done = 0;
  int64_t k = 0;
  do {  // once at least, since without any k the sums are zero
    const bool last = t.depth - k <= kSlice;
    part.x = t.x + k;
    part.w = t.w + k * kBlock;
    part.depth = last ? t.depth - k : kSlice;
    part.accumulate = t.accumulate || k > 0;
    part.x_scales = last ? t.x_scales : nullptr;
    for (int v = 0; v < kBlockVecs; v += kVecs) {
      const bool later = until > 0 && done >= until;
      part.ahead.at = later ? t.ahead.next + (done - until) * part.ahead.step
                            : t.ahead.at + done * part.ahead.step;
      part.ahead.steps = later ? 0 : until - done;
      tile_columns<W, kRows, kVecs, Lines::one>(part, W::columns(part.w, v), t.sums + v * kLanes);
      done += part.depth / W::kDepth;
    }
  } while ((k += kSlice) < t.depth);
}

// One of these passes over a slice, whose columns are in the first-level cache or, with `fetches`, on
// their way to it.
template <class W, int kRows>
void tile_pass(const Tile<W>& t, int pass, bool fetches) {
  constexpr int kVecs = vecs_for(kRows);
  if constexpr (kVecs < kBlockVecs) {
    const int v = pass * kVecs;
    const auto* w = W::columns(t.w, v);
    float* sums = t.sums + v * kLanes;
    if (fetches) return tile_columns<W, kRows, kVecs, Lines::one>(t, w, sums);
    tile_columns<W, kRows, kVecs, Lines::none>(t, w, sums);
  }
}

// The kernel for each number of rows, from 1 on.
template <class W, int... kRow>
struct Tiles {
  static constexpr void (*run[])(const Tile<W>&) = {tile<W, kRow>...};
  static constexpr void (*run_pass[])(const Tile<W>&, int, bool) = {tile_pass<W, kRow>...};
};
template <class W, int kRows, int... kRow>
struct TilesUpTo : TilesUpTo<W, kRows - 1, kRows, kRow...> {};
template <class W, int... kRow>
struct TilesUpTo<W, 0, kRow...> : Tiles<W, kRow...> {};

template <class W>
SPLITPOINT_INLINE void run_tile(int64_t rows, const Tile<W>& t) {
  TilesUpTo<W, kMaxRows>::run[rows - 1](t);
}

// What is fetched ahead is fetched before: between the steps it would take as long as it saves.
template <class W>
SPLITPOINT_INLINE void run_pass(int64_t rows, Tile<W>& t, int pass, bool fetches) {
  const int64_t bytes = t.ahead.step * (t.depth / W::kDepth);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(t.ahead.at + at, 0, 2);
  t.ahead = {reinterpret_cast<const char*>(t.w), 0, 0, nullptr};
  TilesUpTo<W, kMaxRows>::run_pass[rows - 1](t, pass, fetches);
}

// Bytes of a slice of k for many row tiles: it stays in the second-level cache over them, beside what
// is being fetched.
inline constexpr int64_t kSliceBytes = 256 * 1024;

// Row tiles that go over a slice of kPassBytes together, so that memory is read in order all the time.
// Of more, keeping the sums between so short slices takes longer than reading the second-level cache.
inline constexpr int64_t kFewTiles = 4;

// Rows whose fp32 sums are kept between slices of k.
inline constexpr int64_t kGroupRows = 8 * kMaxRows;

// Bytes of x that go over all blocks before what follows does: they stay in the second-level cache.
// For fewer than kLeastBandRows, reading all weights again would take longer than reading x does;
// where these have more than kMostBandBytes there is one band.
inline constexpr int64_t kBandBytes = 384 * 1024;
inline constexpr int64_t kLeastBandRows = 96;
inline constexpr int64_t kMostBandBytes = 1024 * 1024;

// All columns of a block, for a row tile: what belongs to a column is loaded once for all rows.
// Without a scale or bias, times one and plus zero change nothing.
template <Activation kActivation, bool kGated, class Y>
inline void finish_block(const LinearArgs& a, const float* sums, const float* second_sums,
                         int64_t t, int64_t rows, int64_t c) {
  for (int i = 0; i < kBlock; i += kLanes) {
    const int64_t column = c + i;
    const auto scale_of = [&](const Product& p) { return p.scale ? load(p.scale + column) : splat(1); };
    const auto shift_of = [&](const Product& p) {
      return p.bias ? load(static_cast<const Y*>(p.bias) + column) : Vec{};
    };
    const Vec scale = scale_of(a.first), shift = shift_of(a.first);
    const Vec second_scale = kGated ? scale_of(a.second) : splat(1);
    const Vec second_shift = kGated ? shift_of(a.second) : Vec{};
    const float* from = sums + i;
    const float* second_from = second_sums + i;
    Y* y = static_cast<Y*>(a.y) + t * a.y_stride + column;
    const Y* residual = offset(static_cast<const Y*>(a.residual), t * a.residual_stride + column);
    for (int64_t r = 0; r < rows; ++r, from += kBlock, second_from += kBlock, y += a.y_stride) {
      Vec out = activated(kActivation, load(from) * scale + shift);
      if constexpr (kGated) out *= load(second_from) * second_scale + second_shift;
      if (residual) {
        out += load(residual);
        residual += a.residual_stride;
      }
      store(y, out);
    }
  }
}

template <Activation kActivation, class Y>
inline void finish_gated_or_not(const LinearArgs& a, const float* sums, const float* second_sums,
                                int64_t t, int64_t rows, int64_t c) {
  if (a.gated) return finish_block<kActivation, true, Y>(a, sums, second_sums, t, rows, c);
  finish_block<kActivation, false, Y>(a, sums, second_sums, t, rows, c);
}

template <class Y>
void finish_tile(const LinearArgs& a, const float* sums, const float* second_sums, int64_t t,
                 int64_t rows, int64_t block) {
  const int64_t c = block * kBlock;
  if (a.n - c < kBlock) {
    for (int64_t r = 0; r < rows; ++r) {
      finish_row<Y>(a, sums + r * kBlock, second_sums + r * kBlock, t + r, c, a.n - c);
    }
    return;
  }
  switch (a.activation) {
    case Activation::none:
      return finish_gated_or_not<Activation::none, Y>(a, sums, second_sums, t, rows, c);
    case Activation::silu:
      return finish_gated_or_not<Activation::silu, Y>(a, sums, second_sums, t, rows, c);
    case Activation::gelu_tanh:
      return finish_gated_or_not<Activation::gelu_tanh, Y>(a, sums, second_sums, t, rows, c);
    case Activation::gelu_erf:
      return finish_gated_or_not<Activation::gelu_erf, Y>(a, sums, second_sums, t, rows, c);
  }
}

// Fetches what finish_tile will need of a block's columns, a line or two in each row and far apart,
// which no hardware prefetcher follows, while the product is still being computed.
template <class Y>
inline void fetch_for_finish(const LinearArgs& a, int64_t t, int64_t rows, int64_t block) {
  const int64_t c = block * kBlock;
  const int64_t bytes = kBlock * static_cast<int64_t>(sizeof(Y));
  for (int64_t r = t; r < t + rows; ++r) {
    const char* y = reinterpret_cast<const char*>(static_cast<Y*>(a.y) + r * a.y_stride + c);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(y + i, 1, 3);
    if (!a.residual) continue;
    const auto* residual = reinterpret_cast<const char*>(static_cast<const Y*>(a.residual) +
                                                         r * a.residual_stride + c);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(residual + i, 0, 3);
  }
}

// The panels of a part: of each block its first and, if gated, its second.
template <class W>
struct Panels {
  using Stored = typename W::Stored;
  static constexpr int64_t kRowBytes = kBlock * sizeof(Stored);  // of one k
  const LinearArgs& a;
  const Part& part;
  int64_t bytes;  // of a panel

  Panels(const LinearArgs& a, const Part& part)
      : a(a), part(part), bytes(ceil_div(a.k, W::kDepth) * W::kDepth * kRowBytes) {}
  const char* bytes_at(int64_t block, int half) const {
    return static_cast<const char*>(half ? a.second.values : a.first.values) + block * bytes;
  }
  const Stored* at(int64_t block, int half) const {
    return reinterpret_cast<const Stored*>(bytes_at(block, half));
  }
  // What is read next, where each panel is read once.
  const char* after(int64_t block, int half) const {
    if (a.gated && half == 0) return bytes_at(block, 1);
    if (block + 1 < part.block1) return bytes_at(block + 1, 0);
    return static_cast<const char*>(part.next);
  }
  // What is read next into this half's place.
  const char* below(int64_t block, int half) const {
    if (block + 1 < part.block1) return bytes_at(block + 1, half);
    return half == 0 ? static_cast<const char*>(part.next) : nullptr;
  }
};

// Who reads a panel: so many groups of row tiles, slice by slice of k.
struct Readers {
  int64_t groups, group, tiles, tile;
};

// The share of a tile in what is fetched while k's [k0, k0 + depth) of a panel are multiplied.
// What few tiles read lies a little ahead in the same panel; many take so long that it is the next
// panel, evenly over all tiles and, if it stays in the second-level cache that long, all groups.
template <class W>
SPLITPOINT_INLINE TileAhead share_of(const Panels<W>& panels, int64_t block, int half, Readers by,
                                 bool in_order, int64_t k0, int64_t depth) {
  constexpr int64_t kStepBytes = W::kDepth * Panels<W>::kRowBytes;
  const int64_t from = k0 * Panels<W>::kRowBytes, steps = depth / W::kDepth;
  const char* panel = panels.bytes_at(block, half);
  if (in_order) {
    const char* next = panels.after(block, half);
    const int64_t step = ceil_div(kStepBytes, by.tiles);
    const int64_t at = from + kAheadBytes + by.tile * steps * step;
    if (at < panels.bytes) {
      return {panel + at, step, next ? ceil_div(panels.bytes - at, step) : 0, next};
    }
    if (next) return {next + (at - panels.bytes), step, 0, next};
  } else if (const char* next = panels.below(block, half)) {
    const bool in_all = panels.bytes <= kSliceBytes;
    if (in_all || by.group + 1 == by.groups) {
      const int64_t shares = in_all ? by.groups : 1, share = in_all ? by.group : 0;
      const int64_t step = ceil_div(kStepBytes, by.tiles * shares);
      const int64_t at = (panels.bytes * share + from) / shares + by.tile * steps * step;
      return {next + at, step, 0, next};
    }
  }
  return {panel, 0, 0, panel};
}

// The loops, from outside in: bands of rows (in packed_part), column blocks, groups of rows, the one
// or two weights, slices of k, row tiles. Row tiles are evened out (15 rows are 8 and 7, not 14 and 1),
// as a tile's cost per row falls with its rows.
template <class W, class Y>
inline void packed_band(const LinearArgs& a, const Part& part) {
  constexpr int64_t kTogether = W::kDepth > 2 ? W::kDepth : 2;  // of k, in one slice
  const auto* x = static_cast<const typename W::X*>(a.x);
  const Panels<W> panels(a, part);
  const int64_t height = part.t1 - part.t0;
  const int64_t groups = ceil_div(height, kGroupRows);
  const bool in_order = height <= kFewTiles * kMaxRows;
  // The columns of a pass stay in the first-level cache over all row tiles. Those that are unpacked
  // while they are multiplied gain nothing by it.
  constexpr int kPasses = kBlockVecs / vecs_for(kMaxRows);
  const bool by_pass = kPasses > 1 && sizeof(typename W::Stored) == sizeof(float) && !in_order;
  const int64_t most_bytes = !in_order && !by_pass   ? kSliceBytes
                             : height < kManyRows ? kPassBytes
                                                  : kManyPassBytes;
  const int64_t most_depth = most_bytes / Panels<W>::kRowBytes;
  const int64_t slices = a.k > most_depth ? ceil_div(a.k, most_depth) : 1;
  const int64_t slice = ceil_div(ceil_div(a.k, slices), kTogether) * kTogether;
  const int halves = a.gated ? 2 : 1;
  float sums[2][kGroupRows * kBlock];

  for (int64_t block = part.block0; block < part.block1; ++block) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t t0 = part.t0 + height * g / groups;
      const int64_t t1 = part.t0 + height * (g + 1) / groups;
      const int64_t tiles = ceil_div(t1 - t0, kMaxRows);
      for (int half = 0; half < halves; ++half) {
        for (int64_t s = 0; s < slices; ++s) {
          const int64_t k0 = s * slice;
          const int64_t depth = a.k - k0 < slice ? a.k - k0 : slice;
          const auto* w = panels.at(block, half) + k0 * kBlock;
          const float* x_scales = s + 1 == slices ? a.x_scales : nullptr;
          const bool ends = s + 1 == slices && half + 1 == halves;
          for (int pass = 0; pass < (by_pass ? kPasses : 1); ++pass) {
            const bool whole = ends && (pass + 1 == kPasses || !by_pass);
            for (int64_t i = 0; i < tiles; ++i) {
              const int64_t r0 = (t1 - t0) * i / tiles, r1 = (t1 - t0) * (i + 1) / tiles;
              const Readers by{groups, g, by_pass ? kPasses * tiles : tiles, pass * tiles + i};
              Tile<W> tile{x + (t0 + r0) * a.x_stride + k0, a.x_stride, w, depth,
                           sums[half] + r0 * kBlock, s > 0,
                           share_of(panels, block, half, by, in_order, k0, depth),
                           offset(a.x_starts, t0 + r0), offset(x_scales, t0 + r0)};
              if (whole) fetch_for_finish<Y>(a, t0 + r0, r1 - r0, block);
              if (by_pass) {
                run_pass<W>(r1 - r0, tile, pass, i == 0);
              } else {
                run_tile<W>(r1 - r0, tile);
              }
              if (whole) {
                finish_tile<Y>(a, sums[0] + r0 * kBlock, sums[1] + r0 * kBlock, t0 + r0, r1 - r0,
                               block);
              }
            }
          }
        }
      }
    }
  }
}

template <class W, class Y>
inline void packed_part(const LinearArgs& a, const Part& part) {
  const int64_t height = part.t1 - part.t0;
  const int64_t row_bytes = a.k * static_cast<int64_t>(sizeof(typename W::X));
  int64_t rows = height;
  if (height * row_bytes > kBandBytes && kLeastBandRows * row_bytes <= kMostBandBytes) {
    const int64_t fitting = kBandBytes / row_bytes;
    rows = fitting > kLeastBandRows ? fitting : kLeastBandRows;
  }
  const int64_t bands = height > 0 ? ceil_div(height, rows) : 0;
  Part band = part;
  for (int64_t b = 0; b < bands; ++b) {
    band.t0 = part.t0 + height * b / bands;
    band.t1 = part.t0 + height * (b + 1) / bands;
    const bool last = b + 1 == bands;
    band.next = last ? part.next : Panels<W>(a, part).bytes_at(part.block0, 0);
    packed_band<W, Y>(a, band);
  }
}

}  // namespace splitpoint::SPLITPOINT_ISA
