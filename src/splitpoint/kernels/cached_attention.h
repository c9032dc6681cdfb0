// The kernels of attention over a paged cache of one instruction set, beside those of many rows.
#pragma once

#include "attention_wide.h"
#include "cached_few.h"

namespace splitpoint::SPLITPOINT_ISA {

#if defined(__AVX512BF16__)

inline void attend_few(const CachedArgs& a, const CachedSequence& s, int64_t item, char* scratch) {
  if (a.type == DType::f32) return kAvx512.attend_few(a, s, item, scratch);
  attend_few_as<Pairs>(a, s, item, scratch);
}

inline void merge_few(const CachedArgs& a, const CachedSequence& s, int64_t kv_head) {
  if (a.type == DType::f32) return kAvx512.merge_few(a, s, kv_head);
  merge_few_as<Pairs>(a, s, kv_head);
}

#else

inline void attend_few(const CachedArgs& a, const CachedSequence& s, int64_t item, char* scratch) {
  if (a.type == DType::f32) return attend_few_as<Exact<float>>(a, s, item, scratch);
  attend_few_as<Exact<Bf16>>(a, s, item, scratch);
}

inline void merge_few(const CachedArgs& a, const CachedSequence& s, int64_t kv_head) {
  if (a.type == DType::f32) return merge_few_as<Exact<float>>(a, s, kv_head);
  merge_few_as<Exact<Bf16>>(a, s, kv_head);
}

#endif

}  // namespace splitpoint::SPLITPOINT_ISA
