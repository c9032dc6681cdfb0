// The kernels of AMX, and those of AVX-512 for what tiles do not serve.
#pragma once

#include "attention_amx.h"
#include "linear_amx.h"
#include "linear_amx_int4.h"

// Apart from the namespace around, which has the same names for AVX-512.
namespace splitpoint::SPLITPOINT_ISA::tiles {

inline constexpr bool kDots = true;
inline constexpr bool kTakesLines = true;
inline constexpr bool kInt8Dots = true;
inline constexpr bool kInt4Bytes = true;

// On these CPUs a dot product of bf16 takes as long as four of fp32, and widening int8 the rest.
inline constexpr int64_t kWidenedInt8Rows = kFewestInt8Rows - 1;

inline void run_packed(const LinearArgs& a, const Part& part) {
  const int64_t rows = part.t1 - part.t0;
  if (a.x_type == DType::f32 || a.k == 0 || rows == 0) return kAvx512Bf16.packed(a, part);
  const bool bf16 = a.y_type == DType::bf16;
  if (a.x_type == DType::i8) {  // sums of integers are the same in any order
    const bool int4 = a.w_type == DType::i4;
    if (rows < (int4 ? kFewestInt4RoundedRows : kFewestRoundedRows)) {
      return kAvx512Bf16.packed(a, part);
    }
    if (int4) {
      return bf16 ? amx_int4_part<Int4Int8s, Bf16>(a, part)
                  : amx_int4_part<Int4Int8s, float>(a, part);
    }
    return bf16 ? amx_part<QuadsSource, Bf16>(a, part) : amx_part<QuadsSource, float>(a, part);
  }
  if (a.w_type == DType::i4) {
    if (rows < kFewestInt4Rows) return kAvx512Bf16.packed(a, part);
    if (rows > kMostGroupedRows) return amx_part<Int4Source, Bf16>(a, part);
    return a.zero_points ? amx_int4_part<Int4Bf16s<true>, Bf16>(a, part)
                         : amx_int4_part<Int4Bf16s<false>, Bf16>(a, part);
  }
  // Tiles add products in another order than the dot products of few rows, but in one for any rows.
  const bool int8 = a.w_type == DType::i8;
  if (rows < (int8 ? kFewestInt8Rows : kFewestRows) && !a.batch_invariant) {
    return kAvx512Bf16.packed(a, part);
  }
  if (int8) return amx_part<Int8Source, Bf16>(a, part);
  amx_part<Bf16Source, Bf16>(a, part);
}

inline void run_gemv(const LinearArgs& a, const Part& part) { kAvx512Bf16.gemv(a, part); }
inline void widen(const Bf16* from, float* to, int64_t count) { kAvx512Bf16.widen(from, to, count); }
inline uint32_t read(const char* from, int64_t bytes) { return kAvx512Bf16.read(from, bytes); }
inline int64_t multiply(DType type, int64_t steps, float* sum) {
  if (type == DType::f32) return kAvx512Bf16.multiply(type, steps, sum);
  TileState tiles;
  tiles.use(kPairRows);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return steps * 4 * 2 * kTileRows * kTileRows * kTileDepth;
}
inline void quantise(const QuantiseArgs& a, int64_t t0, int64_t t1) {
  kAvx512Vnni.quantise(a, t0, t1);
}
inline void run_pack(const PackArgs& a, int64_t block0, int64_t block1) {
  kAvx512Bf16.pack(a, block0, block1);
}
inline void sum_groups(const LinearArgs& a, int64_t t0, int64_t t1, float* to) {
  kAvx512Bf16.sum_groups(a, t0, t1, to);
}
inline void unpack(const LinearArgs& a, int64_t block0, int64_t block1) {
  kAvx512Bf16.unpack(a, block0, block1);
}
inline void attend(const AttentionArgs& a, const AttentionPart& part) { kAvx512Bf16.attend(a, part); }
inline void attend_wide(const WideArgs& a, int64_t item, char* scratch) {
  if (a.type == DType::f32 || !TilePairs::fits(a.size, a.value_size)) {
    return kAvx512Bf16.attend_wide(a, item, scratch);
  }
  TileState tiles;
  tiles.use(kPairRows);
  attend_wide_as<TilePairs>(a, item, scratch);
}
inline void attend_few(const CachedArgs& a, const CachedSequence& of, int64_t item, char* scratch) {
  kAvx512Bf16.attend_few(a, of, item, scratch);
}
inline void merge_few(const CachedArgs& a, const CachedSequence& of, int64_t kv_head) {
  kAvx512Bf16.merge_few(a, of, kv_head);
}

}  // namespace splitpoint::SPLITPOINT_ISA::tiles
