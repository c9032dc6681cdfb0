// The keys and values of a sequence in the paged cache, piece by piece, in the form in which they
// are multiplied.
#pragma once

#include "cached_vector.h"
#include "linear_kernels.h"

namespace splitpoint::SPLITPOINT_ISA {

// Keys that lie together: those of positions [begin, begin + count) of one block and head.
template <class T>
struct Chunk {
  const T* k;
  const T* v;
  int64_t begin, count;
};

// The chunk that starts at a position and ends before `end`; none is there from `end` on.
template <class T>
SPLITPOINT_INLINE Chunk<T> chunk_at(const CachedArgs& a, const CachedSequence& s, int64_t kv_head,
                                    int64_t begin, int64_t end) {
  if (begin >= end) return {nullptr, nullptr, begin, 0};
  const auto position = static_cast<uint32_t>(begin), tokens = static_cast<uint32_t>(a.block_tokens);
  const int64_t block = s.blocks[position / tokens], inside = position % tokens;
  int64_t count = a.block_tokens - inside;
  if (count > end - begin) count = end - begin;
  if (count > kChunkKeys) count = kChunkKeys;
  const int64_t at = ((block * a.kv_heads + kv_head) * a.block_tokens + inside) * a.size;
  return {static_cast<const T*>(a.keys) + at, static_cast<const T*>(a.values) + at, begin, count};
}

// Fetches a stretch of what is used next, in bytes from its start, up to its end.
struct Ahead {
  const char* from;
  int64_t bytes;

  template <class T>
  SPLITPOINT_INLINE Ahead(const T* from, int64_t count)
      : from(reinterpret_cast<const char*>(from)), bytes(count * static_cast<int64_t>(sizeof(T))) {}

  SPLITPOINT_INLINE void fetch(int64_t begin, int64_t end) const {
    if (end > bytes) end = bytes;
    for (int64_t i = begin; i < end; i += 64) __builtin_prefetch(from + i, 0, 3);
  }
};

// Rows side by side as they are multiplied, copied to `room` only if they are stored otherwise.
template <class F>
SPLITPOINT_INLINE const typename F::Work* as_work(const typename F::T* from, int64_t count,
                                                  typename F::Work* room) {
  if constexpr (F::kWidens) {
    widen(from, room, count);
    return room;
  } else {
    return from;
  }
}

// Rows of `size` values with zeros behind them.
template <class T>
inline void pad_rows(const T* from, int64_t rows, int64_t size, int64_t padded, T* to) {
  for (int64_t r = 0; r < rows; ++r, from += size, to += padded) {
    __builtin_memcpy(to, from, size * sizeof(T));
    __builtin_memset(to + size, 0, (padded - size) * sizeof(T));
  }
}

}  // namespace splitpoint::SPLITPOINT_ISA
