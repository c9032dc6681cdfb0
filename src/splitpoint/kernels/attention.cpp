// The torch operator over the attention kernels: what is checked, allocated and split into threads.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <optional>

#include "attention_wide_types.h"
#include "glue.h"
#include "kept_memory.h"

namespace splitpoint {
namespace {

using at::Tensor;

Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Rows must be contiguous; what lies around them may lie anyhow.
c10::MaybeOwned<Tensor> with_even_rows(const Tensor& tensor) {
  if (tensor.stride(3) == 1 || tensor.size(3) == 1) {
    return c10::MaybeOwned<Tensor>::borrowed(tensor);
  }
  return c10::MaybeOwned<Tensor>::owned(tensor.contiguous());
}

void set_mask(AttentionArgs& a, const Tensor& query, const Tensor& mask) {
  const auto type = mask.scalar_type();
  TORCH_CHECK_TYPE(type == at::kBool || type == at::kFloat || type == query.scalar_type(),
                   "attn_mask must be bool, float32 or of query's dtype, got ", type);
  a.mask = mask.const_data_ptr();
  a.mask_type = type == at::kBool ? Mask::boolean : type == at::kFloat ? Mask::f32 : Mask::bf16;
  const int64_t sizes[] = {a.batches, query.size(1), a.queries, a.keys};
  int64_t strides[4] = {};
  bool fits = mask.dim() <= 4;
  for (int64_t d = 4 - mask.dim(); fits && d < 4; ++d) {
    const int64_t size = mask.size(d - 4);  // from the last dimension
    fits = size == sizes[d] || size == 1;
    strides[d] = size == 1 ? 0 : mask.stride(d - 4);
  }
  TORCH_CHECK_VALUE(fits, "an attn_mask of shape ", mask.sizes(), " does not broadcast to ",
                    at::IntArrayRef(sizes, 4));
  a.mask_strides = {strides[0], strides[1], strides[2]};
  a.mask_stride = strides[3];
}

double products_of(const AttentionArgs& a) {
  return static_cast<double>(a.batches) * a.kv_heads * a.group * a.queries *
         std::max<int64_t>(a.keys, 1) * (a.size + a.value_size);
}

// Each block of rows with all of its keys.
void run_rowwise(const AttentionArgs& a) {
  const int64_t items = attention_items(a);
  const double worth = std::max(1.0, products_of(a) / kProductsWorthAThread);
  const KernelTable* table = kernels_in_use();
  parallel(items, std::max<int64_t>(1, static_cast<int64_t>(items / worth)),
           [&](int64_t begin, int64_t end) {
             const std::unique_ptr<float[]> scores(new float[kQueryRows * score_stride(a.keys)]);
             table->attend(a, {begin, end, scores.get()});
           });
}

thread_local KeptMemory kept_scratch;

// Block by block of keys, with what is kept between them.
void run_blockwise(const AttentionArgs& a) {
  const KernelTable* table = kernels_in_use();
  const int64_t each = wide_items(wide_args(a, 0)), items = a.batches * each;
  const int64_t bytes = wide_floats(a.size, a.value_size) * static_cast<int64_t>(sizeof(float));
  const double worth = products_of(a) / kProductsWorthAThread;
  uint32_t threads = 1;
  if (items > 1 && worth >= 2) torch_get_num_threads(&threads);
  const int64_t workers = std::min({static_cast<int64_t>(threads), items, int64_t(worth) + 1});
  // Items differ in length where they are causal: each thread takes the next one when it is done,
  // the longest first.
  std::atomic<int64_t> taken{0};
  const auto work = [&](int64_t, int64_t) {
    char* scratch = kept_scratch.bytes(bytes);
    while (true) {
      const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
      if (item >= items) return;
      table->attend_wide(wide_args(a, item % a.batches), item / a.batches, scratch);
    }
  };
  if (workers == 1) return work(0, 1);
  parallel(workers, 1, work);
}

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value,
                 const std::optional<Tensor>& mask, bool is_causal, std::optional<double> scale,
                 bool enable_gqa, bool rows_outside, bool blockwise) {
  TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                    "query, key and value must be [batch, heads, tokens, size], got ",
                    query.sizes(), ", ", key.sizes(), " and ", value.sizes());
  const auto type = query.scalar_type();
  TORCH_CHECK_TYPE((type == at::kFloat || type == at::kBFloat16) && key.scalar_type() == type &&
                       value.scalar_type() == type,
                   "query, key and value must all be float32 or all bfloat16, got ", type, ", ",
                   key.scalar_type(), " and ", value.scalar_type());
  const int64_t heads = query.size(1), kv_heads = key.size(1);
  TORCH_CHECK_VALUE(key.size(0) == query.size(0) && value.size(0) == query.size(0) &&
                        key.size(3) == query.size(3) && value.size(1) == kv_heads &&
                        value.size(2) == key.size(2),
                    "a query of shape ", query.sizes(), ", a key of ", key.sizes(),
                    " and a value of ", value.sizes(), " do not go together");
  TORCH_CHECK_VALUE(query.size(3) > 0, "the heads of a query must not be empty");
  TORCH_CHECK_VALUE(heads == kv_heads || (enable_gqa && kv_heads > 0 && heads % kv_heads == 0),
                    heads, " heads of query cannot share ", kv_heads, " of key",
                    enable_gqa ? "" : ": set enable_gqa");

  TORCH_CHECK_VALUE(!blockwise || (fits_wide(query.size(3)) && fits_wide(value.size(3))),
                    "blockwise attention takes heads of a multiple of 8 up to ", kMostHeadSize,
                    ", got ", query.size(3), " and ", value.size(3));
  TORCH_CHECK_VALUE(!blockwise || std::max(query.size(2), key.size(2)) < INT32_MAX,
                    "blockwise attention takes fewer than 2^31 tokens");

  const auto q = with_even_rows(query), k = with_even_rows(key), v = with_even_rows(value);
  AttentionArgs a{};
  a.q = q->const_data_ptr(), a.k = k->const_data_ptr(), a.v = v->const_data_ptr();
  a.q_strides = strides_of(*q), a.k_strides = strides_of(*k), a.v_strides = strides_of(*v);
  a.batches = query.size(0), a.queries = query.size(2), a.keys = key.size(2);
  a.size = query.size(3), a.value_size = value.size(3);
  // Heads of an expanded key and value are one.
  const bool expanded = a.k_strides.head == 0 && a.v_strides.head == 0;
  a.kv_heads = expanded ? std::min<int64_t>(kv_heads, 1) : kv_heads;
  a.group = a.kv_heads ? heads / a.kv_heads : 0;
  a.scale = static_cast<float>(scale ? *scale : 1 / std::sqrt(static_cast<double>(a.size)));
  a.type = type == at::kFloat ? DType::f32 : DType::bf16;
  a.causal = is_causal;
  if (mask) set_mask(a, query, *mask);

  const int64_t e = a.value_size;
  if (rows_outside) {
    a.y_strides = {a.queries * heads * e, e, heads * e};
  } else {
    a.y_strides = {heads * a.queries * e, a.queries * e, e};
  }
  const int64_t sizes[] = {a.batches, heads, a.queries, e};
  const int64_t strides[] = {a.y_strides.batch, a.y_strides.head, a.y_strides.row, 1};
  Tensor y = at::empty_strided(sizes, strides, query.options());
  if (y.numel() == 0) return y;
  a.y = y.mutable_data_ptr();
  blockwise ? run_blockwise(a) : run_rowwise(a);
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(splitpoint, m) {
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
      "bool is_causal=False, *, float? scale=None, bool enable_gqa=False, "
      "bool rows_outside=False, bool blockwise=False) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(splitpoint, CPU, m) { m.impl("attention", attention); }

}  // namespace splitpoint
