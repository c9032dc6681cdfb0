// The keys and values of a sequence in the paged cache, piece by piece, in the form in which they
// are multiplied.
#pragma once

#include "attention_vector.h"
#include "cached_attention_types.h"

namespace splitpoint::SPLITPOINT_ISA {

// Keys that lie together: those of positions [begin, begin + count) of one block and head.
template <class T>
struct Chunk {
  const T* k;
  const T* v;
  int64_t begin, count;
};

// The chunk of the first head that starts at a position and ends before `end`, of `most` keys or
// fewer; none is there from `end` on.
template <class T>
SPLITPOINT_INLINE Chunk<T> chunk_at(const CachedArgs& a, const CachedSequence& s, int64_t begin,
                                    int64_t end, int64_t most) {
  if (begin >= end) return {nullptr, nullptr, begin, 0};
  const auto position = static_cast<uint32_t>(begin), tokens = static_cast<uint32_t>(a.block_tokens);
  const int64_t block = s.blocks[position / tokens], inside = position % tokens;
  int64_t count = a.block_tokens - inside;
  if (count > end - begin) count = end - begin;
  if (count > most) count = most;
  const int64_t at = (block * a.kv_heads * a.block_tokens + inside) * a.size;
  return {static_cast<const T*>(a.keys) + at, static_cast<const T*>(a.values) + at, begin, count};
}

// The same positions of another head.
template <class T>
SPLITPOINT_INLINE Chunk<T> of_head(const CachedArgs& a, const Chunk<T>& c, int64_t kv_head) {
  const int64_t by = kv_head * a.block_tokens * a.size;
  return {c.k + by, c.v + by, c.begin, c.count};
}

// Fetches what is used next, a stretch at a time, into the second-level cache: there is room for
// more lines on their way to it than to the first.
struct Ahead {
  const char* next;
  const char* end;

  template <class T>
  SPLITPOINT_INLINE Ahead(const T* from, int64_t count)
      : next(reinterpret_cast<const char*>(from)),
        end(reinterpret_cast<const char*>(from + count)) {}

  SPLITPOINT_INLINE void fetch(int64_t bytes) {
    const char* stop = next + bytes < end ? next + bytes : end;
    for (; next < stop; next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// Rows of `size` values with zeros behind them.
template <class T>
inline void pad_rows(const T* from, int64_t rows, int64_t size, int64_t padded, T* to) {
  for (int64_t r = 0; r < rows; ++r, from += size, to += padded) {
    __builtin_memcpy(to, from, size * sizeof(T));
    __builtin_memset(to + size, 0, (padded - size) * sizeof(T));
  }
}

}  // namespace splitpoint::SPLITPOINT_ISA
