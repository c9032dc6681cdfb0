// What the ATen glue of attention and its kernels share: plain data, no templates.
#pragma once

#include <cstdint>

#include "linear_types.h"

namespace splitpoint {

// Rows of queries that a kernel takes together: they share what it reads of keys and values.
inline constexpr int64_t kQueryRows = 4;

// Scores of a row are kept for a multiple of this many keys: the widest register's lanes.
inline constexpr int64_t kScoreLanes = 16;

enum class Mask { none, boolean, f32, bf16 };

// Strides count elements. The last dimension of q, k, v and y is contiguous.
struct Strides {
  int64_t batch, head, row;
};

// y[b, h, i] = sum over j of softmax(q[b, h, i] . k[b, h', j] * scale + mask)[j] v[b, h', j] with
// h' = h / group. A row that no key is left for is zero.
struct AttentionArgs {
  const void* q;          // [batches, kv_heads * group, queries, size]
  const void* k;          // [batches, kv_heads, keys, size]
  const void* v;          // [batches, kv_heads, keys, value_size]
  const void* mask;       // [batches, kv_heads * group, queries, keys], or null
  void* y;                // [batches, kv_heads * group, queries, value_size]
  Strides q_strides, k_strides, v_strides, mask_strides, y_strides;
  int64_t mask_stride;    // from key to key
  int64_t batches, kv_heads, group, queries, keys, size, value_size;
  float scale;
  DType type;             // of q, k, v and y: f32 or bf16
  Mask mask_type;
  bool causal;            // query i sees keys 0 to i
};

// A part of the work that one thread does: items are blocks of kQueryRows queries of the heads that
// share keys and values.
struct AttentionPart {
  int64_t begin, end;
  float* scores;          // kQueryRows * score_stride(keys) of its own
};

// Always inlined: what one instruction set's file leaves behind must not serve another's.
#define SPLITPOINT_SHARED inline __attribute__((always_inline))

SPLITPOINT_SHARED int64_t row_blocks(const AttentionArgs& a) {
  return ceil_div(a.group * a.queries, kQueryRows);
}

SPLITPOINT_SHARED int64_t attention_items(const AttentionArgs& a) {
  return a.batches * a.kv_heads * row_blocks(a);
}

SPLITPOINT_SHARED int64_t score_stride(int64_t keys) {
  return ceil_div(keys, kScoreLanes) * kScoreLanes;
}

}  // namespace splitpoint
