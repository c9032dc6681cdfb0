// The ways to multiply a few rows of x by the columns of a packed weight, register by register.
#pragma once

#include "linear_epilogue.h"

namespace splitpoint::SPLITPOINT_ISA {

// Where the rows of x lie, four to a pointer: the other three are reached by addressing modes,
// which keeps 14 rows within the general registers.
template <class X, int kRows>
struct Rows {
  const X* base[(kRows + 3) / 4];
  int64_t stride;

  SPLITPOINT_INLINE Rows(const X* x, int64_t stride) : stride(stride) {
#pragma GCC unroll 8
    for (int i = 0; i < (kRows + 3) / 4; ++i) base[i] = x + 4 * i * stride;
  }
  SPLITPOINT_INLINE const X* at(int row, int64_t k) const {
    return base[row / 4] + (row % 4) * stride + k;
  }
  SPLITPOINT_INLINE void advance(int64_t k) {
#pragma GCC unroll 8
    for (int i = 0; i < (kRows + 3) / 4; ++i) base[i] += k;
  }
};

// Sums in fp32, which are what is kept of them.
struct FloatSums {
  using Sum = Vec;

  template <class T>
  static SPLITPOINT_INLINE Vec start(const T&, int) {
    return Vec{};
  }
  template <class T, int kRows, int kVecs>
  static SPLITPOINT_INLINE void keep(const T&, const Vec (&acc)[kRows][kVecs], float* sums) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) store(sums + r * kBlock + v * kLanes, acc[r][v]);
    }
  }
};

// The three ways to multiply in fp32. Each takes kDepth values of k a step, from kDepth *
// kBlock stored weights; `last` is the step of an odd k, whose second half is padding that must
// meet no x (there is none, and 0 * NaN would not be 0).

struct F32 : FloatSums {
  using X = float;
  using Stored = float;
  static constexpr int kDepth = 1;

  template <int kRows, int kVecs>
  static SPLITPOINT_INLINE void step(Vec (&acc)[kRows][kVecs], const Rows<X, kRows>& x, int64_t k,
                                     const Stored* w) {
    Vec weight[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) weight[v] = load(w + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec value = splat(*x.at(r, k));
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] += weight[v] * value;
    }
  }
  template <int kRows, int kVecs>
  static SPLITPOINT_INLINE void last(Vec (&)[kRows][kVecs], const Rows<X, kRows>&, const Stored*) {}
  static SPLITPOINT_INLINE const Stored* columns(const Stored* w, int v) { return w + v * kLanes; }
};

struct Bf16Wide : FloatSums {
  using X = float;
  using Stored = Bf16;
  static constexpr int kDepth = 2;

  // A bf16 is the upper half of an fp32, so a pair of k's unpacks with one shift or mask.
  static SPLITPOINT_INLINE Vec half(const Stored* w, int odd) {
    const BitVec pair = load_bits<BitVec>(w);
    return (Vec)(odd ? pair & 0xffff0000u : pair << 16);
  }
  template <int kRows, int kVecs>
  static SPLITPOINT_INLINE void one(Vec (&acc)[kRows][kVecs], const Rows<X, kRows>& x, int64_t k,
                                    const Stored* w, int odd) {
    Vec weight[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) weight[v] = half(w + 2 * v * kLanes, odd);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec value = splat(*x.at(r, k + odd));
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] += weight[v] * value;
    }
  }
  template <int kRows, int kVecs>
  static SPLITPOINT_INLINE void step(Vec (&acc)[kRows][kVecs], const Rows<X, kRows>& x, int64_t k,
                                     const Stored* w) {
    one(acc, x, k, w, 0);
    one(acc, x, k, w, 1);
  }
  template <int kRows, int kVecs>
  static SPLITPOINT_INLINE void last(Vec (&acc)[kRows][kVecs], const Rows<X, kRows>& x,
                                     const Stored* w) {
    one(acc, x, 0, w, 0);
  }
  static SPLITPOINT_INLINE const Stored* columns(const Stored* w, int v) {
    return w + 2 * v * kLanes;
  }
};

struct Int8Wide : FloatSums {
  using X = float;
  using Stored = int8_t;
  static constexpr int kDepth = 2;

  template <int kRows, int kVecs>
  static SPLITPOINT_INLINE void one(Vec (&acc)[kRows][kVecs], const Rows<X, kRows>& x, int64_t k,
                                    const Stored* w) {
    Vec weight[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) weight[v] = load(w + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec value = splat(*x.at(r, k));
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] += weight[v] * value;
    }
  }
  template <int kRows, int kVecs>
  static SPLITPOINT_INLINE void step(Vec (&acc)[kRows][kVecs], const Rows<X, kRows>& x, int64_t k,
                                     const Stored* w) {
    one(acc, x, k, w);
    one(acc, x, k + 1, w + kBlock);
  }
  template <int kRows, int kVecs>
  static SPLITPOINT_INLINE void last(Vec (&acc)[kRows][kVecs], const Rows<X, kRows>& x,
                                     const Stored* w) {
    one(acc, x, 0, w);
  }
  static SPLITPOINT_INLINE const Stored* columns(const Stored* w, int v) { return w + v * kLanes; }
};

#if defined(__AVX512BF16__)

// Multiplies pairs of bf16 and adds both products to an fp32 lane. The instruction takes
// subnormal inputs and results as zero.
template <class Weights>
struct Dot : FloatSums {
  using X = Bf16;
  using Stored = typename Weights::Stored;
  static constexpr int kDepth = 2;

  template <int kRows, int kVecs, class Pair>
  static SPLITPOINT_INLINE void one(Vec (&acc)[kRows][kVecs], const Stored* w, Pair pair) {
    __m512bh weight[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      weight[v] = Weights::pairs(w, v);
      __asm__("" : "+v"(weight[v]));  // or GCC 12 reads it again for each of three rows
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair(r));
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        acc[r][v] = (Vec)_mm512_dpbf16_ps((__m512)acc[r][v], weight[v], value);
      }
    }
  }
  template <int kRows, int kVecs>
  static SPLITPOINT_INLINE void step(Vec (&acc)[kRows][kVecs], const Rows<X, kRows>& x, int64_t k,
                                     const Stored* w) {
    one(acc, w,
        [&](int r) __attribute__((always_inline)) { return load_bits<int32_t>(x.at(r, k)); });
  }
  template <int kRows, int kVecs>
  static SPLITPOINT_INLINE void last(Vec (&acc)[kRows][kVecs], const Rows<X, kRows>& x,
                                     const Stored* w) {
    one(acc, w, [&](int r) __attribute__((always_inline)) {
      return static_cast<int32_t>(x.at(r, 0)->bits);
    });
  }
  static SPLITPOINT_INLINE const Stored* columns(const Stored* w, int v) {
    return Weights::columns(w, v);
  }
};

struct Bf16Pairs {
  using Stored = Bf16;
  static SPLITPOINT_INLINE __m512bh pairs(const Stored* w, int v) {
    return (__m512bh)load_bits<__m512i>(w + 2 * v * kLanes);
  }
  static SPLITPOINT_INLINE const Stored* columns(const Stored* w, int v) {
    return w + 2 * v * kLanes;
  }
};

// Every int8 is exact in bf16, so the upper half of its fp32 is all there is to it.
struct Int8Pairs {
  using Stored = int8_t;
  static SPLITPOINT_INLINE __m512bh pairs(const Stored* w, int v) {
    const BitVec even = (BitVec)load(w + v * kLanes);
    const BitVec odd = (BitVec)load(w + kBlock + v * kLanes);
    return (__m512bh)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)(even >> 16), (__m512i)odd);
  }
  static SPLITPOINT_INLINE const Stored* columns(const Stored* w, int v) { return w + v * kLanes; }
};

#endif  // __AVX512BF16__

}  // namespace splitpoint::SPLITPOINT_ISA
