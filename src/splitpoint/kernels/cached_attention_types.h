// What the ATen glue of attention over a paged cache and its kernels share: plain data, and how a
// sequence is cut into items that threads take one by one.
#pragma once

#include <cstdint>

#include "attention_wide_types.h"

namespace splitpoint {

// Keys that few rows are scored with before their values are summed; a block is read in pieces of at
// most this many.
inline constexpr int64_t kChunkKeys = 64;

// Rows (queries times the heads that share keys) of a sequence that are few: each key is read once
// for all of them, and the keys are cut into splits, whose results are merged. Where a split ends
// depends on the sequence alone, so that results depend on nothing else either.
inline constexpr int64_t kFewRows = 8;
inline constexpr int64_t kLeastSplit = 256;
inline constexpr int64_t kMostSplits = 32;

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

SPLITPOINT_SHARED WideArgs wide_args(const CachedArgs& a, const CachedSequence& s) {
  const int64_t item = a.type == DType::f32 ? 4 : 2, heads = a.kv_heads * a.group;
  const int64_t head = a.block_tokens * a.size;
  WideArgs wide{};
  wide.q = static_cast<const char*>(a.q) + s.first * a.q_row * item;
  wide.q_head = a.q_head, wide.q_row = a.q_row;
  wide.y = static_cast<char*>(a.y) + s.first * heads * a.size * item;
  wide.y_head = a.size, wide.y_row = heads * a.size;
  wide.k = {a.keys, a.kv_heads * head, head, a.size};
  wide.v = {a.values, a.kv_heads * head, head, a.size};
  wide.blocks = s.blocks, wide.block_tokens = a.block_tokens;
  wide.kv_heads = a.kv_heads, wide.group = a.group, wide.tokens = s.tokens, wide.held = s.held;
  wide.keys = s.held + s.tokens, wide.size = wide.value_size = a.size;
  wide.window = a.window, wide.scale = a.scale, wide.softcap = a.softcap, wide.type = a.type;
  wide.mask_type = Mask::none, wide.causal = true;
  return wide;
}

SPLITPOINT_SHARED void plan(const CachedArgs& a, CachedSequence& s) {
  s.rows = s.tokens * a.group;
  s.few = s.rows <= kFewRows;
  s.split_keys = s.first_split = s.splits = s.items = 0;
  s.partials = nullptr;
  if (s.rows == 0) return;
  if (s.few) {
    const int64_t first = first_seen(a.window, s.held), end = s.held + s.tokens;
    s.split_keys = kLeastSplit * ceil_div(end - first, kLeastSplit * kMostSplits);
    s.first_split = first / s.split_keys;
    s.splits = s.items = ceil_div(end, s.split_keys) - s.first_split;
  } else {
    s.items = wide_items(wide_args(a, s));
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
  const int64_t few = a.kv_heads * kFewRows * (2 * size + 8) + 2 * kChunkKeys * (size + kFewRows);
  const int64_t wide = wide_floats(a.size, a.size);
  return (few > wide ? few : wide) + 256;
}

SPLITPOINT_SHARED void attend_cached(const KernelTable& table, const CachedArgs& a,
                                     const CachedSequence& s, int64_t item, char* scratch) {
  if (s.few) return table.attend_few(a, s, item, scratch);
  table.attend_wide(wide_args(a, s), item, scratch);
}

}  // namespace splitpoint
