// Dot products of the rows of a plain [weight rows, k] weight with few rows of x: nothing is
// packed, and at one row of x each weight is read once anyway.
#pragma once

#include "linear_epilogue.h"

namespace splitpoint::SPLITPOINT_ISA {

// How a register of weights meets a register of x. `part` reads the first `count` values of a
// register and takes the rest as zero.

template <class Weight>
struct WideRow {
  using X = float;
  using Stored = Weight;
  using Register = Vec;
  static constexpr int kStep = kLanes;

  template <class T>
  static SPLITPOINT_INLINE Vec all(const T* from) {
    return load(from);
  }
  template <class T>
  static SPLITPOINT_INLINE Vec part(const T* from, int64_t count) {
    return load(Padded<T>(from, count).lanes);
  }
  static SPLITPOINT_INLINE Vec add(Vec acc, Vec w, Vec x) { return acc + w * x; }
};

#if defined(__AVX512BF16__)
struct DotRow {
  using X = Bf16;
  using Stored = Bf16;
  using Register = __m512bh;
  static constexpr int kStep = 2 * kLanes;

  static SPLITPOINT_INLINE Register all(const Bf16* from) {
    return (Register)load_bits<__m512i>(from);
  }
  static SPLITPOINT_INLINE Register part(const Bf16* from, int64_t count) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    return (Register)_mm512_maskz_loadu_epi16(mask, from);
  }
  static SPLITPOINT_INLINE Vec add(Vec acc, Register w, Register x) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, w, x);
  }
};
#endif

// Rows of the weight that are read side by side. One by one, memory is read in order, which is
// fastest while it is what takes the time; more rows share what is read of x. The adder's
// pipeline is filled by summing stretches of k apart.
constexpr int rows_for(int tokens) { return tokens <= 2 ? 1 : 4; }

constexpr int stretches_for(int tokens, int rows) {
  const int sets = kAccumulators / (tokens * rows);
  return sets >= 4 ? 4 : sets >= 2 ? 2 : 1;
}

// sums[kTokens][kBlock], columns [0, kRows) = x[kTokens, k] @ w[kRows, k]^T.
template <class R, int kTokens, int kRows>
inline void dots(const typename R::X* x, int64_t stride, const typename R::Stored* w, int64_t k,
                 float* sums) {
  constexpr int kStretches = stretches_for(kTokens, kRows);
  Vec acc[kStretches][kTokens][kRows];
#pragma GCC unroll 4
  for (int s = 0; s < kStretches; ++s) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[s][t][r] = Vec{};
    }
  }
  const auto step = [&](auto read, Vec(&to)[kTokens][kRows], int64_t i)
      __attribute__((always_inline)) {
    typename R::Register weight[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + r * k + i) + kAheadBytes, 0, 3);
      weight[r] = read(w + r * k + i);
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const typename R::Register value = read(x + t * stride + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) to[t][r] = R::add(to[t][r], weight[r], value);
    }
  };
  const auto whole = [](const auto* from) __attribute__((always_inline)) { return R::all(from); };
  int64_t i = 0;
  for (; i + kStretches * R::kStep <= k; i += kStretches * R::kStep) {
#pragma GCC unroll 4
    for (int s = 0; s < kStretches; ++s) step(whole, acc[s], i + s * R::kStep);
  }
  if (kStretches > 1) {
    for (; i + R::kStep <= k; i += R::kStep) step(whole, acc[0], i);
  }
  if (i < k) {
    step([&](const auto* from) __attribute__((always_inline)) { return R::part(from, k - i); },
         acc[0], i);
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      Vec total = acc[0][t][r];
#pragma GCC unroll 4
      for (int s = 1; s < kStretches; ++s) total += acc[s][t][r];
      sums[t * kBlock + r] = sum(total);
    }
  }
}

// `rows` (at most kBlock) rows of the weight against kTokens rows of x.
template <class R, int kTokens>
inline void dot_rows(const typename R::X* x, int64_t stride, const typename R::Stored* w,
                     int64_t rows, int64_t k, float* sums) {
  constexpr int kRows = kAccumulators / kTokens < rows_for(kTokens) ? 2 : rows_for(kTokens);
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) dots<R, kTokens, kRows>(x, stride, w + r * k, k, sums + r);
  for (; r < rows; ++r) dots<R, kTokens, 1>(x, stride, w + r * k, k, sums + r);
}

template <class R, class Y>
inline void gemv_part(const LinearArgs& a, const Part& part) {
  const auto* x = static_cast<const typename R::X*>(a.x);
  float sums[2][4 * kBlock] = {};
  for (int64_t block = part.block0; block < part.block1; ++block) {
    const int64_t c = block * kBlock;
    const int64_t count = a.n - c < kBlock ? a.n - c : kBlock;
    for (int64_t t = part.t0; t < part.t1; t += 4) {
      const int64_t tokens = part.t1 - t < 4 ? part.t1 - t : 4;
      for (int half = 0; half < (a.gated ? 2 : 1); ++half) {
        const auto* rows = x + t * a.x_stride;
        const void* values = half ? a.second.values : a.first.values;
        const auto* w = static_cast<const typename R::Stored*>(values) + c * a.k;
        switch (tokens) {
          case 1: dot_rows<R, 1>(rows, a.x_stride, w, count, a.k, sums[half]); break;
          case 2: dot_rows<R, 2>(rows, a.x_stride, w, count, a.k, sums[half]); break;
          case 3: dot_rows<R, 3>(rows, a.x_stride, w, count, a.k, sums[half]); break;
          default: dot_rows<R, 4>(rows, a.x_stride, w, count, a.k, sums[half]); break;
        }
      }
      for (int64_t r = 0; r < tokens; ++r) {
        finish_row<Y>(a, sums[0] + r * kBlock, sums[1] + r * kBlock, t + r, c, count);
      }
    }
  }
}

}  // namespace splitpoint::SPLITPOINT_ISA
