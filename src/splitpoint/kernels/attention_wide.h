// Attention of many rows, as in prefilling: keys and values in blocks, with a softmax that goes from
// piece to piece (Milakov and Gimelshein, Online normalizer calculation for softmax; Dao et al.,
// FlashAttention). Everything is turned around, so that a register holds the same for 4 to 16 rows.
// Then keys are multiplied as they lie, the softmax needs no sums across a register, and weights come
// out as the next product takes them.
#pragma once

#include "attention_masks.h"

namespace splitpoint::SPLITPOINT_ISA {

// Keys, or columns of values, that are multiplied side by side.
inline constexpr int kTile = kLanes == 16 ? 8 : 4;
inline constexpr int64_t kTileKeys = 32;  // a row of a tile of weights

// Keys, or values, that lie `stride` elements apart.
template <class T>
struct WideRows {
  const T* data;
  int64_t stride;
};

template <class F>
struct Wide {
  using T = typename F::T;
  using Work = typename F::Work;
  static constexpr int64_t kChunk = F::kChunk;
  static_assert(kChunk <= kMostChunkKeys && kChunk % kTileKeys == 0);

  const WideArgs& a;
  int64_t kv_head, first_row, rows, size, value_size, unit_count;
  Work* q;        // [strips][size / kDepth][kStrip units]
  float* out;     // [strips][value_size][kStrip]
  float* scores;  // [keys][kStrip]
  Work* weights;  // [keys / kDepth][kStrip units]
  Work* k_room;
  Work* v_room;
  float* tops;    // of each row, as the next two
  float* totals;
  int32_t* last;  // position
  int64_t* mask_at;  // where its mask starts
  float* mask_room;  // [keys][kStrip]

  SPLITPOINT_INLINE Wide(const WideArgs& a, int64_t item, char* memory)
      : a(a), size(a.size), value_size(a.value_size), unit_count(a.size / F::kDepth) {
    // The last rows have the most to do and come first, so that threads end together.
    const int64_t all_rows = a.tokens * a.group, blocks = ceil_div(all_rows, kWideRows);
    kv_head = item % a.kv_heads;
    first_row = (blocks - 1 - item / a.kv_heads) * kWideRows;
    rows = all_rows - first_row < kWideRows ? all_rows - first_row : kWideRows;
    Scratch scratch{memory};
    q = scratch.take<Work>(kWideRows * size);
    out = scratch.take<float>(kWideRows * value_size);
    scores = scratch.take<float>(kChunk * kStrip);
    weights = F::kDepth == 2 ? scratch.take<Work>(kChunk * kStrip)
                             : reinterpret_cast<Work*>(scores);
    k_room = scratch.take<Work>(kChunk * size);
    v_room = scratch.take<Work>(kChunk * value_size);
    tops = scratch.take<float>(kWideRows);
    totals = scratch.take<float>(kWideRows);
    last = scratch.take<int32_t>(kWideRows);
    mask_at = scratch.take<int64_t>(kWideRows);
    mask_room = scratch.take<float>(kChunk * kStrip);
  }

  // Where there are no more rows the last one stands again.
  SPLITPOINT_INLINE int64_t row_at(int64_t row) const {
    return first_row + (row < rows ? row : rows - 1);
  }
  SPLITPOINT_INLINE int64_t head_of(int64_t row) const {
    return kv_head * a.group + row_at(row) % a.group;
  }
  SPLITPOINT_INLINE int64_t token_of(int64_t row) const { return row_at(row) / a.group; }
  SPLITPOINT_INLINE int64_t position(int64_t row) const {
    return a.causal ? a.held + token_of(row) : a.keys - 1;
  }
  SPLITPOINT_INLINE StripMask mask(int64_t strip) const {
    return {static_cast<const char*>(a.mask), a.mask_type, a.mask_key, mask_at + strip * kStrip};
  }
  SPLITPOINT_INLINE int64_t vecs_of(int64_t strip) const {
    const int64_t left = ceil_div(rows - strip * kStrip, kLanes);
    return left < kStripVecs ? left : kStripVecs;
  }

  // Queries turned around.
  SPLITPOINT_INLINE void start() {
    const T* queries = static_cast<const T*>(a.q);
    const int64_t vecs = ceil_div(rows, kLanes);
    for (int64_t v = 0; v < vecs; ++v) {
      const Work* row[kLanes];
      alignas(64) Work wide[F::kWidens ? kLanes * kMostHeadSize : 1];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t r = v * kLanes + i, head = head_of(r), token = token_of(r);
        row[i] = as_work<F>(queries + head * a.q_head + token * a.q_row, size, wide + i * size);
        last[r] = static_cast<int32_t>(position(r));
        mask_at[r] = head * a.mask_head + token * a.mask_row;
        tops[r] = kMinusInfinity;
        totals[r] = 0;
      }
      Work* to = q + (v / kStripVecs * unit_count * kStrip + v % kStripVecs * kLanes) * F::kDepth;
      int64_t u = 0;
      for (; u + kLanes <= unit_count; u += kLanes) {
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = units(row[i] + u * F::kDepth);
        turn(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          __builtin_memcpy(to + (u + i) * kStrip * F::kDepth, &square[i], sizeof(Vec));
        }
      }
      for (; u < unit_count; ++u) {
        for (int64_t i = 0; i < kLanes; ++i) {
          __builtin_memcpy(to + (u * kStrip + i) * F::kDepth, row[i] + u * F::kDepth, 4);
        }
      }
    }
    __builtin_memset(out, 0, ceil_div(rows, kStrip) * kStrip * value_size * sizeof(float));
  }

  // Keys that are scored and weighed: weights of those that are not there come out as zero.
  static SPLITPOINT_INLINE int64_t padded_keys(int64_t count) {
    return F::kTiles ? ceil_div(count, kTileKeys) * kTileKeys : count;
  }

  // Products of a strip's rows with kTile keys from j on.
  template <int kVecs>
  SPLITPOINT_INLINE void products(const Work* queries, const WideRows<Work>& keys, int64_t j,
                                  int64_t count, Vec (&acc)[kTile][kVecs]) {
    const Work* key[kTile];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
      key[i] = keys.data + (j + i < count ? j + i : count - 1) * keys.stride;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) acc[i][v] = Vec{};
    }
    for (int64_t u = 0; u < unit_count; ++u) {
      Vec x[kVecs];
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) {
        x[v] = units(queries + (u * kStrip + v * kLanes) * F::kDepth);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) {
        const Vec unit = F::unit(key[i] + u * F::kDepth);
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) acc[i][v] = F::add(acc[i][v], x[v], unit);
      }
    }
  }

  // Scores of a strip's rows with `count` keys, and their largest; whether they still lack the scale
  // is returned.
  template <int kVecs>
  SPLITPOINT_INLINE bool score(int64_t strip, const WideRows<Work>& keys, int64_t begin,
                                int64_t count, bool added, bool hides, Vec (&top)[kVecs]) {
    const Work* queries = q + strip * unit_count * kStrip * F::kDepth;
    const int64_t all = padded_keys(count);
    const bool plain = !added && !hides && a.softcap == 0 && a.scale > 0 && count % kTile == 0 &&
                       count == all;
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) top[v] = splat(kMinusInfinity);
    if constexpr (F::kTiles) F::template scores<kVecs>(queries, keys, 0, size, scores);
    for (int64_t j = 0; j < all; j += kTile) {
      Vec acc[kTile][kVecs];
      if constexpr (F::kTiles) {
        // One tile ahead, as it takes as long as what is done with the one before.
        const int64_t next = j + 16;
        if (j % 16 == 0 && next < count) {
          F::template scores<kVecs>(queries, keys, next, size, scores);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 3
          for (int v = 0; v < kVecs; ++v) acc[i][v] = load(scores + (j + i) * kStrip + v * kLanes);
        }
      } else {
        products<kVecs>(queries, keys, j, count, acc);
      }
      if (plain) {
#pragma GCC unroll 8
        for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 3
          for (int v = 0; v < kVecs; ++v) {
            if (!F::kTiles) store(scores + (j + i) * kStrip + v * kLanes, acc[i][v]);
            top[v] = larger(acc[i][v], top[v]);
          }
        }
      } else {
        finish_scores<kVecs>(strip, j, begin, count, added, hides, acc, top);
      }
    }
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) top[v] = plain ? top[v] * a.scale : top[v];
    return plain;
  }

  // Products of kTile keys from j on to scores.
  template <int kVecs>
  SPLITPOINT_INLINE void finish_scores(int64_t strip, int64_t j, int64_t begin, int64_t count,
                                       bool added, bool hides, const Vec (&acc)[kTile][kVecs],
                                       Vec (&top)[kVecs]) {
    const int32_t* positions = last + strip * kStrip;
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) {
        Vec value = acc[i][v] * a.scale;
        if (a.softcap > 0) value = capped(value, a.softcap);
        if (added) value += load(mask_room + (j + i) * kStrip + v * kLanes);
        if (hides || j + i >= count) {
          const IntVec own = load_bits<IntVec>(positions + v * kLanes);
          const auto at = static_cast<int32_t>(begin + j + i);
          const int32_t seen = j + i < count ? at : INT32_MAX;
          value = own >= seen ? value : splat(kMinusInfinity);
          if (a.window > 0) {
            const auto window = static_cast<int32_t>(a.window);
            value = own - at < window ? value : splat(kMinusInfinity);
          }
        }
        store(scores + (j + i) * kStrip + v * kLanes, value);
        top[v] = larger(value, top[v]);
      }
    }
  }

  // Scores to weights, and to the factors of the result so far.
  template <bool kScales, int kVecs>
  SPLITPOINT_INLINE void weigh(int64_t strip, int64_t count, const Vec (&chunk_top)[kVecs],
                               Vec (&factor)[kVecs]) {
    constexpr int kTerms = sizeof(T) == 2 ? 4 : 6;
    const float scale = a.scale * kLog2e;
    Vec top[kVecs], shift[kVecs], total[kVecs];
    const auto weight_of = [&](const float* from, int v) __attribute__((always_inline)) {
      // Scores of the lowest numbers there are, as masks have them, are no powers of two.
      return exp2_below<kTerms>(kScales ? load(from) * scale - shift[v]
                                        : (load(from) - shift[v]) * kLog2e);
    };
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = strip * kStrip + v * kLanes;
      const Vec before = load(tops + at);
      top[v] = larger(chunk_top[v], before);
      shift[v] = top[v] == kMinusInfinity ? Vec{} : top[v];
      factor[v] = exp2_below<kTerms>((before - shift[v]) * kLog2e);
      total[v] = load(totals + at) * factor[v];
      if (kScales) shift[v] *= kLog2e;
    }
    for (int64_t j = 0; j < padded_keys(count); j += F::kDepth) {
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) {
        const float* from = scores + j * kStrip + v * kLanes;
        const Vec weight = weight_of(from, v);
        total[v] += weight;
        Work* to = weights + j * kStrip + v * kLanes * F::kDepth;
        if constexpr (F::kDepth == 1) {
          store(to, weight);
        } else {
#if defined(__AVX512BF16__)
          // A tile's rows past the last key have weights of zero.
          const Vec second = weight_of(from + kStrip, v);
          total[v] += second;
          const BitVec low = widened((HalfVec)_mm512_cvtneps_pbh((__m512)weight));
          const BitVec high = widened((HalfVec)_mm512_cvtneps_pbh((__m512)second));
          const BitVec pairs = low | high << 16;
          __builtin_memcpy(to, &pairs, sizeof(pairs));
#endif
        }
      }
    }
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) {
      store(tops + strip * kStrip + v * kLanes, top[v]);
      store(totals + strip * kStrip + v * kLanes, total[v]);
    }
  }

  // Adds a chunk's weighted values to a strip's result.
  template <int kVecs>
  SPLITPOINT_INLINE void add_values(int64_t strip, const WideRows<Work>& values, int64_t count,
                                    const Vec (&factor)[kVecs]) {
    float* sums = out + strip * kStrip * value_size;
    if constexpr (F::kTiles) {
      IntVec changed{};
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) changed |= factor[v] != 1.0f;
      for (int64_t c = 0; c < value_size && any_bit(changed); ++c) {
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) {
          float* sum = sums + c * kStrip + v * kLanes;
          store(sum, load(sum) * factor[v]);
        }
      }
      F::template add_values<kVecs>(values.data, weights, padded_keys(count), value_size, sums);
      return;
    }
    const int64_t steps = ceil_div(count, F::kDepth);
    for (int64_t c = 0; c < value_size; c += kTile) {
      Vec acc[kTile][kVecs];
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) {
          acc[i][v] = load(sums + (c + i) * kStrip + v * kLanes) * factor[v];
        }
      }
      const Work* value = values.data + c * F::kDepth;
      const Work* weight = weights;
      for (int64_t j = 0; j < steps; ++j) {
        Vec x[kVecs];
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) x[v] = units(weight + v * kLanes * F::kDepth);
#pragma GCC unroll 8
        for (int i = 0; i < kTile; ++i) {
          const Vec unit = F::unit(value + i * F::kDepth);
#pragma GCC unroll 3
          for (int v = 0; v < kVecs; ++v) acc[i][v] = F::add(acc[i][v], x[v], unit);
        }
        value += values.stride;
        weight += kStrip * F::kDepth;
      }
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) {
          store(sums + (c + i) * kStrip + v * kLanes, acc[i][v]);
        }
      }
    }
  }

  // Rows as they are multiplied: where they lie, or in `room` if they are stored otherwise, lie far
  // apart, where lines of many of them would share a place in a cache, or end before a tile does.
  SPLITPOINT_INLINE WideRows<Work> as_multiplied(const WideRows<T>& from, int64_t count,
                                                 int64_t width, bool whole, Work* room) {
    if constexpr (F::kWidens) {
      for (int64_t j = 0; j < count; ++j) widen(from.data + j * from.stride, room + j * width, width);
    } else {
      if (from.stride == width && whole) return {from.data, width};
      for (int64_t j = 0; j < count; ++j) {
        __builtin_memcpy(room + j * width, from.data + j * from.stride, width * sizeof(T));
      }
    }
    return {room, width};
  }

  // Values as they are multiplied: pairs of keys side by side where pairs are; turned around, with
  // zeros for keys that are not there, for tiles. The stride is that of what is multiplied together.
  SPLITPOINT_INLINE WideRows<Work> values_of(const WideRows<T>& v, int64_t count) {
    if constexpr (F::kTiles) {
      F::turn_values(v, count, value_size, v_room);
      return {v_room, 0};
    } else if constexpr (F::kDepth == 1) {
      return as_multiplied(v, count, value_size, true, v_room);
    } else {
      for (int64_t j = 0; j < count; j += 2) {
        const T* even = v.data + j * v.stride;
        const T* odd = j + 1 < count ? even + v.stride : nullptr;
        Work* to = v_room + j * value_size;
        int64_t i = 0;
        for (; i + kLanes <= value_size; i += kLanes) {
          const BitVec low = widened(load_bits<HalfVec>(even + i));
          const BitVec high = odd ? widened(load_bits<HalfVec>(odd + i)) << 16 : BitVec{};
          const BitVec pairs = low | high;
          __builtin_memcpy(to + 2 * i, &pairs, sizeof(pairs));
        }
        for (; i < value_size; ++i) {
          to[2 * i] = even[i];
          to[2 * i + 1] = odd ? odd[i] : T{};
        }
      }
      return {v_room, 2 * value_size};
    }
  }

  template <int kVecs>
  void strip_of(int64_t strip, const WideRows<Work>& keys, const WideRows<Work>& values,
                int64_t begin, int64_t count) {
    const int64_t first = position(strip * kStrip);
    const int64_t final = position(strip * kStrip + kVecs * kLanes - 1);
    if (begin > final || (a.window > 0 && begin + count + a.window <= first + 1)) return;
    if (count > final + 1 - begin) count = final + 1 - begin;
    const bool hides = begin + count > first + 1 || (a.window > 0 && begin + a.window <= final);
    Shown seen = Shown::all;
    if (a.mask_type != Mask::none) seen = mask(strip).shown(kVecs, begin, count);
    if (seen == Shown::none) return;
    if (seen == Shown::some) mask(strip).template turn<kVecs>(begin, count, mask_room);
    Vec top[kVecs], factor[kVecs];
    if (score<kVecs>(strip, keys, begin, count, seen == Shown::some, hides, top)) {
      weigh<true, kVecs>(strip, count, top, factor);
    } else {
      weigh<false, kVecs>(strip, count, top, factor);
    }
    add_values<kVecs>(strip, values, count, factor);
  }

  // The rows of one block from a position on.
  SPLITPOINT_INLINE WideRows<T> rows_from(const WideKeys& of, int64_t block, int64_t inside) const {
    return {static_cast<const T*>(of.data) + block * of.block + kv_head * of.head + inside * of.row,
            of.row};
  }

  // Attends to the keys from `begin` on, to `end` or as many as lie together; returns how many.
  SPLITPOINT_INLINE int64_t chunk(int64_t begin, int64_t end) {
    const auto position = static_cast<uint32_t>(begin);
    const auto tokens = static_cast<uint32_t>(a.block_tokens);
    const int64_t block = a.blocks[position / tokens], inside = position % tokens;
    int64_t count = a.block_tokens - inside;
    if (count > end - begin) count = end - begin;
    if (count > kChunk) count = kChunk;
    const bool whole = !F::kTiles || inside + ceil_div(count, 16) * 16 <= a.block_tokens;
    const WideRows<Work> keys =
        as_multiplied(rows_from(a.k, block, inside), count, size, whole, k_room);
    const WideRows<Work> values = values_of(rows_from(a.v, block, inside), count);
    for (int64_t strip = 0; strip * kStrip < rows; ++strip) {
      switch (vecs_of(strip)) {
        case 1: strip_of<1>(strip, keys, values, begin, count); break;
        case 2: strip_of<2>(strip, keys, values, begin, count); break;
        default: strip_of<3>(strip, keys, values, begin, count); break;
      }
    }
    return count;
  }

  SPLITPOINT_INLINE void finish() {
    T* y = static_cast<T*>(a.y);
    const int64_t vecs = ceil_div(rows, kLanes);
    for (int64_t v = 0; v < vecs; ++v) {
      const float* sums = out + v / kStripVecs * kStrip * value_size + v % kStripVecs * kLanes;
      const Vec total = load(totals + v * kLanes);
      const Vec factor = total == 0.0f ? Vec{} : 1.0f / total;
      T* to[kLanes];
      int64_t count = rows - v * kLanes;
      if (count > kLanes) count = kLanes;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = v * kLanes + i;
        to[i] = y + head_of(row) * a.y_head + token_of(row) * a.y_row;
      }
      for (int64_t c = 0; c < value_size; c += kLanes) {
        const int64_t columns = value_size - c < kLanes ? value_size - c : kLanes;
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          square[i] = i < columns ? load(sums + (c + i) * kStrip) * factor : Vec{};
        }
        turn(square);
        for (int64_t i = 0; i < count; ++i) {
          if (columns == kLanes) {
            store(to[i] + c, square[i]);
          } else {
            T lanes[kLanes];
            store(lanes, square[i]);
            __builtin_memcpy(to[i] + c, lanes, columns * sizeof(T));
          }
        }
      }
    }
  }
};

// One block of rows of one head.
template <class F>
inline void attend_wide_as(const WideArgs& a, int64_t item, char* scratch) {
  Wide<F> wide(a, item, scratch);
  wide.start();
  int64_t end = wide.position(wide.rows - 1) + 1;
  if (end > a.keys) end = a.keys;
  int64_t at = first_seen(a.window, wide.position(0));
  while (at < end) at += wide.chunk(at, end);
  wide.finish();
}

#if defined(__AVX512BF16__)

inline void attend_wide(const WideArgs& a, int64_t item, char* scratch) {
  if (a.type == DType::f32) return kAvx512.attend_wide(a, item, scratch);
  attend_wide_as<Pairs>(a, item, scratch);
}

#else

inline void attend_wide(const WideArgs& a, int64_t item, char* scratch) {
  if (a.type == DType::f32) return attend_wide_as<Exact<float>>(a, item, scratch);
  attend_wide_as<Exact<Bf16>>(a, item, scratch);
}

#endif

}  // namespace splitpoint::SPLITPOINT_ISA
