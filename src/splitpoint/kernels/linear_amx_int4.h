// 4-bit weights on AMX for few rows: tiles multiply values as they are, which is exact, and each
// group's sums meet its scale in fp32. Unpacking is a lookup, and weights need no rounding; sums take
// a way through memory for each group, which many rows repeat more often than the lookup is shorter.
//
// With x rounded to int8 the products are integers, and a row's result has the bits that the dot
// products of AVX-512 give it.
#pragma once

#include "linear_amx.h"

namespace splitpoint::SPLITPOINT_ISA {

// Each kind writes what words of 8 k's hold as rows of a panel, of one register of columns.
// `above` is 8 more than the columns' zero points.

inline constexpr int kAndXor = 0x6a;  // (a & b) ^ c

// Beside an x in bf16: a pair of neighbours a row.
template <bool kZeroPoints>
struct Int4Bf16s {
  using Value = Bf16;
  using Sum = Vec;
  static constexpr int kRows = 4;
  // Of indices of five bits: with zero points a number in two's complement; without, a value of four
  // bits, and the fifth is the neighbour's.
  __m512i table;

  Int4Bf16s() {
    uint16_t values[32];
    for (int i = 0; i < 32; ++i) {
      const float value = kZeroPoints ? (i ^ 16) - 16 : ((i & 15) ^ 8) - 8;
      uint32_t bits;
      __builtin_memcpy(&bits, &value, sizeof(bits));
      values[i] = static_cast<uint16_t>(bits >> 16);
    }
    table = _mm512_loadu_si512(values);
  }
  static SPLITPOINT_INLINE __m512i above(IntVec zero_points) {
    const IntVec one = (zero_points + 8) & 0xffff;
    return (__m512i)(one | one << 16);
  }
  template <int kRow>
  SPLITPOINT_INLINE __m512i row(__m512i words, __m512i above) const {
    __m512i index = _mm512_srli_epi16(words, 4 * kRow);
    if constexpr (kZeroPoints) {
      index = _mm512_ternarylogic_epi32(index, _mm512_set1_epi16(15), _mm512_set1_epi16(8), kAndXor);
      index = _mm512_sub_epi16(index, above);
    }
    return _mm512_permutexvar_epi16(index, table);
  }
};

// Beside an x in int8, whose k's lie as 0, 4, 1, 5, 2, 6, 3, 7: four of them a row.
struct Int4Int8s {
  using Value = int8_t;
  using Sum = IntVec;
  static constexpr int kRows = 2;

  static SPLITPOINT_INLINE __m512i above(IntVec zero_points) {
    const IntVec one = (zero_points + 8) & 0xff;
    return (__m512i)(one | one << 8 | one << 16 | one << 24);
  }
  template <int kRow>
  SPLITPOINT_INLINE __m512i row(__m512i words, __m512i above) const {
    const __m512i low = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4 * kRow),
                                                  _mm512_set1_epi8(15), _mm512_set1_epi8(8),
                                                  kAndXor);
    return _mm512_sub_epi8(low, above);
  }
};

// Values of `groups` groups as rows of a panel.
template <class As>
inline void int4_values(const Int4Groups& g, const As& as, const char* panel, int64_t groups,
                        char* to, Int4Ahead& fetched, const char* end) {
  for (int64_t i = 0; i < groups; ++i, panel += g.bytes()) {
    const char* ahead = fetched.group(end);
    __m512i above[kBlockVecs];
    for (int v = 0; v < kBlockVecs; ++v) {
      above[v] = As::above(__builtin_convertvector(g.zero_point(panel, v), IntVec));
    }
    const char* words = panel + g.head();
    for (int64_t k = 0; k < g.group; k += kWordDepth, words += kWordBytes) {
      fetched.word(ahead, words);
#pragma GCC unroll 2
      for (int v = 0; v < kBlockVecs; ++v) {
        const __m512i packed = (__m512i)int4_words(words, v);
        char* column = to + v * 64;
        _mm512_store_si512(column, as.template row<0>(packed, above[v]));
        _mm512_store_si512(column + kPanelRowBytes, as.template row<1>(packed, above[v]));
        if constexpr (As::kRows == 4) {
          _mm512_store_si512(column + 2 * kPanelRowBytes, as.template row<2>(packed, above[v]));
          _mm512_store_si512(column + 3 * kPanelRowBytes, as.template row<3>(packed, above[v]));
        }
      }
      to += As::kRows * kPanelRowBytes;
    }
  }
}

// sums[rows, kBlock] += the products of some groups, times their scales. Strides in bytes.
struct GroupsPair {
  const char* x;
  int64_t stride;
  const char* w;          // as int4_values wrote it
  const char* panel;      // for the scales
  int64_t groups;
  int64_t rows;
  float* sums;
};

template <class As, bool kTwo>
inline void run_groups(const Int4Groups& g, const GroupsPair& p) {
  using Value = typename As::Value;
  const int64_t depth = g.group * static_cast<int64_t>(sizeof(Value));  // less than a step if 32
  const int64_t step = depth < kStepBytes ? depth : kStepBytes;
  alignas(64) float of_group[kPairRows * kBlock];
  const char* x = p.x;
  const char* w = p.w;
  const char* panel = p.panel;
  for (int64_t i = 0; i < p.groups; ++i, panel += g.bytes()) {
    zero_sums<kTwo>();
    for (int64_t k = 0; k < depth; k += step) {
      multiply<Value, kTwo, true>(x, p.stride, w);
      x += step;
      w += step / 4 * kPanelRowBytes;
    }
    store_sums<kTwo>(of_group);
    written();
    Vec scale[kBlockVecs];
    for (int v = 0; v < kBlockVecs; ++v) scale[v] = g.scale(panel, v);
    for (int64_t r = 0; r < p.rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kBlockVecs; ++v) {
        const int64_t at = r * kBlock + v * kLanes;
        const Vec total = __builtin_convertvector(load_bits<typename As::Sum>(of_group + at), Vec);
        store(p.sums + at, load(p.sums + at) + total * scale[v]);
      }
    }
  }
}

// Rows from which this is faster than the dot products of AVX-512, of an x in bf16 and in int8.
inline constexpr int64_t kFewestInt4Rows = 2, kFewestInt4RoundedRows = 15;

// Rows up to which this is faster than amx_part<Int4Source>, which rounds to bf16 what it unpacks
// and sums over groups in the tiles.
inline constexpr int64_t kMostGroupedRows = 48;

// The loops, from outside in: groups of rows, column blocks, the one or two weights, slices of k,
// pairs of row tiles.
template <class As, class Y>
inline void amx_int4_part(const LinearArgs& a, const Part& part) {
  using Value = typename As::Value;
  constexpr int64_t kItem = sizeof(Value);
  constexpr int64_t kSlice = kUnpackedBytes / (kBlock * kItem);  // a multiple of every group
  const Int4Panels panels(a, part);
  const Int4Groups g(a);
  const As as;
  const int64_t step = g.group * kItem < kStepBytes ? g.group * kItem : kStepBytes;
  const int64_t x_stride = a.x_stride * kItem;
  const int halves = a.gated ? 2 : 1;
  alignas(64) char values[kUnpackedBytes];
  alignas(64) float sums[2][kMostGroupRows * kBlock];
  TileState tiles;

  for (int64_t t0 = part.t0; t0 < part.t1; t0 += kMostGroupRows) {
    const int64_t rows = part.t1 - t0 < kMostGroupRows ? part.t1 - t0 : kMostGroupRows;
    const int64_t pairs = ceil_div(rows, kPairRows);
    const char* x = static_cast<const char*>(a.x) + t0 * x_stride;
    for (int64_t block = part.block0; block < part.block1; ++block) {
      fetch_for_finish<Y>(a, t0, rows, block);
      for (int half = 0; half < halves; ++half) {
        const char* const end = panels.at(block, half) + panels.bytes;
        Int4Ahead fetched(panels, 1, 0, block, half);
        for (int64_t i = 0; i < rows * kBlock; i += kLanes) store(sums[half] + i, Vec{});
        for (int64_t k0 = 0; k0 < a.k; k0 += kSlice) {
          const int64_t groups = (a.k - k0 < kSlice ? a.k - k0 : kSlice) / g.group;
          const char* panel = panels.at(block, half) + k0 / g.group * g.bytes();
          int4_values(g, as, panel, groups, values, fetched, end);
          for (int64_t i = 0; i < pairs; ++i) {
            const int64_t r0 = i * kPairRows;
            const int64_t count = rows - r0 < kPairRows ? rows - r0 : kPairRows;
            tiles.use(count, step);
            const GroupsPair pair{x + r0 * x_stride + k0 * kItem, x_stride, values, panel, groups,
                                  count, sums[half] + r0 * kBlock};
            if (count > kTileRows) {
              run_groups<As, true>(g, pair);
            } else {
              run_groups<As, false>(g, pair);
            }
          }
        }
        if (a.x_scales) scale_rows<Vec>(sums[half], a.x_scales + t0, rows);
      }
      finish_tile<Y>(a, sums[0], sums[1], t0, rows, block);
    }
  }
}

}  // namespace splitpoint::SPLITPOINT_ISA
