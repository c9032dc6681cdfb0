// Sum over the ranks, residual add, RMSNorm and quantisation of whole rows. What it computes is
// defined in reference.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "norm_pairs.h"

namespace splitpoint::SPLITPOINT_ISA {

// One row in fp32, kept between the passes over it. Aligned: every other load of a register as
// wide as a cache line would touch two of them otherwise.
class RowBuffer {
 public:
  float* of(int64_t count) {
    if (count > count_) {
      lines_.reset(new Line[(count + 2 * kLanes) / kLineFloats + 1]);
      count_ = count;
    }
    return lines_[0].values;
  }

 private:
  static constexpr int64_t kLineFloats = 16;
  struct alignas(64) Line {
    float values[kLineFloats];
  };
  std::unique_ptr<Line[]> lines_;
  int64_t count_ = 0;
};

template <class T, int kRanks>
SPLITPOINT_INLINE Pair sum_pair(const T* const* sources, int ranks, int64_t i) {
  Pair sum = load_pair<T>(sources[0] + i);
  const int count = kRanks ? kRanks : ranks;
  for (int rank = 1; rank < count; ++rank) sum = sum + load_pair<T>(sources[rank] + i);
  return sum;
}

template <class T>
SPLITPOINT_INLINE Vec sum_some(const T* const* sources, int ranks, int64_t i, int64_t count) {
  Vec sum = load_some(sources[0] + i, count);
  for (int rank = 1; rank < ranks; ++rank) sum += load_some(sources[rank] + i, count);
  return sum;
}

// Sums a row into `total`, pairs in T's order, and returns the sum of its squares. R is the
// residual's type; its sum has that type too, with and without a residual.
template <class T, class R, bool kResidual, bool kKept, int kRanks>
inline float sum_row(const FusedArgs& a, int64_t row, float* total) {
  const int64_t hidden = a.hidden, start = row * hidden;
  const T* sources[kMostRanks];
  for (int rank = 0; rank < a.ranks; ++rank) {
    sources[rank] = reinterpret_cast<const T*>(a.sources[rank]) + start;
  }
  const R* residual = kResidual ? static_cast<const R*>(a.residual) + start : nullptr;
  R* kept = kKept ? static_cast<R*>(a.residual_out) + start : nullptr;
  Pair squares[2] = {};
  const auto pair_at = [&](int64_t at, Pair& squares) {
    Pair sum = sum_pair<T, kRanks>(sources, a.ranks, at);
    if constexpr (kResidual) sum = sum + load_pair<T>(residual + at);
    if constexpr (kKept) store_pair<T>(kept + at, sum);
    store(total + at, sum.first);
    store(total + at + kLanes, sum.second);
    squares = squares + sum * sum;
  };
  int64_t i = 0;
  for (; i + 2 * kPair <= hidden; i += 2 * kPair) {
    pair_at(i, squares[0]);
    pair_at(i + kPair, squares[1]);
  }
  if (i + kPair <= hidden) {
    pair_at(i, squares[0]);
    i += kPair;
  }
  for (; i < hidden; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, hidden - i);
    Vec sum = sum_some(sources, a.ranks, i, count);
    if constexpr (kResidual) sum += load_some(residual + i, count);
    if constexpr (kKept) store_some(kept + i, sum, count);
    store(total + i, sum);
    squares[0].first += sum * sum;
  }
  const Pair all = squares[0] + squares[1];
  return sum(all.first + all.second);
}

inline void quantise_fp8(const float* norm, int64_t hidden, float scale, uint8_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= hidden; i += kLanes) {
    store_codes(to + i, fp8_codes(load(norm + i) * scale));
  }
  if (i < hidden) {
    uint8_t codes[kLanes];
    store_codes(codes, fp8_codes(load_some(norm + i, hidden - i) * scale));
    std::memcpy(to + i, codes, hidden - i);
  }
}

inline void quantise_fp4(const float* norm, int64_t hidden, float global, uint8_t* to,
                         uint8_t* scales) {
  constexpr int64_t kParts = kFp4Block / kLanes;
  const int64_t blocks = hidden / kFp4Block;
  // As many blocks at once as a register holds scales.
  for (int64_t first = 0; first < blocks; first += kLanes) {
    const int64_t count = blocks - first < kLanes ? blocks - first : kLanes;
    float largest[kLanes] = {}, inverse[kLanes];
    for (int64_t block = 0; block < count; ++block) {
      const float* from = norm + (first + block) * kFp4Block;
      IntVec most = (IntVec)load(from) & 0x7fffffff;
      for (int64_t part = 1; part < kParts; ++part) {
        most = larger(most, (IntVec)load(from + part * kLanes) & 0x7fffffff);
      }
      largest[block] = as_float(largest_lane<kLanes>(most));
    }
    const BitVec codes = fp8_codes(load(largest) * (1.0f / 6.0f) * global);
    const Vec stored = fp8_values(codes);
    store(inverse, stored == 0.0f ? Vec{} : global / stored);
    uint8_t bytes[kLanes];
    store_codes(bytes, codes);
    std::memcpy(scales + first, bytes, count);
    for (int64_t block = 0; block < count; ++block) {
      for (int64_t part = 0; part < kParts; ++part) {
        const int64_t at = (first + block) * kFp4Block + part * kLanes;
        const Vec value = load(norm + at);
        store_pairs(to + at / 2, fp4_codes(value * inverse[block], value));
      }
    }
  }
}

// Normalises and quantises a row of sums, which is overwritten. W is the weight's type.
template <class T, class W>
inline void finish_row(const FusedArgs& a, int64_t row, float* total, float squares) {
  const int64_t hidden = a.hidden;
  const Vec scale = splat(1.0f / std::sqrt(squares / static_cast<float>(hidden) + a.eps));
  T* norm = a.norm ? static_cast<T*>(a.norm) + row * hidden : nullptr;
  const W* weight = static_cast<const W*>(a.weight);
  const auto norm_pair = [&](int64_t i) {
    return Pair{load(total + i), load(total + i + kLanes)} * scale * load_pair<T>(weight + i);
  };
  const auto norm_some = [&](int64_t i, int64_t count) {
    return load(total + i) * scale * load_some(weight + i, count);
  };
  int64_t i = 0;
  if (a.quant == Quant::none) {
#pragma GCC unroll 4
    for (; i + kPair <= hidden; i += kPair) store_pair<T>(norm + i, norm_pair(i));
    for (; i < hidden; i += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, hidden - i);
      store_some(norm + i, norm_some(i, count), count);
    }
    return;
  }
  // What is quantised is the norm as it is returned, rounded to its type; it lies in order.
  IntVec most{};
  for (; i + kPair <= hidden; i += kPair) {
    T rounded[kPair];
    store_pair<T>(rounded, norm_pair(i));
    if (norm) std::memcpy(norm + i, rounded, sizeof(rounded));
    const Pair value = load_pair<T>(rounded);
    store_pair<T>(total + i, value);
    most = larger(most, (IntVec)value.first & 0x7fffffff);
    most = larger(most, (IntVec)value.second & 0x7fffffff);
  }
  for (; i < hidden; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, hidden - i);
    T rounded[kLanes];
    store(rounded, norm_some(i, count));
    if (norm) std::memcpy(norm + i, rounded, count * sizeof(T));
    const Vec value = load_some(rounded, count);
    store(total + i, value);
    most = larger(most, (IntVec)value & 0x7fffffff);
  }
  uint8_t* quantised = a.quantised + row * (a.quant == Quant::nvfp4 ? hidden / 2 : hidden);
  switch (a.quant) {
    case Quant::none: break;
    case Quant::fp8_static:
      quantise_fp8(total, hidden, 1.0f / a.quant_scale, quantised);
      break;
    case Quant::fp8_token: {
      const float largest = as_float(largest_lane<kLanes>(most)) / kFp8Largest;
      static_cast<float*>(a.scales)[row] = largest;
      quantise_fp8(total, hidden, largest == 0.0f ? 0.0f : 1.0f / largest, quantised);
      break;
    }
    case Quant::nvfp4:
      quantise_fp4(total, hidden, a.quant_scale, quantised,
                   static_cast<uint8_t*>(a.scales) + row * (hidden / kFp4Block));
      break;
  }
}

// The longest rows of which two leave room for more in the first-level cache.
inline constexpr int64_t kLongestBehind = 2048;

// A row is finished after the next one is summed: what comes between, the sum of a register's lanes
// and a root, takes longer than a processor can look ahead. For long rows that is nothing beside
// the rest, and a second row of sums would only take cache.
template <class T, class R, bool kResidual, int kRanks>
inline void fused_rows(const FusedArgs& a, int64_t row0, int64_t row1) {
  static thread_local RowBuffer buffers[2];
  const int64_t behind = a.hidden <= kLongestBehind ? 1 : 0;
  float* totals[2] = {buffers[0].of(a.hidden), behind ? buffers[1].of(a.hidden) : nullptr};
  float squares[2];
  for (int64_t row = row0; row < row1 + behind; ++row) {
    if (row < row1) {
      float* total = totals[row & behind];
      squares[row & behind] = a.residual_out
                                  ? sum_row<T, R, kResidual, true, kRanks>(a, row, total)
                                  : sum_row<T, R, kResidual, false, kRanks>(a, row, total);
    }
    const int64_t ready = row - behind;
    if (ready < row0 || (!a.norm && !a.quantised)) continue;
    float* total = totals[ready & behind];
    a.weight_type == Element::f32 ? finish_row<T, float>(a, ready, total, squares[ready & behind])
                                  : finish_row<T, T>(a, ready, total, squares[ready & behind]);
  }
}

template <class T, class R, bool kResidual>
inline void fused_by_ranks(const FusedArgs& a, int64_t row0, int64_t row1) {
  // Two is common enough to be worth its own code; the others loop over the ranks.
  if (a.ranks == 2) return fused_rows<T, R, kResidual, 2>(a, row0, row1);
  return fused_rows<T, R, kResidual, 0>(a, row0, row1);
}

template <class T>
inline void fused_by_residual(const FusedArgs& a, int64_t row0, int64_t row1) {
  if (!a.residual) return fused_by_ranks<T, T, false>(a, row0, row1);
  if (a.residual_type == a.input) return fused_by_ranks<T, T, true>(a, row0, row1);
  return fused_by_ranks<T, float, true>(a, row0, row1);
}

inline void run_fused(const FusedArgs& a, int64_t row0, int64_t row1) {
  switch (a.input) {
    case Element::f32: return fused_by_residual<float>(a, row0, row1);
    case Element::bf16: return fused_by_residual<Bf16>(a, row0, row1);
    case Element::f16: return fused_by_residual<Half>(a, row0, row1);
  }
}

template <class T, int kRanks>
inline void sum_elements(const SumArgs& a, int64_t begin, int64_t end) {
  const T* sources[kMostRanks];
  for (int rank = 0; rank < a.ranks; ++rank) {
    sources[rank] = reinterpret_cast<const T*>(a.sources[rank]);
  }
  T* out = static_cast<T*>(a.out);
  int64_t i = begin;
#pragma GCC unroll 2
  for (; i + kPair <= end; i += kPair) {
    store_pair<T>(out + i, sum_pair<T, kRanks>(sources, a.ranks, i));
  }
  for (; i < end; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, end - i);
    store_some(out + i, sum_some(sources, a.ranks, i, count), count);
  }
}

inline void run_sum(const SumArgs& a, int64_t begin, int64_t end) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    a.ranks == 2 ? sum_elements<T, 2>(a, begin, end) : sum_elements<T, 0>(a, begin, end);
  };
  switch (a.element) {
    case Element::f32: return run(float{});
    case Element::bf16: return run(Bf16{});
    case Element::f16: return run(Half{});
  }
}

inline void run_add_bias(const void* from, Element element, float bias, float* to,
                         int64_t count) {
  const auto run = [&](auto type) {
    const auto* typed = static_cast<const decltype(type)*>(from);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(typed + i) + bias);
    if (i < count) store_some(to + i, load_some(typed + i, count - i) + bias, count - i);
  };
  switch (element) {
    case Element::f32: return run(float{});
    case Element::bf16: return run(Bf16{});
    case Element::f16: return run(Half{});
  }
}

// Stores that skip the caches need whole aligned lines: what lies before and after them is copied
// as usual.
inline void copy_past_caches(char* to, const char* from, int64_t bytes) {
  constexpr int64_t kLine = 64;
#if defined(__SSE2__) && !defined(__SANITIZE_THREAD__)
  int64_t done = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
  if (done > bytes) done = bytes;
  std::memcpy(to, from, done);
  for (; done + kLine <= bytes; done += kLine) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)(to + done), _mm512_loadu_si512(from + done));
#elif defined(__AVX2__)
    for (int64_t at = done; at < done + kLine; at += 32) {
      _mm256_stream_si256((__m256i*)(to + at), _mm256_loadu_si256((const __m256i*)(from + at)));
    }
#else
    for (int64_t at = done; at < done + kLine; at += 16) {
      _mm_stream_si128((__m128i*)(to + at), _mm_loadu_si128((const __m128i*)(from + at)));
    }
#endif
  }
  std::memcpy(to + done, from + done, bytes - done);
#else
  (void)kLine;
  std::memcpy(to, from, bytes);
#endif
}

}  // namespace splitpoint::SPLITPOINT_ISA
