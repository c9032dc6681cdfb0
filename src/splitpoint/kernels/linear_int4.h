// Linear layers over 4-bit weights in groups, which are unpacked in registers, or for many rows a slice
// of a block at a time into memory.
#pragma once

#include "linear_packed.h"

namespace splitpoint::SPLITPOINT_ISA {

// A panel is a block of kBlock columns. For each group of k's it has kBlock scales (bf16 or fp32),
// kBlock zero points (int8) if the weight has any, and for every 8 k's a 32-bit word for each
// column. A value is four bits in two's complement, -8 to 7: of 8 k's, those of even k lie in the lower half
// of the word and those of odd k in the upper half, so that one shift gives a pair of neighbours.
inline constexpr int64_t kWordDepth = 8;
inline constexpr int64_t kWordBytes = 4 * kBlock;  // of 8 k's

struct Int4Groups {
  int64_t group, groups;
  bool zero_points, wide_scales;

  explicit Int4Groups(const LinearArgs& a)
      : group(a.group),
        groups(a.group ? a.k / a.group : 0),
        zero_points(a.zero_points),
        wide_scales(a.wide_scales) {}
  int64_t scale_bytes() const { return (wide_scales ? 4 : 2) * kBlock; }
  int64_t head() const { return scale_bytes() + (zero_points ? kBlock : 0); }
  int64_t bytes() const { return head() + group / kWordDepth * kWordBytes; }

  SPLITPOINT_INLINE Vec scale(const char* panel, int v) const {
    return wide_scales ? load(reinterpret_cast<const float*>(panel) + v * kLanes)
                       : load(reinterpret_cast<const Bf16*>(panel) + v * kLanes);
  }
  SPLITPOINT_INLINE Vec zero_point(const char* panel, int v) const {
    return zero_points ? load(reinterpret_cast<const int8_t*>(panel + scale_bytes()) + v * kLanes)
                       : Vec{};
  }
};

SPLITPOINT_INLINE BitVec int4_words(const char* words, int v) {
  return load_bits<BitVec>(words + v * static_cast<int64_t>(sizeof(BitVec)));
}

// The bits at which the value of the p-th of 8 k's starts.
constexpr int int4_shift(int p) { return 4 * (p / 2) + (p % 2 ? 16 : 0); }

#if defined(__AVX512F__)
// A lookup takes the lowest bits of a lane as its index and ignores the rest.
struct Int4Table {
  __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  SPLITPOINT_INLINE Vec value(BitVec words, int p) const {
    return (Vec)_mm512_permutexvar_ps((__m512i)(words >> int4_shift(p)), values);
  }
};
#else
struct Int4Table {
  SPLITPOINT_INLINE Vec value(BitVec words, int p) const {
    return __builtin_convertvector((IntVec)(words << (28 - int4_shift(p))) >> 28, Vec);
  }
};
#endif

// How words meet x in kParts multiplications.
struct Int4Wide {
  using X = float;
  using Unpacked = F32;
  static constexpr int kParts = 8;
  static constexpr bool kInRegisters = false;
  Int4Table table;

  SPLITPOINT_INLINE Vec weight(BitVec words, int p) const { return table.value(words, p); }
  static SPLITPOINT_INLINE Vec x(const X* from, int p) { return splat(from[p]); }
  static SPLITPOINT_INLINE Vec add(Vec acc, Vec w, Vec x) { return acc + w * x; }
};

#if defined(__AVX512BF16__)
struct Int4Dots {
  using X = Bf16;
  using Unpacked = Dot<Bf16Pairs>;
  static constexpr int kParts = 4;
  static constexpr bool kInRegisters = true;
  // bf16 of 0 to 7 and -8 to -1, twice: a lookup in 32 words takes five bits, of which one is the
  // neighbour's.
  __m512i table;

  SPLITPOINT_INLINE Int4Dots() {
    static constexpr uint16_t kValues[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0,
        0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    table = _mm512_loadu_si512(kValues);
  }
  SPLITPOINT_INLINE __m512bh weight(BitVec words, int p) const {
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)words, 4 * p), table);
  }
  static SPLITPOINT_INLINE __m512bh x(const X* from, int p) {
    return (__m512bh)_mm512_set1_epi32(load_bits<int32_t>(from + 2 * p));
  }
  static SPLITPOINT_INLINE Vec add(Vec acc, __m512bh w, __m512bh x) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, w, x);
  }
};
#endif

// --- in registers -------------------------------------------------------------------------

// Rows for which a block is unpacked in registers, once for each row tile, where there are no bf16
// instructions, which leave other units idle: more have it unpacked into memory.
inline constexpr int kFewInt4Rows = 2 * kMaxRows;
static_assert(kFewInt4Rows <= kMostFewRows);

// Multiplications that are summed apart, so that few rows fill the adder's pipeline.
constexpr int int4_sets(int rows) {
  const int sets = kAccumulators / (rows * vecs_for(rows));
  return sets >= 4 ? 4 : sets >= 2 ? 2 : 1;
}

struct Int4Panels {
  const LinearArgs& a;
  const Part& part;
  int64_t bytes;

  Int4Panels(const LinearArgs& a, const Part& part) : a(a), part(part) {
    const Int4Groups g(a);
    bytes = g.groups * g.bytes();
  }
  const char* at(int64_t block, int half) const {
    return static_cast<const char*>(half ? a.second.values : a.first.values) + block * bytes;
  }
  const char* after(int64_t block, int half) const {
    if (a.gated && half == 0) return at(block, 1);
    if (block + 1 < part.block1) return at(block + 1, 0);
    return static_cast<const char*>(part.next);
  }
};

// What a row tile fetches while it reads a panel: `bytes` for each group, in steps of `step` for each
// word. What would lie behind the panel is taken from `next`.
struct Int4Ahead {
  const char* at;
  int64_t bytes, step;
  const char* next;

  // A block's only tile fetches what is some way on in memory, each of many a share of what the next
  // block has.
  Int4Ahead(const Int4Panels& panels, int64_t tiles, int64_t tile, int64_t block, int half)
      : at(panels.at(block, half)), bytes(0), step(0), next(nullptr) {
    const int64_t group_bytes = Int4Groups(panels.a).bytes();
    const char* from = nullptr;
    if (tiles == 1) {
      next = panels.after(block, half), from = at + kAheadBytes;
    } else if (block + 1 < panels.part.block1) {
      from = panels.at(block + 1, half) + tile * (panels.bytes / tiles);
    } else if (half == 0 && panels.part.next) {
      from = static_cast<const char*>(panels.part.next) + tile * (panels.bytes / tiles);
    }
    if (from) at = from, bytes = ceil_div(group_bytes, tiles), step = ceil_div(kWordBytes, tiles);
  }
  // Where the words of a group fetch from, of a panel that ends at `end`.
  SPLITPOINT_INLINE const char* group(const char* end) {
    if (next && at >= end) at = next + (at - end);
    const char* from = at;
    __builtin_prefetch(from + bytes, 0, 2);
    at += bytes;
    return from;
  }
  SPLITPOINT_INLINE void word(const char*& from, const char* words) const {
    __builtin_prefetch(from, 0, 2);
    __builtin_prefetch(from + step / 2, 0, 2);
    __builtin_prefetch(words + kSoonBytes, 0, 3);
    __builtin_prefetch(words + kSoonBytes + 64, 0, 3);
    from += step;
  }
};

// sums[kRows][kBlock] += x[kRows, k] @ panel^T. `x_sums` are the sums of x over each group, a row
// after the other, if there are zero points.
template <class W, int kRows>
void int4_tile(const LinearArgs& a, const typename W::X* x, const char* panel, float* sums,
               const float* x_sums, Int4Ahead fetched) {
  constexpr int kVecs = vecs_for(kRows), kSets = int4_sets(kRows);
  const W weights;
  const Int4Groups g(a);
  const int64_t bytes = g.bytes(), head = g.head();
  const char* const end = panel + g.groups * bytes;
  for (int64_t i = 0; i < g.groups; ++i, panel += bytes, x += g.group) {
    const char* ahead = fetched.group(end);
    for (int v0 = 0; v0 < kBlockVecs; v0 += kVecs) {
      Vec acc[kSets][kRows][kVecs];
#pragma GCC unroll 4
      for (int s = 0; s < kSets; ++s) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < kVecs; ++v) acc[s][r][v] = Vec{};
        }
      }
      Rows<typename W::X, kRows> rows(x, a.x_stride);
      const char* words = panel + head;
      for (int64_t k = 0; k < g.group; k += kWordDepth, words += kWordBytes) {
        fetched.word(ahead, words);
        BitVec packed[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) packed[v] = int4_words(words, v0 + v);
#pragma GCC unroll 8
        for (int p = 0; p < W::kParts; ++p) {
          decltype(weights.weight(packed[0], 0)) weight[kVecs];
#pragma GCC unroll 8
          for (int v = 0; v < kVecs; ++v) weight[v] = weights.weight(packed[v], p);
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) {
            const auto value = W::x(rows.at(r, 0), p);
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) {
              acc[p % kSets][r][v] = W::add(acc[p % kSets][r][v], weight[v], value);
            }
          }
        }
        rows.advance(kWordDepth);
      }
      __asm__("" : "+r"(sums));  // or GCC 12 keeps copies of all of them on the stack
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const Vec scale = g.scale(panel, v0 + v);
        const Vec zero_point = g.zero_point(panel, v0 + v);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          Vec total = acc[0][r][v];
#pragma GCC unroll 4
          for (int s = 1; s < kSets; ++s) total += acc[s][r][v];
          if (g.zero_points) total -= zero_point * splat(x_sums[r * g.groups + i]);
          float* to = sums + r * kBlock + (v0 + v) * kLanes;
          store(to, load(to) + total * scale);
        }
      }
    }
  }
}

template <class W>
using Int4Kernel = void (*)(const LinearArgs&, const typename W::X*, const char*, float*,
                            const float*, Int4Ahead);

template <class W, int... kRow>
struct Int4Tiles {
  static constexpr Int4Kernel<W> run[] = {int4_tile<W, kRow>...};
};
template <class W, int kRows, int... kRow>
struct Int4TilesUpTo : Int4TilesUpTo<W, kRows - 1, kRows, kRow...> {};
template <class W, int... kRow>
struct Int4TilesUpTo<W, 0, kRow...> : Int4Tiles<W, kRow...> {};

// The loops, from outside in: column blocks, row tiles, the one or two weights.
template <class W, class Y>
inline void int4_tiles(const LinearArgs& a, const Part& part) {
  const auto* x = static_cast<const typename W::X*>(a.x);
  const Int4Panels panels(a, part);
  const int64_t height = part.t1 - part.t0, tiles = ceil_div(height, kMaxRows);
  const int64_t groups = Int4Groups(a).groups;
  alignas(64) float sums[2][kMaxRows * kBlock];
  for (int64_t block = part.block0; block < part.block1; ++block) {
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t t0 = part.t0 + height * i / tiles, t1 = part.t0 + height * (i + 1) / tiles;
      fetch_for_finish<Y>(a, t0, t1 - t0, block);
      for (int half = 0; half < (a.gated ? 2 : 1); ++half) {
        for (int64_t j = 0; j < (t1 - t0) * kBlock; j += kLanes) store(sums[half] + j, Vec{});
        Int4TilesUpTo<W, kMaxRows>::run[t1 - t0 - 1](
            a, x + t0 * a.x_stride, panels.at(block, half), sums[half],
            offset(a.x_sums, t0 * groups), {panels, tiles, i, block, half});
      }
      finish_tile<Y>(a, sums[0], sums[1], t0, t1 - t0, block);
    }
  }
}

// --- into memory -------------------------------------------------------------------------

// k's that are unpacked at a time: a multiple of every group, and 64 KiB, of which the first-level
// cache holds a part and the second-level cache all.
template <class Stored>
inline constexpr int64_t kUnpackedDepth = 64 * 1024 / (kBlock * sizeof(Stored));

// Unpacks `groups` groups to (value - zero point) * scale as a packed panel of fp32: exact where the
// scale is a bf16 or an fp16, times four or five bits.
inline void int4_unpack(const Int4Groups& g, const char* panel, int64_t groups, float* to) {
  const Int4Table table;
  for (int64_t i = 0; i < groups; ++i, panel += g.bytes()) {
    for (int v = 0; v < kBlockVecs; ++v) {
      const Vec scale = g.scale(panel, v);
      const Vec zero_point = g.zero_point(panel, v);
      float* row = to + i * g.group * kBlock + v * kLanes;
      const char* words = panel + g.head();
      for (int64_t k = 0; k < g.group; k += kWordDepth, words += kWordBytes) {
        const BitVec packed = int4_words(words, v);
#pragma GCC unroll 8
        for (int p = 0; p < 8; ++p, row += kBlock) {
          store(row, (table.value(packed, p) - zero_point) * scale);
        }
      }
    }
  }
}

// The same as pairs of bf16, rounded.
inline void int4_unpack(const Int4Groups& g, const char* panel, int64_t groups, Bf16* to) {
  const Int4Table table;
  for (int64_t i = 0; i < groups; ++i, panel += g.bytes()) {
    for (int v = 0; v < kBlockVecs; ++v) {
      const Vec scale = g.scale(panel, v);
      const Vec zero_point = g.zero_point(panel, v);
      Bf16* row = to + i * g.group * kBlock + 2 * v * kLanes;
      const char* words = panel + g.head();
      for (int64_t k = 0; k < g.group; k += kWordDepth, words += kWordBytes) {
        const BitVec packed = int4_words(words, v);
#pragma GCC unroll 4
        for (int p = 0; p < 8; p += 2, row += 2 * kBlock) {
          HalfVec halves[2];
          store(reinterpret_cast<Bf16*>(&halves[0]), (table.value(packed, p) - zero_point) * scale);
          store(reinterpret_cast<Bf16*>(&halves[1]),
                (table.value(packed, p + 1) - zero_point) * scale);
          const BitVec pair = widened(halves[0]) | widened(halves[1]) << 16;
          __builtin_memcpy(row, &pair, sizeof(pair));
        }
      }
    }
  }
}

// Rows whose fp32 sums are kept between slices of k, so that each is unpacked once for them.
inline constexpr int64_t kInt4GroupRows = 512;

template <class W, class Y>
inline void int4_many_rows(const LinearArgs& a, const Part& part) {
  using U = typename W::Unpacked;
  using Stored = typename U::Stored;
  constexpr int64_t kDepth = kUnpackedDepth<Stored>;
  const auto* x = static_cast<const typename W::X*>(a.x);
  const Int4Panels panels(a, part);
  const Int4Groups g(a);
  const int64_t height = part.t1 - part.t0;
  const int64_t row_groups = ceil_div(height, kInt4GroupRows);
  const int halves = a.gated ? 2 : 1;
  alignas(64) Stored unpacked[kDepth * kBlock];
  float sums[2][kInt4GroupRows * kBlock];
  for (int64_t block = part.block0; block < part.block1; ++block) {
    for (int64_t i = 0; i < row_groups; ++i) {
      const int64_t t0 = part.t0 + height * i / row_groups;
      const int64_t t1 = part.t0 + height * (i + 1) / row_groups;
      const int64_t tiles = ceil_div(t1 - t0, kMaxRows);
      for (int half = 0; half < halves; ++half) {
        for (int64_t k0 = 0; k0 < a.k; k0 += kDepth) {
          const int64_t depth = a.k - k0 < kDepth ? a.k - k0 : kDepth;
          const char* panel = panels.at(block, half) + k0 / g.group * g.bytes();
          int4_unpack(g, panel, depth / g.group, unpacked);
          const bool ends = k0 + depth == a.k && half + 1 == halves;
          const auto* ahead = reinterpret_cast<const char*>(unpacked);
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t r0 = (t1 - t0) * tile / tiles, r1 = (t1 - t0) * (tile + 1) / tiles;
            if (ends) fetch_for_finish<Y>(a, t0 + r0, r1 - r0, block);
            run_tile<U>(r1 - r0, {x + (t0 + r0) * a.x_stride + k0, a.x_stride, unpacked, depth,
                                  sums[half] + r0 * kBlock, k0 > 0, {ahead, 0, 0, ahead}});
            if (ends) {
              finish_tile<Y>(a, sums[0] + r0 * kBlock, sums[1] + r0 * kBlock, t0 + r0, r1 - r0,
                             block);
            }
          }
        }
      }
    }
  }
}

template <class W, class Y>
inline void int4_part(const LinearArgs& a, const Part& part) {
  if (part.t1 == part.t0) return;
  if (!W::kInRegisters && a.k > 0 && part.t1 - part.t0 > kFewInt4Rows) {
    return int4_many_rows<W, Y>(a, part);
  }
  int4_tiles<W, Y>(a, part);
}

// --- all of a weight -------------------------------------------------------------------

// k's that are unpacked of one block before the next: few enough rows of the result that their
// pages' addresses stay translated.
inline constexpr int64_t kUnpackedRows = 128;

// y[k, n] = the weight, transposed and dequantised, of an int8 or int4 product in a packed layout.
template <class Y>
inline void unpack_part(const LinearArgs& a, int64_t block0, int64_t block1) {
  alignas(64) float panel[kUnpackedRows * kBlock];
  const Int4Groups g(a);
  const auto* values = static_cast<const char*>(a.first.values);
  const int64_t stored = a.w_type == DType::i8 ? ceil_div(a.k, 2) * 2 * kBlock
                                               : g.groups * g.bytes();
  for (int64_t k0 = 0; k0 < a.k; k0 += kUnpackedRows) {
    const int64_t depth = a.k - k0 < kUnpackedRows ? a.k - k0 : kUnpackedRows;
    for (int64_t block = block0; block < block1; ++block) {
      const int64_t c = block * kBlock;
      const int64_t count = a.n - c < kBlock ? a.n - c : kBlock;
      const char* from = values + block * stored;
      if (a.w_type == DType::i8) {
        float scale[kBlock] = {};
        for (int64_t i = 0; i < count; ++i) scale[i] = a.first.scale[c + i];
        const auto* bytes = reinterpret_cast<const int8_t*>(from) + k0 * kBlock;
        for (int64_t i = 0; i < depth * kBlock; i += kLanes) {
          store(panel + i, load(bytes + i) * load(scale + i % kBlock));
        }
      } else {
        int4_unpack(g, from + k0 / g.group * g.bytes(), depth / g.group, panel);
      }
      Y* to = static_cast<Y*>(a.y) + k0 * a.y_stride + c;
      for (int64_t k = 0; k < depth; ++k, to += a.y_stride) {
        const float* row = panel + k * kBlock;
        if (count == kBlock) {
          for (int64_t i = 0; i < kBlock; i += kLanes) store(to + i, load(row + i));
        } else {
          Y out[kBlock];
          for (int64_t i = 0; i < kBlock; i += kLanes) store(out + i, load(row + i));
          for (int64_t i = 0; i < count; ++i) to[i] = out[i];
        }
      }
    }
  }
}
inline void unpack(const LinearArgs& a, int64_t block0, int64_t block1) {
  if (a.y_type == DType::bf16) return unpack_part<Bf16>(a, block0, block1);
  unpack_part<float>(a, block0, block1);
}

// The sums of rows of x over each group: to[t1 - t0, groups].
template <class X>
inline void sum_groups_of(const LinearArgs& a, int64_t t0, int64_t t1, float* to) {
  for (int64_t t = t0; t < t1; ++t) {
    const X* x = static_cast<const X*>(a.x) + t * a.x_stride;
    for (int64_t k = 0; k < a.k; k += a.group) {
      Vec total{};
      for (int64_t i = k; i < k + a.group; i += kLanes) total += load(x + i);
      *to++ = sum(total);
    }
  }
}
inline void sum_groups(const LinearArgs& a, int64_t t0, int64_t t1, float* to) {
  if (a.x_type == DType::bf16) return sum_groups_of<Bf16>(a, t0, t1, to);
  sum_groups_of<float>(a, t0, t1, to);
}

}  // namespace splitpoint::SPLITPOINT_ISA
