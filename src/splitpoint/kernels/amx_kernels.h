// The kernels of AMX, and those of AVX-512 for what tiles do not serve.
#pragma once

#include "cached_amx.h"
#include "linear_amx.h"

// Apart from the namespace around, which has the same names for AVX-512.
namespace splitpoint::SPLITPOINT_ISA::tiles {

inline constexpr bool kDots = true;

inline void run_packed(const LinearArgs& a, const Part& part) {
  if (a.x_type == DType::f32 || part.t1 - part.t0 < kFewestRows) return kAvx512Bf16.packed(a, part);
  if (a.w_type == DType::bf16) return amx_part<Bf16Pairs>(a, part);
  return amx_part<Int8Pairs>(a, part);
}

inline void run_gemv(const LinearArgs& a, const Part& part) { kAvx512Bf16.gemv(a, part); }
inline void widen(const Bf16* from, float* to, int64_t count) { kAvx512Bf16.widen(from, to, count); }
inline uint32_t read(const char* from, int64_t bytes) { return kAvx512Bf16.read(from, bytes); }
inline void run_pack(const PackArgs& a, int64_t block0, int64_t block1) {
  kAvx512Bf16.pack(a, block0, block1);
}
inline void attend(const AttentionArgs& a, const AttentionPart& part) { kAvx512Bf16.attend(a, part); }
inline void attend_cached(const CachedArgs& a, const CachedSequence& of, int64_t item,
                          char* scratch) {
  if (a.type == DType::f32 || of.few || a.size % kTileDepth != 0) {
    return kAvx512Bf16.attend_cached(a, of, item, scratch);
  }
  TileState tiles;
  tiles.use(kPairRows);
  attend_wide<TilePairs>(a, of, item, scratch);
}
inline void merge_cached(const CachedArgs& a, const CachedSequence& of, int64_t kv_head) {
  kAvx512Bf16.merge_cached(a, of, kv_head);
}

}  // namespace splitpoint::SPLITPOINT_ISA::tiles
