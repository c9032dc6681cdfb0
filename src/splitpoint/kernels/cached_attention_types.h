// What the ATen glue of attention over a paged cache and its kernels share: plain data, and how a
// sequence is cut into items that threads take one by one.
#pragma once

#include <cstdint>

#include "attention_types.h"

namespace splitpoint {

// Keys that are scored before their values are summed; a block of the cache is read in pieces of at
// most this many.
inline constexpr int64_t kChunkKeys = 64;

// A block of the cache holds a multiple of this many tokens, so that pieces can start at one.
inline constexpr int64_t kTokenStep = 16;

// Rows (queries times the heads that share keys) of a sequence that are few: each key is read once
// for all of them, and the keys are cut into splits, whose results are merged. Where a split ends
// depends on the sequence alone, so that results depend on nothing else either.
inline constexpr int64_t kFewRows = 8;
inline constexpr int64_t kLeastSplit = 256;
inline constexpr int64_t kMostSplits = 32;

// Rows of an item where there are many: a multiple of three registers of every instruction set.
inline constexpr int64_t kWideRows = 144;
inline constexpr int64_t kStripRows = 48;

inline constexpr int64_t kMostHeadSize = 256;

// All strides count elements. y[i, h] = sum over j of softmax(q[h, i] . k[h', j] * scale)[j]
// v[h', j] with h' = h / group, over the positions j that the query's own lets it see.
struct CachedArgs {
  const void* q;          // [kv_heads * group, tokens, size]
  int64_t q_head, q_row;
  const void* keys;       // [blocks, kv_heads, block_tokens, size], those of one layer
  const void* values;     // likewise
  void* y;                // [tokens, kv_heads * group, size], contiguous
  int64_t kv_heads, group, size, block_tokens;
  int64_t window;         // positions that a query sees, its own among them; 0: all before it
  float scale;
  float softcap;          // 0: none
  DType type;             // of all of them: f32 or bf16
};

struct CachedSequence {
  int64_t first, tokens;  // which of this step's are its own
  int64_t held;           // tokens before them
  const int32_t* blocks;  // where positions 0 to held + tokens - 1 lie
  // Filled in by plan():
  bool few;
  int64_t rows, items, split_keys, first_split, splits;
  float* partials;        // partial_floats() of its own, if any
};

// The first position that its first query sees, at a multiple of kTokenStep.
SPLITPOINT_SHARED int64_t first_seen(const CachedArgs& a, int64_t position) {
  if (a.window == 0 || position < a.window) return 0;
  return (position - a.window + 1) / kTokenStep * kTokenStep;
}

SPLITPOINT_SHARED void plan(const CachedArgs& a, CachedSequence& s) {
  s.rows = s.tokens * a.group;
  s.few = s.rows <= kFewRows;
  s.split_keys = s.first_split = s.splits = s.items = 0;
  s.partials = nullptr;
  if (s.rows == 0) return;
  if (s.few) {
    const int64_t first = first_seen(a, s.held), end = s.held + s.tokens;
    s.split_keys = kLeastSplit * ceil_div(end - first, kLeastSplit * kMostSplits);
    s.first_split = first / s.split_keys;
    s.splits = s.items = ceil_div(end, s.split_keys) - s.first_split;
  } else {
    s.items = a.kv_heads * ceil_div(s.rows, kWideRows);
  }
}

// A row's unfinished result: its columns, to whole registers, and then the largest score and the sum
// of weights.
SPLITPOINT_SHARED int64_t padded_size(int64_t size) { return ceil_div(size, 32) * 32; }
SPLITPOINT_SHARED int64_t partial_stride(int64_t size) { return padded_size(size) + 16; }

SPLITPOINT_SHARED int64_t partial_floats(const CachedArgs& a, const CachedSequence& s) {
  return s.splits > 1 ? s.splits * a.kv_heads * s.rows * partial_stride(a.size) : 0;
}

// What an item needs to work in, at a multiple of 64 bytes.
SPLITPOINT_SHARED int64_t scratch_floats(const CachedArgs& a) {
  const int64_t size = padded_size(a.size);
  const int64_t few = a.kv_heads * kFewRows * (2 * size + 8);
  return few + 2 * kChunkKeys * size + 2 * kChunkKeys * kStripRows + 2 * kWideRows * size +
         4 * kWideRows + 256;
}

}  // namespace splitpoint
