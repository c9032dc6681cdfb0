// The kernels of attention over a paged cache of one instruction set.
#pragma once

#include "cached_wide.h"

namespace splitpoint::SPLITPOINT_ISA {

template <class F>
inline void attend_cached_as(const CachedArgs& a, const CachedSequence& s, int64_t item,
                             char* scratch) {
  if (s.few) return attend_few<F>(a, s, item, scratch);
  attend_wide<F>(a, s, item, scratch);
}

#if defined(__AVX512BF16__)

inline void attend_cached(const CachedArgs& a, const CachedSequence& s, int64_t item,
                          char* scratch) {
  if (a.type == DType::f32) return kAvx512.attend_cached(a, s, item, scratch);
  attend_cached_as<Pairs>(a, s, item, scratch);
}

inline void merge_cached(const CachedArgs& a, const CachedSequence& s, int64_t kv_head) {
  if (a.type == DType::f32) return kAvx512.merge_cached(a, s, kv_head);
  merge_few<Pairs>(a, s, kv_head);
}

#else

inline void attend_cached(const CachedArgs& a, const CachedSequence& s, int64_t item,
                          char* scratch) {
  if (a.type == DType::f32) return attend_cached_as<Exact<float>>(a, s, item, scratch);
  attend_cached_as<Exact<Bf16>>(a, s, item, scratch);
}

inline void merge_cached(const CachedArgs& a, const CachedSequence& s, int64_t kv_head) {
  if (a.type == DType::f32) return merge_few<Exact<float>>(a, s, kv_head);
  merge_few<Exact<Bf16>>(a, s, kv_head);
}

#endif

}  // namespace splitpoint::SPLITPOINT_ISA
