// What the ATen glue of attention of many rows and its kernels share: plain data, no templates.
#pragma once

#include <cstdint>

#include "attention_types.h"

namespace splitpoint {

// Keys that are scored before their values are summed, at most.
inline constexpr int64_t kMostChunkKeys = 128;

// A block that is one of several holds a multiple of this many tokens, so that pieces can start at
// one.
inline constexpr int64_t kTokenStep = 16;

// Rows (queries times the heads that share keys) of an item: a multiple of three registers of every
// instruction set.
inline constexpr int64_t kWideRows = 192;
inline constexpr int64_t kStripRows = 48;

inline constexpr int64_t kMostHeadSize = 256;

// Sizes of heads, of queries and of values, that these kernels serve.
SPLITPOINT_SHARED bool fits_wide(int64_t size) {
  return size > 0 && size <= kMostHeadSize && size % 8 == 0;
}

// Keys or values of one sequence: all strides count elements.
struct WideKeys {
  const void* data;       // [blocks, kv_heads, block_tokens, size], rows contiguous
  int64_t block, head, row;
};

// The queries of one sequence, all strides counting elements. Query i has the position held + i, and
// sees the keys up to that one if it is causal, and else all.
struct WideArgs {
  const void* q;          // [kv_heads * group, tokens, size], rows contiguous
  int64_t q_head, q_row;
  void* y;                // [kv_heads * group, tokens, value_size], rows contiguous
  int64_t y_head, y_row;
  WideKeys k, v;
  const int32_t* blocks;  // where positions 0 to keys - 1 lie
  int64_t block_tokens;
  const void* mask;       // [kv_heads * group, tokens, keys], or null
  int64_t mask_head, mask_row, mask_key;
  int64_t kv_heads, group, tokens, held, keys, size, value_size;
  int64_t window;         // positions that a query sees, its own among them; 0: all before it
  float scale;
  float softcap;          // 0: none
  DType type;             // of q, k, v and y: f32 or bf16
  Mask mask_type;
  bool causal;
};

inline constexpr int32_t kFirstBlock = 0;

// The queries of one batch, with all of its keys in one block.
SPLITPOINT_SHARED WideArgs wide_args(const AttentionArgs& a, int64_t batch) {
  const int64_t item = a.type == DType::f32 ? 4 : 2;
  const int64_t mask_item = a.mask_type == Mask::boolean ? 1 : a.mask_type == Mask::f32 ? 4 : 2;
  const auto of_batch = [batch](const void* data, int64_t stride, int64_t bytes) {
    return data ? static_cast<const char*>(data) + batch * stride * bytes : nullptr;
  };
  WideArgs wide{};
  wide.q = of_batch(a.q, a.q_strides.batch, item);
  wide.q_head = a.q_strides.head, wide.q_row = a.q_strides.row;
  wide.y = const_cast<char*>(of_batch(a.y, a.y_strides.batch, item));
  wide.y_head = a.y_strides.head, wide.y_row = a.y_strides.row;
  wide.k = {of_batch(a.k, a.k_strides.batch, item), 0, a.k_strides.head, a.k_strides.row};
  wide.v = {of_batch(a.v, a.v_strides.batch, item), 0, a.v_strides.head, a.v_strides.row};
  wide.blocks = &kFirstBlock, wide.block_tokens = a.keys > 0 ? a.keys : 1;
  wide.mask = of_batch(a.mask, a.mask_strides.batch, mask_item);
  wide.mask_head = a.mask_strides.head, wide.mask_row = a.mask_strides.row;
  wide.mask_key = a.mask_stride, wide.mask_type = a.mask_type;
  wide.kv_heads = a.kv_heads, wide.group = a.group, wide.tokens = a.queries, wide.keys = a.keys;
  wide.size = a.size, wide.value_size = a.value_size, wide.scale = a.scale, wide.type = a.type;
  wide.causal = a.causal;
  return wide;
}

// What a query at a position sees starts at this one or after it; a multiple of kTokenStep.
SPLITPOINT_SHARED int64_t first_seen(int64_t window, int64_t position) {
  if (window == 0 || position < window) return 0;
  return (position - window + 1) / kTokenStep * kTokenStep;
}

// Items that threads take one by one.
SPLITPOINT_SHARED int64_t wide_items(const WideArgs& a) {
  return a.kv_heads * ceil_div(a.tokens * a.group, kWideRows);
}

// What an item needs to work in, at a multiple of 64 bytes.
SPLITPOINT_SHARED int64_t wide_floats(int64_t size, int64_t value_size) {
  return (kWideRows + kMostChunkKeys) * (size + value_size) + 3 * kMostChunkKeys * kStripRows +
         5 * kWideRows + 256;
}

}  // namespace splitpoint
