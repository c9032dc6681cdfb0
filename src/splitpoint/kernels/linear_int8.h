// Int8 on both sides: rows of x rounded to int8 with a scale each, and their products with int8
// weights, summed in int32.
//
// Sums are exact: no instruction here saturates, and int32 holds k products of 128 * 127 for every
// k up to kMostInt8Depth. What happens beyond int32 on the way (x_starts) wraps round, and back.
#pragma once

#include "linear_multipliers.h"

namespace splitpoint::SPLITPOINT_ISA {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
inline constexpr bool kInt8Dots = true;
#else
inline constexpr bool kInt8Dots = false;
#endif

// Sums in int32. Those of a whole row are kept as fp32, times the row's scale; those of a slice of k
// as they are, bit by bit.
struct IntSums {
  using Sum = IntVec;

  template <class T>
  static SPLITPOINT_INLINE IntVec start(const T& t, int row) {
    return t.x_starts ? t.x_starts[row] - IntVec{} : IntVec{};
  }
  template <class T, int kRows, int kVecs>
  static SPLITPOINT_INLINE void keep(const T& t, const IntVec (&acc)[kRows][kVecs], float* sums) {
    const float* scales = t.x_scales;
    const auto each = [&](auto store_one) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) store_one(sums + r * kBlock + v * kLanes, acc[r][v], r);
      }
    };
    if (scales) {
      each([&](float* to, IntVec sum, int r) __attribute__((always_inline)) {
        store(to, __builtin_convertvector(sum, Vec) * scales[r]);
      });
    } else {
      each([](float* to, IntVec sum, int) __attribute__((always_inline)) {
        __builtin_memcpy(to, &sum, sizeof(sum));
      });
    }
  }
};

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// Four products a lane at a time. The instruction takes one side unsigned: weights with 128 added,
// which flips a bit, so that each sum has 128 times the row's sum of x too much. It starts at minus
// that.
struct Quads : IntSums {
  using X = int8_t;
  using Stored = int8_t;
  static constexpr int kDepth = 4;

  static SPLITPOINT_INLINE IntVec dot(IntVec sum, IntVec weight, IntVec x) {
#if defined(__AVX512VNNI__)
    return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weight, (__m512i)x);
#else
    return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weight, (__m256i)x);
#endif
  }
  template <int kRows, int kVecs>
  static SPLITPOINT_INLINE void step(IntVec (&acc)[kRows][kVecs], const Rows<X, kRows>& x,
                                     int64_t k, const Stored* w) {
    IntVec weight[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      weight[v] = load_bits<IntVec>(w + 4 * v * kLanes) ^ static_cast<int32_t>(0x80808080);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const IntVec value = load_bits<int32_t>(x.at(r, k)) - IntVec{};
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] = dot(acc[r][v], weight[v], value);
    }
  }
  template <int kRows, int kVecs>
  static SPLITPOINT_INLINE void last(IntVec (&)[kRows][kVecs], const Rows<X, kRows>&,
                                     const Stored*) {}  // k is padded
  static SPLITPOINT_INLINE const Stored* columns(const Stored* w, int v) {
    return w + 4 * v * kLanes;
  }
};

#else

// Two products a lane at a time, of int16. Of a column's four k's the even ones are widened where
// they lie, and then the odd ones: x has them in that order, 0, 2, 1, 3.
struct Quads : IntSums {
  using X = int16_t;
  using Stored = int8_t;
  static constexpr int kDepth = 4;

  // a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1] for the int16s of each lane i.
  static SPLITPOINT_INLINE IntVec pairs(IntVec a, IntVec b) {
#if defined(__AVX512BW__)
    return (IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (IntVec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
  }
  static SPLITPOINT_INLINE IntVec widened(const Stored* w, int odd) {
    const ShortVec both = load_bits<ShortVec>(w);
    return (IntVec)((odd ? both : both << 8) >> 8);
  }
  template <int kRows, int kVecs>
  static SPLITPOINT_INLINE void half(IntVec (&acc)[kRows][kVecs], const Rows<X, kRows>& x,
                                     int64_t k, const Stored* w, int odd) {
    IntVec weight[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) weight[v] = widened(w + 4 * v * kLanes, odd);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const IntVec value = load_bits<int32_t>(x.at(r, k + 2 * odd)) - IntVec{};
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        acc[r][v] += pairs(weight[v], value);
#if defined(__SSE2__)
        __asm__("" : "+x"(acc[r][v]));  // or GCC 12 has more products at once than registers
#endif
      }
    }
  }
  template <int kRows, int kVecs>
  static SPLITPOINT_INLINE void step(IntVec (&acc)[kRows][kVecs], const Rows<X, kRows>& x,
                                     int64_t k, const Stored* w) {
    half(acc, x, k, w, 0);
    half(acc, x, k, w, 1);
  }
  template <int kRows, int kVecs>
  static SPLITPOINT_INLINE void last(IntVec (&)[kRows][kVecs], const Rows<X, kRows>&,
                                     const Stored*) {}  // k is padded
  static SPLITPOINT_INLINE const Stored* columns(const Stored* w, int v) {
    return w + 4 * v * kLanes;
  }
};

#endif

// The largest magnitude of a row as the bits of an fp32, which have its order: those of infinities
// and NaNs are above all others.
template <class X>
inline int32_t largest_bits(const X* x, int64_t k) {
  IntVec largest{};
  const auto take = [&](Vec value) {
    const IntVec bits = (IntVec)value & 0x7fffffff;
    largest = largest > bits ? largest : bits;
  };
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) take(load(x + i));
  if (i < k) take(load(Padded<X>(x + i, k - i).lanes));
  int32_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found = found > largest[lane] ? found : largest[lane];
  return found;
}

// To nearest, ties to even. The product before it must be rounded first, as the reference has it, so
// nothing may make one addition of both.
SPLITPOINT_INLINE IntVec rounded(Vec value) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_cvtps_epi32((__m512)value);
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtps_epi32((__m256)value);
#elif defined(__SSE2__)
  return (IntVec)_mm_cvtps_epi32((__m128)value);
#else
  IntVec whole;
  for (int i = 0; i < kLanes; ++i) whole[i] = static_cast<int32_t>(__builtin_lrintf(value[i]));
  return whole;
#endif
}

SPLITPOINT_INLINE void store_rounded(int8_t* to, IntVec values) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)values);
#elif defined(__AVX2__)
  const __m128i halves = (__m128i)narrowed((BitVec)values & 0xffu);
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(halves, halves));
#else
  const ByteVec bytes = __builtin_convertvector(values, ByteVec);
#endif
  __builtin_memcpy(to, &bytes, sizeof(bytes));
}
// Of each four values, in the order 0, 2, 1, 3.
SPLITPOINT_INLINE void store_rounded(int16_t* to, IntVec values) {
#if defined(__AVX512F__)
  values = (IntVec)_mm512_shuffle_epi32((__m512i)values, (_MM_PERM_ENUM)0xd8);
#elif defined(__AVX2__)
  values = (IntVec)_mm256_shuffle_epi32((__m256i)values, 0xd8);
#elif defined(__SSE2__)
  values = (IntVec)_mm_shuffle_epi32((__m128i)values, 0xd8);
#else
  values = IntVec{values[0], values[2], values[1], values[3]};
#endif
  const HalfVec halves = narrowed((BitVec)values & 0xffffu);
  __builtin_memcpy(to, &halves, sizeof(halves));
}

// A row's scale is its largest magnitude over 127, and each value is rounded times the scale's
// reciprocal: the same operations in fp32 as `reference.quantised_rows` has. A row with a value
// that is not finite gets NaN for its scale, and so for all its results.
struct RowScale {
  float value;
  bool finite;
  Vec reciprocal;

  template <class X>
  RowScale(const X* x, int64_t k) {
    const int32_t bits = largest_bits(x, k);
    float largest;
    __builtin_memcpy(&largest, &bits, sizeof(largest));
    finite = bits < 0x7f800000;
    value = largest / 127.0f;
    if (!(value > kLeastScale)) value = kLeastScale;
    reciprocal = splat(1.0f / value);
    if (!finite) value = __builtin_nanf("");
  }
  SPLITPOINT_INLINE IntVec whole(Vec x) const { return finite ? rounded(x * reciprocal) : IntVec{}; }
};

SPLITPOINT_INLINE int32_t sum_lanes(IntVec values) {
  int32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += values[lane];
  return sum;
}

template <class X>
inline void quantise_of(const QuantiseArgs& a, int64_t t0, int64_t t1) {
  using To = Quads::X;
  for (int64_t t = t0; t < t1; ++t) {
    const X* x = static_cast<const X*>(a.x) + t * a.x_stride;
    To* to = static_cast<To*>(a.to) + t * a.to_stride;
    const RowScale scale(x, a.k);
    IntVec sums{};
    const auto take = [&](int64_t i, Vec value) {
      const IntVec whole = scale.whole(value);
      sums += whole;
      store_rounded(to + i, whole);
    };
    int64_t i = 0;
    for (; i + kLanes <= a.k; i += kLanes) take(i, load(x + i));
    if (i < a.k) take(i, load(Padded<X>(x + i, a.k - i).lanes));
    a.scales[t] = scale.value;
    a.starts[t] = kInt8Dots ? -128 * sum_lanes(sums) : 0;
  }
}

}  // namespace splitpoint::SPLITPOINT_ISA
