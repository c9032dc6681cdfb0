// The torch operator over the kernels of attention over a paged cache: all that is given is checked,
// then the step's keys and values are appended, then its queries attend.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <c10/util/MaybeOwned.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "cached_attention_types.h"
#include "glue.h"
#include "kept_memory.h"

namespace splitpoint {
namespace {

using at::Tensor;

thread_local std::vector<CachedSequence> planned;
thread_local KeptMemory kept_partials, kept_scratch;

c10::MaybeOwned<Tensor> with_whole_rows(const Tensor& tensor) {
  if (tensor.stride(3) == 1) return c10::MaybeOwned<Tensor>::borrowed(tensor);
  return c10::MaybeOwned<Tensor>::owned(tensor.contiguous());
}

void check_shapes(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cache,
                  const Tensor& steps, const Tensor& tables) {
  const auto type = query.scalar_type();
  TORCH_CHECK_TYPE((type == at::kFloat || type == at::kBFloat16) && key.scalar_type() == type &&
                       value.scalar_type() == type && cache.scalar_type() == type,
                   "query, key, value and cache must all be float32 or all bfloat16, got ", type,
                   ", ", key.scalar_type(), ", ", value.scalar_type(), " and ",
                   cache.scalar_type());
  TORCH_CHECK_TYPE(steps.scalar_type() == at::kInt && tables.scalar_type() == at::kInt,
                   "steps and tables must be int32, got ", steps.scalar_type(), " and ",
                   tables.scalar_type());
  TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && query.size(0) == 1 &&
                        key.sizes() == value.sizes() && key.size(0) == 1 &&
                        key.size(2) == query.size(2) && key.size(3) == query.size(3),
                    "query must be [1, heads, tokens, size], key and value [1, kv_heads, tokens, "
                    "size], got ",
                    query.sizes(), ", ", key.sizes(), " and ", value.sizes());
  const int64_t heads = query.size(1), kv_heads = key.size(1), size = query.size(3);
  TORCH_CHECK_VALUE(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, heads,
                    " heads of query cannot share ", kv_heads, " of key");
  TORCH_CHECK_VALUE(fits_wide(size),
                    "the size of a head must be a multiple of 8 up to ", kMostHeadSize, ", got ",
                    size);
  TORCH_CHECK_VALUE(cache.dim() == 6 && cache.size(1) == 2 && cache.size(3) == kv_heads &&
                        cache.size(5) == size && cache.is_contiguous(),
                    "cache must be contiguous and [layers, 2, blocks, ", kv_heads,
                    ", block_tokens, ", size, "], got ", cache.sizes());
  TORCH_CHECK_VALUE(cache.size(4) > 0 && cache.size(4) % kTokenStep == 0,
                    "a block must hold a multiple of ", kTokenStep, " tokens, got ", cache.size(4));
  TORCH_CHECK_VALUE(steps.dim() == 1 && steps.is_contiguous(),
                    "steps must be contiguous and [capacity], got ", steps.sizes());
  TORCH_CHECK_VALUE(tables.dim() == 2 && tables.is_contiguous(),
                    "tables must be contiguous and [rows, blocks], got ", tables.sizes());
}

// The sequences of a step, all that their blocks are reached by checked.
void read_steps(const CachedArgs& a, const Tensor& steps, const Tensor& tables, int64_t tokens,
                int64_t blocks) {
  const int32_t* given = steps.const_data_ptr<int32_t>();
  const int32_t* numbers = tables.const_data_ptr<int32_t>();
  const int64_t capacity = steps.numel(), rows = tables.size(0), width = tables.size(1);
  TORCH_CHECK_VALUE(capacity > 0 && given[0] >= 0 && 3 * int64_t{given[0]} + 2 <= capacity,
                    "steps of ", capacity, " numbers cannot hold ", capacity ? given[0] : 0,
                    " sequences: they need 3 for each, and 2");
  const int64_t n = given[0];
  const int32_t* starts = given + 1;
  const int32_t* lengths = starts + n + 1;
  const int32_t* row_of = lengths + n;
  TORCH_CHECK_VALUE(starts[0] == 0, "the first sequence must start at token 0, not ", starts[0]);
  planned.clear();
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK_VALUE(starts[i] <= starts[i + 1] && starts[i + 1] <= tokens, "sequence ", i,
                      " cannot have tokens ", starts[i], " to ", starts[i + 1], " of ", tokens);
    TORCH_CHECK_VALUE(row_of[i] >= 0 && row_of[i] < rows, "sequence ", i, " cannot have row ",
                      row_of[i], " of a table of ", rows);
    const int64_t held = lengths[i], count = starts[i + 1] - starts[i];
    TORCH_CHECK_VALUE(held >= 0 && held + count <= width * a.block_tokens && held + count < INT32_MAX,
                      "sequence ", i, " of ", held, " tokens and ", count, " more does not fit ",
                      width, " blocks of ", a.block_tokens);
    CachedSequence s{};
    s.first = starts[i], s.tokens = count, s.held = held, s.blocks = numbers + row_of[i] * width;
    if (count == 0) continue;
    for (int64_t b = first_seen(a.window, held) / a.block_tokens; b * a.block_tokens < held + count; ++b) {
      TORCH_CHECK_VALUE(s.blocks[b] >= 0 && s.blocks[b] < blocks, "block ", b, " of sequence ", i,
                        " is ", s.blocks[b], ", which is none of the cache's ", blocks);
    }
    plan(a, s);
    planned.push_back(s);
  }
}

// Copies the step's keys and values to where they belong.
void append(const CachedArgs& a, const Tensor& key, const Tensor& value) {
  const int64_t item = key.itemsize(), bytes = a.size * item;
  const Tensor* given[] = {&key, &value};
  const void* into[] = {a.keys, a.values};
  const int64_t tokens = planned.empty() ? 0 : planned.back().first + planned.back().tokens;
  const auto copy = [&, sequences = planned.data(), count = planned.size()](int64_t begin,
                                                                          int64_t end) {
    for (size_t i = 0; i < count; ++i) {
      const CachedSequence& s = sequences[i];
      const int64_t first = std::max(begin, s.first), last = std::min(end, s.first + s.tokens);
      for (int64_t t = first; t < last; ++t) {
        const int64_t position = s.held + t - s.first, block = s.blocks[position / a.block_tokens];
        const int64_t inside = position % a.block_tokens;
        for (int half = 0; half < 2; ++half) {
          const auto* from = static_cast<const char*>(given[half]->const_data_ptr()) +
                             t * given[half]->stride(2) * item;
          auto* to = static_cast<char*>(const_cast<void*>(into[half])) +
                     (block * a.kv_heads * a.block_tokens + inside) * bytes;
          for (int64_t h = 0; h < a.kv_heads; ++h) {
            std::memcpy(to + h * a.block_tokens * bytes, from + h * given[half]->stride(1) * item,
                        bytes);
          }
        }
      }
    }
  };
  const int64_t worth = static_cast<int64_t>(kBytesWorthAThread) / (4 * a.kv_heads * bytes);
  if (tokens <= worth) return copy(0, tokens);
  parallel(tokens, std::max<int64_t>(1, worth), copy);
}

// How many threads are worth waking: keys are read once for a block of rows.
int64_t workers_for(const CachedArgs& a, int64_t item_bytes) {
  double bytes = 0, products = 0;
  int64_t items = 0;
  for (const CachedSequence& s : planned) {
    const double seen = static_cast<double>(s.held + s.tokens - first_seen(a.window, s.held));
    const double pairs = static_cast<double>(s.rows) * std::max(seen - s.tokens / 2.0, 1.0);
    items += s.items;
    products += 2.0 * a.kv_heads * pairs * a.size;
    bytes += 2.0 * a.kv_heads * seen * a.size * item_bytes;
  }
  const double worth = std::max(bytes / kBytesWorthAThread, products / kProductsWorthAThread);
  if (worth < 2 || items < 2) return 1;
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return std::min({static_cast<int64_t>(threads), items, static_cast<int64_t>(worth)});
}

void attend(const CachedArgs& a, int64_t item_bytes) {
  const KernelTable* table = kernels_in_use();
  int64_t floats = 0;
  for (const CachedSequence& s : planned) floats += partial_floats(a, s);
  if (floats > 0) {
    auto* next = reinterpret_cast<float*>(kept_partials.bytes(floats * sizeof(float)));
    for (CachedSequence& s : planned) {
      if (s.splits > 1) s.partials = next;
      next += partial_floats(a, s);
    }
  }
  const int64_t scratch_bytes = scratch_floats(a) * sizeof(float);
  const int64_t workers = workers_for(a, item_bytes);
  if (workers == 1) {
    char* scratch = kept_scratch.bytes(scratch_bytes);
    for (const CachedSequence& s : planned) {
      for (int64_t item = 0; item < s.items; ++item) attend_cached(*table, a, s, item, scratch);
    }
  } else {
    // Items differ in length: each thread takes the next one when it is done.
    std::atomic<int64_t> taken{0};
    parallel(workers, 1, [&, sequences = planned.data(), count = planned.size()](int64_t, int64_t) {
      char* scratch = kept_scratch.bytes(scratch_bytes);
      size_t i = 0;
      int64_t before = 0;  // items of the sequences before
      while (true) {
        const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
        while (i < count && item - before >= sequences[i].items) before += sequences[i++].items;
        if (i == count) break;
        attend_cached(*table, a, sequences[i], item - before, scratch);
      }
    });
  }
  for (const CachedSequence& s : planned) {
    if (s.splits <= 1) continue;
    for (int64_t h = 0; h < a.kv_heads; ++h) table->merge_few(a, s, h);
  }
}

Tensor cached_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                        const Tensor& cache, const Tensor& steps, const Tensor& tables,
                        int64_t layer, double scale, int64_t window, double softcap) {
  check_shapes(query, key, value, cache, steps, tables);
  TORCH_CHECK_VALUE(layer >= 0 && layer < cache.size(0), "the cache has no layer ", layer,
                    ", but ", cache.size(0));
  TORCH_CHECK_VALUE(window >= 0, "window must not be negative, got ", window);
  TORCH_CHECK_VALUE(softcap >= 0 && std::isfinite(softcap),
                    "softcap must be finite and not negative, got ", softcap);
  const int64_t heads = query.size(1), tokens = query.size(2), size = query.size(3);
  const auto q = with_whole_rows(query), k = with_whole_rows(key), v = with_whole_rows(value);
  CachedArgs a{};
  a.q = q->const_data_ptr(), a.q_head = q->stride(1), a.q_row = q->stride(2);
  a.kv_heads = key.size(1), a.group = heads / a.kv_heads, a.size = size;
  a.block_tokens = cache.size(4);
  a.window = window < INT32_MAX ? window : 0, a.scale = static_cast<float>(scale), a.softcap = static_cast<float>(softcap);
  a.type = query.scalar_type() == at::kFloat ? DType::f32 : DType::bf16;
  read_steps(a, steps, tables, tokens, cache.size(2));

  Tensor y = at::cpu::empty({1, tokens, heads, size}, query.options());
  a.y = y.mutable_data_ptr();
  const int64_t used = planned.empty() ? 0 : planned.back().first + planned.back().tokens;
  const int64_t row_bytes = heads * size * y.itemsize();
  std::memset(static_cast<char*>(a.y) + used * row_bytes, 0, (tokens - used) * row_bytes);
  if (used == 0) return y;
  const int64_t half_bytes = cache.stride(1) * cache.itemsize();
  a.keys = static_cast<char*>(cache.mutable_data_ptr()) + 2 * layer * half_bytes;
  a.values = static_cast<const char*>(a.keys) + half_bytes;
  append(a, *k, *v);
  attend(a, query.itemsize());
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(splitpoint, m) {
  m.def(
      "cached_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) cache, Tensor steps, "
      "Tensor tables, *, int layer, float scale, int window=0, float softcap=0.0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(splitpoint, CPU, m) { m.impl("cached_attention", cached_attention); }

}  // namespace splitpoint
