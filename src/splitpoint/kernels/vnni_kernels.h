// The kernels of int8 dot products (AVX-512 VNNI, AVX-VNNI), and those of the instruction set below,
// SPLITPOINT_BELOW, for all else.
#pragma once

#include "linear_int4_dots.h"

#if defined(__AVX512VNNI__)
#define SPLITPOINT_BELOW kAvx512
#else
#define SPLITPOINT_BELOW kAvx2
#endif

// Apart from the namespace around, as those of AMX are.
namespace splitpoint::SPLITPOINT_ISA::dots {

using SPLITPOINT_ISA::kInt4Bytes;
using SPLITPOINT_ISA::kInt8Dots;
using SPLITPOINT_ISA::quantise;

inline constexpr bool kDots = false;
inline constexpr bool kTakesLines = false;
inline constexpr int64_t kWidenedInt8Rows = 0;

inline void run_packed(const LinearArgs& a, const Part& part) {
  if (a.x_type != DType::i8) return SPLITPOINT_BELOW.packed(a, part);
  if (a.w_type == DType::i4) return run_int4_dots(a, part);
  if (a.y_type == DType::bf16) return packed_part<Quads, Bf16>(a, part);
  packed_part<Quads, float>(a, part);
}

inline void run_gemv(const LinearArgs& a, const Part& part) { SPLITPOINT_BELOW.gemv(a, part); }
inline void widen(const Bf16* from, float* to, int64_t count) {
  SPLITPOINT_BELOW.widen(from, to, count);
}
inline uint32_t read(const char* from, int64_t bytes) { return SPLITPOINT_BELOW.read(from, bytes); }
inline int64_t multiply(DType type, int64_t steps, float* sum) {
  return SPLITPOINT_BELOW.multiply(type, steps, sum);
}
inline void run_pack(const PackArgs& a, int64_t block0, int64_t block1) {
  SPLITPOINT_BELOW.pack(a, block0, block1);
}
inline void sum_groups(const LinearArgs& a, int64_t t0, int64_t t1, float* to) {
  SPLITPOINT_BELOW.sum_groups(a, t0, t1, to);
}
inline void unpack(const LinearArgs& a, int64_t block0, int64_t block1) {
  SPLITPOINT_BELOW.unpack(a, block0, block1);
}
inline void attend(const AttentionArgs& a, const AttentionPart& part) {
  SPLITPOINT_BELOW.attend(a, part);
}
inline void attend_wide(const WideArgs& a, int64_t item, char* scratch) {
  SPLITPOINT_BELOW.attend_wide(a, item, scratch);
}
inline void attend_few(const CachedArgs& a, const CachedSequence& of, int64_t item, char* scratch) {
  SPLITPOINT_BELOW.attend_few(a, of, item, scratch);
}
inline void merge_few(const CachedArgs& a, const CachedSequence& of, int64_t kv_head) {
  SPLITPOINT_BELOW.merge_few(a, of, kv_head);
}

}  // namespace splitpoint::SPLITPOINT_ISA::dots
