// Attention of few rows over a paged cache, as in decoding: what takes time is to read keys and
// values, so each is read once for all rows. Four rows' products with a key share a register.
#pragma once

#include "cached_chunks.h"

namespace splitpoint::SPLITPOINT_ISA {

// Registers that hold kQuads rows each. Scores and weights of a set lie as [keys / 4][kLanes]: four
// keys of each of its rows.
inline constexpr int kFewSets = kFewRows / kQuads;
inline constexpr int64_t kSetScores = kChunkKeys * kQuads;

// Registers of columns that so many rows of a result take side by side.
constexpr int few_columns(int rows) {
  const int vecs = (kLanes == 16 ? 20 : 12) / rows;
  return vecs >= 8 ? 8 : vecs >= 4 ? 4 : 2;
}

// What is kept of a set between chunks: unit i of a quarter belongs to every fourth key.
struct FewState {
  Vec top, total;
};

template <class F>
struct Few {
  using T = typename F::T;
  using Work = typename F::Work;

  const CachedArgs& a;
  const CachedSequence& s;
  int64_t size, padded, quads, sets;
  // Of each head:
  Work* q;           // [sets][quads][kLanes units]
  float* out;        // [rows][padded], columns as finish_row_of() finds them
  FewState* state;   // [sets]
  // Of the chunk at work:
  float* scores;     // [sets][kSetScores]
  Work* weights;     // likewise; the same memory where scores are what weights are
  Work* k_room;
  T* v_room;
  IntVec last[kFewSets];  // the position of each row
  float factors[kFewRows];

  SPLITPOINT_INLINE Few(const CachedArgs& a, const CachedSequence& s, char* memory)
      : a(a), s(s), size(a.size) {
    padded = padded_size(size);
    quads = size / (4 * F::kDepth);
    sets = ceil_div(s.rows, kQuads);
    Scratch scratch{memory};
    state = scratch.take<FewState>(a.kv_heads * sets);
    q = scratch.take<Work>(a.kv_heads * q_stride());
    out = scratch.take<float>(a.kv_heads * s.rows * padded);
    scores = scratch.take<float>(kFewSets * kSetScores);
    weights = F::kDepth == 2 ? scratch.take<Work>(kFewSets * kSetScores)
                             : reinterpret_cast<Work*>(scores);
    k_room = F::kWidens ? scratch.take<Work>(kChunkKeys * size) : nullptr;
    v_room = padded == size ? nullptr : scratch.take<T>(kChunkKeys * padded);
  }

  SPLITPOINT_INLINE int64_t q_stride() const { return sets * kQuads * size; }

  SPLITPOINT_INLINE void start() {
    for (int64_t set = 0; set < sets; ++set) {
      for (int64_t i = 0; i < kQuads; ++i) {
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) {
          last[set][i * 4 + l] = static_cast<int32_t>(s.held + token_of(set * kQuads + i));
        }
      }
    }
    for (int64_t head = 0; head < a.kv_heads; ++head) start_head(head);
    __builtin_memset(out, 0, a.kv_heads * s.rows * padded * sizeof(float));
  }

  // Where a set has no more rows the last one stands again.
  SPLITPOINT_INLINE int64_t row_at(int64_t row) const { return row < s.rows ? row : s.rows - 1; }
  SPLITPOINT_INLINE int64_t token_of(int64_t row) const { return row_at(row) / a.group; }

  SPLITPOINT_INLINE void start_head(int64_t kv_head) {
    const T* queries = static_cast<const T*>(a.q);
    for (int64_t set = 0; set < sets; ++set) {
      state[kv_head * sets + set] = {splat(kMinusInfinity), Vec{}};
      for (int64_t i = 0; i < kQuads; ++i) {
        const int64_t row = set * kQuads + i;
        const int64_t head = kv_head * a.group + row_at(row) % a.group;
        Work wide[F::kWidens ? kMostHeadSize : 1];
        const Work* query = as_work<F>(
            queries + head * a.q_head + (s.first + token_of(row)) * a.q_row, size, wide);
        Work* to = q + kv_head * q_stride() + (set * quads * kQuads + i) * 4 * F::kDepth;
        for (int64_t c = 0; c < quads; ++c) {
          __builtin_memcpy(to + c * kLanes * F::kDepth, query + c * 4 * F::kDepth, 16);
        }
      }
    }
  }

  // Scores of kSets sets with a chunk's keys, without the scale.
  template <int kSets>
  SPLITPOINT_INLINE void score(int64_t kv_head, int64_t first_set, const Work* keys, int64_t count,
                               Ahead& ahead) {
    constexpr int kKeys = 8 / kSets;
    const int64_t set_units = quads * kLanes * F::kDepth;
    const int64_t step_bytes = kKeys * size * static_cast<int64_t>(sizeof(T));
    for (int64_t j = 0; j < count; j += kKeys) {
      const Work* key[kKeys];
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) {
        // The last one again where there is none: its score is dropped.
        key[i] = keys + (j + i < count ? j + i : count - 1) * size;
      }
      Vec acc[kSets][kKeys];
#pragma GCC unroll 2
      for (int set = 0; set < kSets; ++set) {
#pragma GCC unroll 8
        for (int i = 0; i < kKeys; ++i) acc[set][i] = Vec{};
      }
      ahead.fetch(step_bytes);
      const Work* x = q + kv_head * q_stride() + first_set * set_units;
      for (int64_t c = 0; c < quads; ++c) {
        Vec query[kSets];
#pragma GCC unroll 2
        for (int set = 0; set < kSets; ++set) {
          query[set] = units(x + set * set_units + c * kLanes * F::kDepth);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kKeys; ++i) {
          const Vec four = quad(key[i] + c * 4 * F::kDepth);
#pragma GCC unroll 2
          for (int set = 0; set < kSets; ++set) {
            acc[set][i] = F::add(acc[set][i], four, query[set]);
          }
        }
      }
#pragma GCC unroll 2
      for (int set = 0; set < kSets; ++set) {
        float* to = scores + (first_set + set) * kSetScores + j * kQuads;
#pragma GCC unroll 2
        for (int i = 0; i < kKeys; i += 4) store(to + i * kQuads, quarter_sums(acc[set] + i));
      }
    }
  }

  // Scores of a set to weights, and to the factor of each row's result so far.
  SPLITPOINT_INLINE void weigh(int64_t kv_head, int64_t set, int64_t begin, int64_t count,
                               bool masked, Ahead& ahead) {
    float* own = scores + set * kSetScores;
    const int64_t groups = ceil_div(count, 4);
    Vec tops = splat(kMinusInfinity);
    const IntVec numbers = lane_numbers() & 3;
    for (int64_t g = 0; g < groups; ++g) {
      Vec value = load(own + g * kLanes) * a.scale;
      if (a.softcap > 0) value = capped(value, a.softcap);
      if (masked) {
        const int64_t first = begin + g * 4;
        const IntVec at = numbers + static_cast<int32_t>(first);
        const auto end = static_cast<int32_t>(begin + count);
        value = at <= last[set] && at < end ? value : splat(kMinusInfinity);
        if (a.window > 0) {
          const auto window = static_cast<int32_t>(a.window);
          value = last[set] - at < window ? value : splat(kMinusInfinity);
        }
      }
      store(own + g * kLanes, value);
      tops = value > tops ? value : tops;
    }
    FewState& kept = state[kv_head * sets + set];
    tops = quarter_tops(tops);
    const Vec top = tops > kept.top ? tops : kept.top;
    const Vec shift = top == kMinusInfinity ? Vec{} : top;
    const Vec factor = exp_below(kept.top - shift);
    Vec total = kept.total * factor;
    const int64_t two_bytes = 2 * size * static_cast<int64_t>(sizeof(T));
    for (int64_t g = 0; g < groups; ++g) {
      ahead.fetch(two_bytes);
      const Vec weight = exp_below(load(own + g * kLanes) - shift);
      store(weights + set * kSetScores + g * kLanes, weight);
      total += weight;
    }
    kept = {top, total};
#pragma GCC unroll 4
    for (int i = 0; i < kQuads; ++i) factors[set * kQuads + i] = factor[4 * i];
  }

  // Adds a chunk's weighted values to kVecs registers of columns, from c on, of kRows rows.
  template <int kRows, int kVecs>
  SPLITPOINT_INLINE void add_values(float* head_out, int64_t row, int64_t c, const T* v,
                                    int64_t count, Ahead& ahead) {
    const int64_t stride = padded;
    Vec acc[kRows][kVecs];
    const Work* own[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec factor = splat(factors[row + r]);
      own[r] = weights + (row + r) / kQuads * kSetScores + (row + r) % kQuads * 4;
#pragma GCC unroll 8
      for (int i = 0; i < kVecs; ++i) {
        acc[r][i] = load(head_out + (row + r) * padded + c + i * kLanes) * factor;
      }
    }
    v += c;
    const int64_t four_bytes = 4 * size * static_cast<int64_t>(sizeof(T));
    for (int64_t j = 0; j < count; j += 4) {
      ahead.fetch(four_bytes);
      const auto step = [&](int64_t key, [[maybe_unused]] bool whole) __attribute__((always_inline)) {
        Vec values[kVecs];
        if constexpr (F::kDepth == 2) {
#if defined(__AVX512BF16__)
#pragma GCC unroll 4
          for (int i = 0; i < kVecs; i += 2) {
            const T* at = v + (j + key) * stride + i * kLanes;
            const auto even = load_bits<__m512i>(at);
            const auto odd = whole ? load_bits<__m512i>(at + stride) : __m512i{};
            values[i] = (Vec)_mm512_unpacklo_epi16(even, odd);
            values[i + 1] = (Vec)_mm512_unpackhi_epi16(even, odd);
          }
#endif
        } else {
#pragma GCC unroll 8
          for (int i = 0; i < kVecs; ++i) values[i] = load(v + (j + key) * stride + i * kLanes);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Vec weight = F::unit(own[r] + j * kQuads + key);
#pragma GCC unroll 8
          for (int i = 0; i < kVecs; ++i) acc[r][i] = F::add(acc[r][i], values[i], weight);
        }
      };
      if (count - j >= 4) {
#pragma GCC unroll 4
        for (int key = 0; key < 4; key += F::kDepth) step(key, true);
      } else {
        for (int64_t key = 0; key < count - j; key += F::kDepth) {
          step(key, key + F::kDepth <= count - j);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < kVecs; ++i) {
        store(head_out + (row + r) * padded + c + i * kLanes, acc[r][i]);
      }
    }
  }

  // All columns of some rows, from c on, in stretches of kVecs registers and then of fewer.
  template <int kRows, int kVecs>
  SPLITPOINT_INLINE void add_columns(float* head_out, int64_t row, int64_t c, const T* v,
                                     int64_t count, Ahead& ahead) {
    for (; c + kVecs * kLanes <= padded; c += kVecs * kLanes) {
      add_values<kRows, kVecs>(head_out, row, c, v, count, ahead);
    }
    if constexpr (kVecs > 2) {
      if (c < padded) add_columns<kRows, kVecs / 2>(head_out, row, c, v, count, ahead);
    }
  }

  template <int kRows>
  SPLITPOINT_INLINE void add_rows(float* head_out, int64_t row, const T* v, int64_t count,
                                  Ahead& ahead) {
    add_columns<kRows, few_columns(kRows)>(head_out, row, 0, v, count, ahead);
  }

  // One head's chunk, while the one that is used next is fetched.
  SPLITPOINT_INLINE void chunk(int64_t kv_head, const Chunk<T>& c, const Chunk<T>& next) {
    Ahead next_keys(next.k, next.count * size), next_values(next.v, next.count * size);
    const Work* keys = as_work<F>(c.k, c.count * size, k_room);
    for (int64_t set = 0; set < sets; set += 2) {
      if (set + 1 < sets) {
        score<2>(kv_head, set, keys, c.count, next_keys);
      } else {
        score<1>(kv_head, set, keys, c.count, next_keys);
      }
    }
    const bool masked = c.count % 4 != 0 || c.begin + c.count > s.held + 1 ||
                        (a.window > 0 && c.begin + a.window < s.held + s.tokens);
    for (int64_t set = 0; set < sets; ++set) {
      weigh(kv_head, set, c.begin, c.count, masked, next_values);
    }
    const T* v = c.v;
    if (padded != size) {
      pad_rows(c.v, c.count, size, padded, v_room);
      v = v_room;
    }
    float* head_out = out + kv_head * s.rows * padded;
    for (int64_t row = 0; row < s.rows; row += 4) {
      switch (s.rows - row) {
        case 1: add_rows<1>(head_out, row, v, c.count, next_values); break;
        case 2: add_rows<2>(head_out, row, v, c.count, next_values); break;
        case 3: add_rows<3>(head_out, row, v, c.count, next_values); break;
        default: add_rows<4>(head_out, row, v, c.count, next_values); break;
      }
    }
  }
};

// One row's result, columns in order.
template <class F>
SPLITPOINT_INLINE void finish_row_of(const float* out, float factor, int64_t size,
                                     typename F::T* y) {
  using T = typename F::T;
  for (int64_t c = 0; c < size; c += 2 * kLanes) {
    Vec first = load(out + c) * factor, second = load(out + c + kLanes) * factor;
#if defined(__AVX512BF16__)
    if constexpr (F::kDepth == 2) {
      // Pairs of values were made within quarters of a register.
      const Vec low = first, high = second;
      first = __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22,
                                      23);
      second = __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28,
                                       29, 30, 31);
    }
#endif
    if (c + 2 * kLanes <= size) {
      store(y + c, first);
      store(y + c + kLanes, second);
    } else {
      T lanes[2 * kLanes];
      store(lanes, first);
      store(lanes + kLanes, second);
      __builtin_memcpy(y + c, lanes, (size - c) * sizeof(T));
    }
  }
}

SPLITPOINT_INLINE int64_t row_of_result(const CachedArgs& a, const CachedSequence& s,
                                        int64_t kv_head, int64_t row) {
  const int64_t heads = a.kv_heads * a.group, head = kv_head * a.group + row % a.group;
  return ((s.first + row / a.group) * heads + head) * a.size;
}

SPLITPOINT_INLINE float over(float total) { return total == 0.0f ? 0.0f : 1.0f / total; }

// Keys that are fetched while as many are at work: a page of them, so that memory is asked evenly.
template <class T>
SPLITPOINT_INLINE int64_t few_chunk(int64_t size) {
  const int64_t keys = 4096 / (size * static_cast<int64_t>(sizeof(T))) / kTokenStep * kTokenStep;
  return keys < kTokenStep ? kTokenStep : keys > kChunkKeys ? kChunkKeys : keys;
}

// One split of the keys, for all heads: those of a block lie together.
template <class F>
inline void attend_few_as(const CachedArgs& a, const CachedSequence& s, int64_t item, char* scratch) {
  using T = typename F::T;
  const int64_t seen = first_seen(a.window, s.held);
  int64_t begin = (s.first_split + item) * s.split_keys, end = begin + s.split_keys;
  if (begin < seen) begin = seen;
  if (end > s.held + s.tokens) end = s.held + s.tokens;
  Few<F> few(a, s, scratch);
  few.start();
  const int64_t most = few_chunk<T>(a.size);
  Chunk<T> chunk = chunk_at<T>(a, s, begin, end, most);
  while (chunk.count > 0) {
    const Chunk<T> next = chunk_at<T>(a, s, chunk.begin + chunk.count, end, most);
    for (int64_t h = 0; h < a.kv_heads; ++h) {
      few.chunk(h, of_head(a, chunk, h), h + 1 < a.kv_heads ? of_head(a, chunk, h + 1) : next);
    }
    chunk = next;
  }
  for (int64_t h = 0; h < a.kv_heads; ++h) {
    for (int64_t row = 0; row < s.rows; ++row) {
      const FewState& state = few.state[h * few.sets + row / kQuads];
      const int64_t unit = row % kQuads * 4, at = h * s.rows + row;
      const float total = quarter_totals(state.total)[unit];
      const float* out = few.out + at * few.padded;
      if (s.splits == 1) {
        T* y = static_cast<T*>(a.y) + row_of_result(a, s, h, row);
        finish_row_of<F>(out, over(total), a.size, y);
      } else {
        float* to = s.partials + (item * a.kv_heads * s.rows + at) * partial_stride(a.size);
        __builtin_memcpy(to, out, few.padded * sizeof(float));
        to[few.padded] = state.top[unit];
        to[few.padded + 1] = total;
      }
    }
  }
}

// The splits of a head to one result.
template <class F>
inline void merge_few_as(const CachedArgs& a, const CachedSequence& s, int64_t kv_head) {
  using T = typename F::T;
  const int64_t stride = partial_stride(a.size), padded = padded_size(a.size);
  for (int64_t row = 0; row < s.rows; ++row) {
    const auto partial = [&](int64_t split) __attribute__((always_inline)) {
      return s.partials + ((split * a.kv_heads + kv_head) * s.rows + row) * stride;
    };
    float top = kMinusInfinity, total = 0;
    for (int64_t i = 0; i < s.splits; ++i) {
      if (partial(i)[padded] > top) top = partial(i)[padded];
    }
    const float shift = top == kMinusInfinity ? 0.0f : top;
    alignas(64) float sums[kMostHeadSize] = {};
    for (int64_t i = 0; i < s.splits; ++i) {
      const float* from = partial(i);
      const float factor = exp_below(splat(from[padded] - shift))[0];
      total += from[padded + 1] * factor;
      for (int64_t c = 0; c < padded; c += kLanes) {
        store(sums + c, load(sums + c) + load(from + c) * factor);
      }
    }
    T* y = static_cast<T*>(a.y) + row_of_result(a, s, kv_head, row);
    finish_row_of<F>(sums, over(total), a.size, y);
  }
}

}  // namespace splitpoint::SPLITPOINT_ISA
