// Attention of many rows over a paged cache, as in prefilling: everything is turned around, so that
// a register holds the same for 4 to 16 rows. Then keys are multiplied as they lie, the softmax needs
// no sums across a register, and weights come out as the next product takes them.
#pragma once

#include "cached_few.h"

namespace splitpoint::SPLITPOINT_ISA {

// Registers of rows that are multiplied side by side, and keys, or columns of values.
inline constexpr int kStripVecs = 3;
inline constexpr int kTile = kLanes == 16 ? 8 : 4;
inline constexpr int64_t kStrip = kStripVecs * kLanes;
inline constexpr int64_t kTileKeys = 32;  // a row of a tile of weights
static_assert(kStrip <= kStripRows && kWideRows % kStrip == 0 && kChunkKeys % kTile == 0);

template <class F>
struct Wide {
  using T = typename F::T;
  using Work = typename F::Work;

  const CachedArgs& a;
  const CachedSequence& s;
  int64_t kv_head, first_row, rows, size, unit_count;
  Work* q;        // [strips][size / kDepth][kStrip units]
  float* out;     // [strips][size][kStrip]
  float* scores;  // [keys][kStrip]
  Work* weights;  // [keys / kDepth][kStrip units]
  Work* k_room;
  Work* v_room;
  float* tops;    // of each row, as the next two
  float* totals;
  int32_t* last;  // position

  SPLITPOINT_INLINE Wide(const CachedArgs& a, const CachedSequence& s, int64_t item, char* memory)
      : a(a), s(s), size(a.size), unit_count(a.size / F::kDepth) {
    // The last rows have the most to do and come first, so that threads end together.
    const int64_t blocks = ceil_div(s.rows, kWideRows);
    kv_head = item % a.kv_heads;
    first_row = (blocks - 1 - item / a.kv_heads) * kWideRows;
    rows = s.rows - first_row < kWideRows ? s.rows - first_row : kWideRows;
    Scratch scratch{memory};
    q = scratch.take<Work>(kWideRows * size);
    out = scratch.take<float>(kWideRows * size);
    scores = scratch.take<float>(kChunkKeys * kStrip);
    weights = F::kDepth == 2 ? scratch.take<Work>(kChunkKeys * kStrip)
                             : reinterpret_cast<Work*>(scores);
    k_room = scratch.take<Work>(kChunkKeys * size);
    v_room = scratch.take<Work>(kChunkKeys * size);
    tops = scratch.take<float>(kWideRows);
    totals = scratch.take<float>(kWideRows);
    last = scratch.take<int32_t>(kWideRows);
  }

  SPLITPOINT_INLINE int64_t position(int64_t row) const {
    return s.held + (first_row + (row < rows ? row : rows - 1)) / a.group;
  }
  SPLITPOINT_INLINE int64_t vecs_of(int64_t strip) const {
    const int64_t left = ceil_div(rows - strip * kStrip, kLanes);
    return left < kStripVecs ? left : kStripVecs;
  }

  // Queries turned around. Where there are no more rows the last one stands again.
  SPLITPOINT_INLINE void start() {
    const T* queries = static_cast<const T*>(a.q);
    const int64_t vecs = ceil_div(rows, kLanes);
    for (int64_t v = 0; v < vecs; ++v) {
      const Work* row[kLanes];
      alignas(64) Work wide[F::kWidens ? kLanes * kMostHeadSize : 1];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t r = v * kLanes + i;
        const int64_t at = first_row + (r < rows ? r : rows - 1);
        const int64_t head = kv_head * a.group + at % a.group, token = s.first + at / a.group;
        row[i] = as_work<F>(queries + head * a.q_head + token * a.q_row, size, wide + i * size);
        last[r] = static_cast<int32_t>(position(r));
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
    __builtin_memset(out, 0, ceil_div(rows, kStrip) * kStrip * size * sizeof(float));
  }

  // Keys that are scored and weighed: weights of those that are not there come out as zero.
  static SPLITPOINT_INLINE int64_t padded_keys(int64_t count) {
    return F::kTiles ? ceil_div(count, kTileKeys) * kTileKeys : count;
  }

  // Products of a strip's rows with kTile keys from j on.
  template <int kVecs>
  SPLITPOINT_INLINE void products(const Work* queries, const Work* keys, int64_t j, int64_t count,
                                  Vec (&acc)[kTile][kVecs]) {
    const Work* key[kTile];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) key[i] = keys + (j + i < count ? j + i : count - 1) * size;
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

  // Scores of a strip's rows with `count` keys; returns their largest.
  template <int kVecs>
  SPLITPOINT_INLINE void score(int64_t strip, const Work* keys, int64_t begin, int64_t count,
                               bool masked, Vec (&top)[kVecs]) {
    const Work* queries = q + strip * unit_count * kStrip * F::kDepth;
    const int32_t* positions = last + strip * kStrip;
    if constexpr (F::kTiles) F::template scores<kVecs>(queries, keys, count, size, scores);
    for (int64_t j = 0; j < padded_keys(count); j += kTile) {
      Vec acc[kTile][kVecs];
      if constexpr (F::kTiles) {
#pragma GCC unroll 8
        for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 3
          for (int v = 0; v < kVecs; ++v) acc[i][v] = load(scores + (j + i) * kStrip + v * kLanes);
        }
      } else {
        products<kVecs>(queries, keys, j, count, acc);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) {
          Vec value = acc[i][v] * a.scale;
          if (a.softcap > 0) value = capped(value, a.softcap);
          if (masked || j + i >= count) {
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
          top[v] = value > top[v] ? value : top[v];
        }
      }
    }
  }

  // Scores to weights, and to the factors of the result so far.
  template <int kVecs>
  SPLITPOINT_INLINE void weigh(int64_t strip, int64_t count, const Vec (&top)[kVecs],
                               Vec (&factor)[kVecs]) {
    Vec shift[kVecs], total[kVecs];
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = strip * kStrip + v * kLanes;
      shift[v] = top[v] == kMinusInfinity ? Vec{} : top[v];
      factor[v] = exp_below(load(tops + at) - shift[v]);
      total[v] = load(totals + at) * factor[v];
    }
    for (int64_t j = 0; j < padded_keys(count); j += F::kDepth) {
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) {
        const float* from = scores + j * kStrip + v * kLanes;
        const Vec weight = exp_below(load(from) - shift[v]);
        total[v] += weight;
        Work* to = weights + j * kStrip + v * kLanes * F::kDepth;
        if constexpr (F::kDepth == 1) {
          store(to, weight);
        } else {
#if defined(__AVX512BF16__)
          // A tile's rows past the last key have weights of zero.
          const Vec second = exp_below(load(from + kStrip) - shift[v]);
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
  SPLITPOINT_INLINE void add_values(int64_t strip, const Work* values, int64_t count,
                                    const Vec (&factor)[kVecs]) {
    float* sums = out + strip * kStrip * size;
    if constexpr (F::kTiles) {
      for (int64_t c = 0; c < size; ++c) {
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) {
          float* sum = sums + c * kStrip + v * kLanes;
          store(sum, load(sum) * factor[v]);
        }
      }
      F::template add_values<kVecs>(values, weights, padded_keys(count), size, sums);
      return;
    }
    const int64_t steps = ceil_div(count, F::kDepth);
    for (int64_t c = 0; c < size; c += kTile) {
      Vec acc[kTile][kVecs];
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) {
          acc[i][v] = load(sums + (c + i) * kStrip + v * kLanes) * factor[v];
        }
      }
      const Work* value = values + c * F::kDepth;
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
        value += size * F::kDepth;
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

  // Values as they are multiplied: pairs of keys side by side where pairs are; turned around, with
  // zeros for keys that are not there, for tiles.
  SPLITPOINT_INLINE const Work* values_of(const Chunk<T>& c) {
    if constexpr (F::kTiles) {
      F::turn_values(c.v, c.count, size, v_room);
      return v_room;
    } else if constexpr (F::kDepth == 1) {
      return as_work<F>(c.v, c.count * size, v_room);
    } else {
      for (int64_t j = 0; j < c.count; j += 2) {
        const T* even = c.v + j * size;
        const T* odd = j + 1 < c.count ? even + size : nullptr;
        Work* to = v_room + j * size;
        int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes) {
          const BitVec low = widened(load_bits<HalfVec>(even + i));
          const BitVec high = odd ? widened(load_bits<HalfVec>(odd + i)) << 16 : BitVec{};
          const BitVec pairs = low | high;
          __builtin_memcpy(to + 2 * i, &pairs, sizeof(pairs));
        }
        for (; i < size; ++i) {
          to[2 * i] = even[i];
          to[2 * i + 1] = odd ? odd[i] : T{};
        }
      }
      return v_room;
    }
  }

  template <int kVecs>
  void strip_of(int64_t strip, const Work* keys, const Work* values, int64_t begin, int64_t count) {
    const int64_t first = position(strip * kStrip);
    const int64_t final = position(strip * kStrip + kVecs * kLanes - 1);
    if (begin > final || (a.window > 0 && begin + count + a.window <= first + 1)) return;
    if (count > final + 1 - begin) count = final + 1 - begin;
    const bool masked = begin + count > first + 1 || (a.window > 0 && begin + a.window <= final);
    Vec top[kVecs], factor[kVecs];
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) top[v] = load(tops + strip * kStrip + v * kLanes);
    score<kVecs>(strip, keys, begin, count, masked, top);
    weigh<kVecs>(strip, count, top, factor);
    add_values<kVecs>(strip, values, count, factor);
  }

  SPLITPOINT_INLINE void chunk(const Chunk<T>& c) {
    const Work* keys = as_work<F>(c.k, c.count * size, k_room);
    const Work* values = values_of(c);
    for (int64_t strip = 0; strip * kStrip < rows; ++strip) {
      switch (vecs_of(strip)) {
        case 1: strip_of<1>(strip, keys, values, c.begin, c.count); break;
        case 2: strip_of<2>(strip, keys, values, c.begin, c.count); break;
        default: strip_of<3>(strip, keys, values, c.begin, c.count); break;
      }
    }
  }

  SPLITPOINT_INLINE void finish() {
    T* y = static_cast<T*>(a.y);
    const int64_t vecs = ceil_div(rows, kLanes);
    for (int64_t v = 0; v < vecs; ++v) {
      const float* sums = out + v / kStripVecs * kStrip * size + v % kStripVecs * kLanes;
      const Vec total = load(totals + v * kLanes);
      const Vec factor = total == 0.0f ? Vec{} : 1.0f / total;
      T* to[kLanes];
      int64_t count = rows - v * kLanes;
      if (count > kLanes) count = kLanes;
      for (int64_t i = 0; i < count; ++i) {
        to[i] = y + row_of_result(a, s, kv_head, first_row + v * kLanes + i);
      }
      for (int64_t c = 0; c < size; c += kLanes) {
        const int64_t columns = size - c < kLanes ? size - c : kLanes;
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
inline void attend_wide(const CachedArgs& a, const CachedSequence& s, int64_t item, char* scratch) {
  using T = typename F::T;
  Wide<F> wide(a, s, item, scratch);
  wide.start();
  const int64_t end = wide.position(wide.rows - 1) + 1;
  int64_t at = first_seen(a, wide.position(0));
  while (at < end) {
    const Chunk<T> chunk = chunk_at<T>(a, s, at, end, kChunkKeys);
    wide.chunk(of_head(a, chunk, wide.kv_head));
    at += chunk.count;
  }
  wide.finish();
}

}  // namespace splitpoint::SPLITPOINT_ISA
