// Four bits by eight: linear layers over 4-bit weights whose x is rounded to int8, a scale a row.
//
// A group's products are summed in integers, which is exact, and added to fp32 sums times the group's
// scale, in the order of k. So a row's result has the same bits whatever the other rows are.
#pragma once

#include "linear_int4.h"
#include "linear_int8.h"

namespace splitpoint::SPLITPOINT_ISA {

#if defined(__AVX2__)
inline constexpr bool kInt4Bytes = true;  // of x; otherwise int16
#else
inline constexpr bool kInt4Bytes = false;
#endif

// Multiplies words of 8 k's by x, in kParts steps. Values of weights have 8 added, so that they are
// from 0 to 15: each sum has 8 times the sum of x too much, which `start` takes off.
#if defined(__AVX2__)

// Four k's a step: those of the bytes' lower halves, and then of their upper ones. x has them in that
// order, 0, 4, 1, 5, 2, 6, 3, 7.
struct Int4Bytes {
  using X = int8_t;
  static constexpr int kParts = 2;

  static SPLITPOINT_INLINE IntVec weight(BitVec words, int p) {
    return (IntVec)((words >> 4 * p & 0x0f0f0f0fu) ^ 0x08080808u);
  }
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  static constexpr int64_t kMostChunk = 128;

  static SPLITPOINT_INLINE IntVec begin(int32_t start) { return start - IntVec{}; }
  static SPLITPOINT_INLINE IntVec add(IntVec acc, IntVec w, IntVec x) {
    return Quads::dot(acc, w, x);
  }
  static SPLITPOINT_INLINE IntVec whole(IntVec acc, int32_t) { return acc; }
#else
  // Sums of two products in int16, of which 15 * 127 * 16 is the largest after so many k's.
  static constexpr int64_t kMostChunk = 32;

  static SPLITPOINT_INLINE IntVec begin(int32_t) { return IntVec{}; }
#if defined(__AVX512BW__)
  static SPLITPOINT_INLINE IntVec add(IntVec acc, IntVec w, IntVec x) {
    return (IntVec)_mm512_add_epi16((__m512i)acc, _mm512_maddubs_epi16((__m512i)w, (__m512i)x));
  }
#else
  static SPLITPOINT_INLINE IntVec add(IntVec acc, IntVec w, IntVec x) {
    return (IntVec)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
  }
#endif
  static SPLITPOINT_INLINE IntVec whole(IntVec acc, int32_t start) {
    return Quads::pairs(acc, 0x00010001 - IntVec{}) + start;
  }
#endif
};

#else

// Two neighbours a step, in int16.
struct Int4Bytes {
  using X = int16_t;
  static constexpr int kParts = 4;
  static constexpr int64_t kMostChunk = 128;

  static SPLITPOINT_INLINE IntVec weight(BitVec words, int p) {
    return (IntVec)((words >> 4 * p & 0x000f000fu) ^ 0x00080008u);
  }
  static SPLITPOINT_INLINE IntVec begin(int32_t start) { return start - IntVec{}; }
  static SPLITPOINT_INLINE IntVec add(IntVec acc, IntVec w, IntVec x) {
    return acc + Quads::pairs(w, x);
  }
  static SPLITPOINT_INLINE IntVec whole(IntVec acc, int32_t) { return acc; }
};

#endif

// k's whose products are summed in integers before they meet their scale.
constexpr int64_t int4_chunk(int64_t group) {
  return group < Int4Bytes::kMostChunk ? group : Int4Bytes::kMostChunk;
}

// --- a tile ----------------------------------------------------------------------------

// Rows whose sums, weights and constants fit the registers.
inline constexpr int kInt4DotRows = kMaxRows;

struct Int4DotTile {
  const Int4Bytes::X* x;
  const int32_t* starts;  // [chunks, t], minus 8 times the sum of x over each
  const char* panel;
  float* sums;            // [rows, kBlock]
  Int4Ahead fetched;
};

// acc += the products of the p-th part of 8 k's.
template <int kRows, int kVecs>
SPLITPOINT_INLINE void int4_dot_step(IntVec (&acc)[kRows][kVecs],
                                     const Rows<Int4Bytes::X, kRows>& x, const char* words, int v0,
                                     int p) {
  using W = Int4Bytes;
  IntVec weight[kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) weight[v] = W::weight(int4_words(words, v0 + v), p);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const IntVec value = load_bits<int32_t>(x.at(r, p * kWordDepth / W::kParts)) - IntVec{};
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[r][v] = W::add(acc[r][v], weight[v], value);
  }
}

// sums[kRows][kBlock] = x[kRows, k] @ panel^T.
template <int kRows>
void int4_dot_tile(const LinearArgs& a, const Int4DotTile& t) {
  using W = Int4Bytes;
  constexpr int kVecs = vecs_for(kRows);
  const Int4Groups g(a);
  const int64_t chunk = int4_chunk(g.group), bytes = g.bytes();
  float* sums = t.sums;
  const char* const end = t.panel + g.groups * bytes;
  const char* panel = t.panel;
  const W::X* x = t.x;
  const int32_t* starts = t.starts;
  Int4Ahead fetched = t.fetched;
  for (int64_t i = 0; i < kRows * kBlock; i += kLanes) store(sums + i, Vec{});
  for (int64_t i = 0; i < g.groups; ++i, panel += bytes) {
    const char* ahead = fetched.group(end);
    const char* words_of_chunk = panel + g.head();
    for (int64_t c = 0; c < g.group; c += chunk, x += chunk, starts += a.t) {
      for (int v0 = 0; v0 < kBlockVecs; v0 += kVecs) {
        IntVec acc[kRows][kVecs];
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < kVecs; ++v) acc[r][v] = W::begin(starts[r]);
        }
        Rows<W::X, kRows> rows(x, a.x_stride);
        const char* words = words_of_chunk;
        for (int64_t k = 0; k < chunk; k += kWordDepth) {
          fetched.word(ahead, words);
          int4_dot_step<kRows, kVecs>(acc, rows, words, v0, 0);
          int4_dot_step<kRows, kVecs>(acc, rows, words, v0, 1);
          if constexpr (W::kParts > 2) {
            int4_dot_step<kRows, kVecs>(acc, rows, words, v0, 2);
            int4_dot_step<kRows, kVecs>(acc, rows, words, v0, 3);
          }
          rows.advance(kWordDepth);
          words += kWordBytes;
        }
        __asm__("" : "+r"(sums));  // or GCC 12 keeps copies of all of them on the stack
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          const Vec scale = g.scale(panel, v0 + v);
          const Vec zero_point = g.zero_point(panel, v0 + v) * 0.125f;
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) {
            const int32_t start = starts[r];
            Vec total = __builtin_convertvector(W::whole(acc[r][v], start), Vec);
            // Exact: both are whole numbers below 2^24.
            if (g.zero_points) total += zero_point * splat(static_cast<float>(start));
            float* to = sums + r * kBlock + (v0 + v) * kLanes;
            store(to, load(to) + total * scale);
          }
        }
      }
      words_of_chunk += chunk / kWordDepth * kWordBytes;
    }
  }
}

template <int... kRow>
struct Int4DotTiles {
  static constexpr void (*run[])(const LinearArgs&, const Int4DotTile&) = {int4_dot_tile<kRow>...};
};
template <int kRows, int... kRow>
struct Int4DotTilesUpTo : Int4DotTilesUpTo<kRows - 1, kRows, kRow...> {};
template <int... kRow>
struct Int4DotTilesUpTo<0, kRow...> : Int4DotTiles<kRow...> {};

// --- all rows --------------------------------------------------------------------------

// The loops, from outside in: column blocks, row tiles, the one or two weights. A block's panels stay
// in the second-level cache over the row tiles.
template <class Y>
inline void int4_dot_part(const LinearArgs& a, const Part& part) {
  const Int4Panels panels(a, part);
  const int64_t height = part.t1 - part.t0, tiles = ceil_div(height, kInt4DotRows);
  const auto* x = static_cast<const Int4Bytes::X*>(a.x);
  alignas(64) float sums[2][kInt4DotRows * kBlock];
  for (int64_t block = part.block0; block < part.block1; ++block) {
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t t0 = part.t0 + height * i / tiles, t1 = part.t0 + height * (i + 1) / tiles;
      fetch_for_finish<Y>(a, t0, t1 - t0, block);
      for (int half = 0; half < (a.gated ? 2 : 1); ++half) {
        const Int4DotTile t{x + t0 * a.x_stride, a.x_starts + t0, panels.at(block, half), sums[half],
                            {panels, tiles, i, block, half}};
        Int4DotTilesUpTo<kInt4DotRows>::run[t1 - t0 - 1](a, t);
        for (int64_t r = 0; r < t1 - t0; ++r) {
          float* row = sums[half] + r * kBlock;
          const Vec scale = splat(a.x_scales[t0 + r]);
          for (int v = 0; v < kBlock; v += kLanes) store(row + v, load(row + v) * scale);
        }
      }
      finish_tile<Y>(a, sums[0], sums[1], t0, t1 - t0, block);
    }
  }
}

inline void run_int4_dots(const LinearArgs& a, const Part& part) {
  if (a.y_type == DType::bf16) return int4_dot_part<Bf16>(a, part);
  int4_dot_part<float>(a, part);
}

// --- x ---------------------------------------------------------------------------------

SPLITPOINT_INLINE void store_for_words(int8_t* to, IntVec values) {
#if defined(__AVX512F__)
  const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  values = (IntVec)_mm512_permutexvar_epi32(order, (__m512i)values);
#elif defined(__AVX2__)
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  values = (IntVec)_mm256_permutevar8x32_epi32((__m256i)values, order);
#endif
  store_rounded(to, values);
}
SPLITPOINT_INLINE void store_for_words(int16_t* to, IntVec values) {
  const HalfVec halves = narrowed((BitVec)values & 0xffffu);
  __builtin_memcpy(to, &halves, sizeof(halves));
}

// As `quantise_of`, but for the order of values and a sum for each chunk.
template <class X>
inline void quantise_words_of(const QuantiseArgs& a, int64_t t0, int64_t t1) {
  const int64_t chunk = int4_chunk(a.group), chunks = a.k / chunk;
  for (int64_t t = t0; t < t1; ++t) {
    const X* x = static_cast<const X*>(a.x) + t * a.x_stride;
    auto* to = static_cast<Int4Bytes::X*>(a.to) + t * a.to_stride;
    const RowScale scale(x, a.k);
    a.scales[t] = scale.value;
    for (int64_t c = 0; c < chunks; ++c) {
      IntVec sums{};
      for (int64_t i = c * chunk; i < (c + 1) * chunk; i += kLanes) {
        const IntVec whole = scale.whole(load(x + i));
        sums += whole;
        store_for_words(to + i, whole);
      }
      a.starts[c * a.t + t] = -8 * sum_lanes(sums);
    }
  }
}

inline void quantise(const QuantiseArgs& a, int64_t t0, int64_t t1) {
  const bool bf16 = a.x_type == DType::bf16;
  if (a.group) return (bf16 ? quantise_words_of<Bf16> : quantise_words_of<float>)(a, t0, t1);
  (bf16 ? quantise_of<Bf16> : quantise_of<float>)(a, t0, t1);
}

}  // namespace splitpoint::SPLITPOINT_ISA
