// Sum over the ranks, residual add, RMSNorm and quantisation of whole rows. What it computes is
// defined in reference.py.
#pragma once

#include <algorithm>
#include <cstring>

#include "norm_quantise.h"

namespace splitpoint::SPLITPOINT_ISA {

// The longest rows, in bytes, of which two stay in the first-level cache with all that belongs to
// them.
inline constexpr int64_t kShortRow = 2048;

// How far ahead the other ranks' inputs are fetched, in bytes, and at least a row: what comes from
// another core takes as long as that takes to compute, and longer where the cores share no cache.
inline constexpr int64_t kFetchAhead = 4096;

// A short row is normalised while the next one is summed, so that there is something to compute
// while what other ranks wrote is on its way. Of longer rows that would drive out of the first-level
// cache what is read once more.
template <class T, class R, class W, bool kResidual, int kRanks>
inline void fused_rows(const FusedArgs& a, int64_t row0, int64_t row1) {
  static thread_local RowBuffer<R> buffers[2];
  static thread_local RowBuffer<float> values;
  const int64_t hidden = a.hidden;
  const int64_t ahead = std::max<int64_t>(1, kFetchAhead / (hidden * int64_t{sizeof(T)}));
  const bool together = a.norm && a.quant == Quant::none && hidden * int64_t{sizeof(R)} <= kShortRow;
  RowNorm<T, R, W> before;
  for (int64_t row = row0; row < row1; ++row) {
    R* sums = a.residual_out ? static_cast<R*>(a.residual_out) + row * hidden
                             : buffers[row & 1].of(hidden);
    RowSum<T, R, kResidual, kRanks> sum(a, row, sums);
    const RowFetch<T, kRanks> later(a, std::min(row + ahead, row1 - 1));
    if (together) {
      row == row0 ? over_row(hidden, sum, later) : over_row(hidden, sum, before, later);
      before = {a, row, sums, sum.squares()};
      continue;
    }
    over_row(hidden, sum);
    if (a.quant != Quant::none) {
      RowValues<T, R, W> norm(a, row, sums, sum.squares(), values.of(hidden));
      over_row(hidden, norm, later);
      norm.quantise(a, row);
    } else if (a.norm) {
      RowNorm<T, R, W> norm(a, row, sums, sum.squares());
      over_row(hidden, norm, later);
    }
  }
  if (together && row0 < row1) over_row(hidden, before);
}

template <class T, class R, class W, bool kResidual>
inline void fused_by_ranks(const FusedArgs& a, int64_t row0, int64_t row1) {
  // Two is common enough to be worth its own code; the others loop over the ranks.
  if (a.ranks == 2) return fused_rows<T, R, W, kResidual, 2>(a, row0, row1);
  return fused_rows<T, R, W, kResidual, 0>(a, row0, row1);
}

template <class T, class R, bool kResidual>
inline void fused_by_weight(const FusedArgs& a, int64_t row0, int64_t row1) {
  if (a.weight_type == a.input) return fused_by_ranks<T, R, T, kResidual>(a, row0, row1);
  return fused_by_ranks<T, R, float, kResidual>(a, row0, row1);
}

template <class T>
inline void fused_by_residual(const FusedArgs& a, int64_t row0, int64_t row1) {
  if (!a.residual) return fused_by_weight<T, T, false>(a, row0, row1);
  if (a.residual_type == a.input) return fused_by_weight<T, T, true>(a, row0, row1);
  return fused_by_weight<T, float, true>(a, row0, row1);
}

inline void run_fused(const FusedArgs& a, int64_t row0, int64_t row1) {
  switch (a.input) {
    case Element::f32: return fused_by_residual<float>(a, row0, row1);
    case Element::bf16: return fused_by_residual<Bf16>(a, row0, row1);
    case Element::f16: return fused_by_residual<Half>(a, row0, row1);
  }
}

template <int kRanks>
inline void move_bytes(const FusedArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kStep = sizeof(BitVec);
  const int count = kRanks ? kRanks : a.ranks;
  const char* sources[kMostRanks];
  std::copy_n(a.sources, count, sources);
  const auto* residual = static_cast<const char*>(a.residual);
  auto* norm = static_cast<char*>(a.norm);
  auto* kept = static_cast<char*>(a.residual_out);
  const auto step = [&](int64_t at, int64_t bytes) __attribute__((always_inline)) {
    const auto bits_of = [&](const char* from) __attribute__((always_inline)) {
      BitVec bits{};
      __builtin_memcpy(&bits, from + at, bytes);
      return bits;
    };
    BitVec all = bits_of(sources[0]);
    for (int rank = 1; rank < count; ++rank) all ^= bits_of(sources[rank]);
    if (residual) all ^= bits_of(residual);
    if (norm) __builtin_memcpy(norm + at, &all, bytes);
    if (kept) __builtin_memcpy(kept + at, &all, bytes);
  };
  for (; begin + kStep <= end; begin += kStep) {
    for (int rank = 0; rank < count; ++rank) {
      if (rank != a.rank) __builtin_prefetch(sources[rank] + begin + kFetchAhead, 0, 0);
    }
    step(begin, kStep);
  }
  if (begin < end) step(begin, end - begin);
}

inline void run_move(const FusedArgs& a, int64_t row0, int64_t row1) {
  const int64_t row_bytes = a.hidden * bytes_of(a.input);
  const auto run = a.ranks == 1 ? move_bytes<1> : a.ranks == 2 ? move_bytes<2> : move_bytes<0>;
  run(a, row0 * row_bytes, row1 * row_bytes);
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
