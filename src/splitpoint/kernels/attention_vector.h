// Registers as attention uses them where it goes from piece to piece of the keys: how fp32 and bf16
// are multiplied, sums within quarters of a register, the softmax's exponential, and turning squares
// of registers around.
#pragma once

#include "attention.h"
#include "linear_kernels.h"

namespace splitpoint::SPLITPOINT_ISA {

// Registers are counted in units of 32 bits, which are one fp32 or a pair of bf16. A quad is four
// units; it can be had from memory in every quarter of a register at once.
inline constexpr int kQuads = kLanes / 4;

// Multiplies in fp32 what is stored as T.
template <class Stored>
struct Exact {
  using T = Stored;
  using Work = float;
  static constexpr int kDepth = 1;
  static constexpr bool kWidens = sizeof(T) != sizeof(Work);
  static constexpr bool kTiles = false;
  static constexpr int64_t kChunk = 64;  // keys that are scored before their values are summed

  static SPLITPOINT_INLINE Vec add(Vec acc, Vec a, Vec b) { return acc + a * b; }
  static SPLITPOINT_INLINE Vec unit(const Work* from) { return splat(*from); }
};

#if defined(__AVX512BF16__)
// Multiplies pairs of bf16.
struct Pairs {
  using T = Bf16;
  using Work = Bf16;
  static constexpr int kDepth = 2;
  static constexpr bool kWidens = false;
  static constexpr bool kTiles = false;  // whether products are left to matrix instructions
  static constexpr int64_t kChunk = 64;

  static SPLITPOINT_INLINE Vec add(Vec acc, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
  static SPLITPOINT_INLINE Vec unit(const Work* from) {
    return (Vec)_mm512_set1_epi32(load_bits<int32_t>(from));
  }
};
#endif

template <class Work>
SPLITPOINT_INLINE Vec units(const Work* from) {
  return load_bits<Vec>(from);
}

template <class Work>
SPLITPOINT_INLINE Vec quad(const Work* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_broadcast_f32x4(load_bits<__m128>(from));
#elif defined(__AVX2__)
  const __m128 once = load_bits<__m128>(from);
  return (Vec)_mm256_broadcast_ps(&once);
#else
  return load_bits<Vec>(from);
#endif
}

// Within each quarter: the first two units of a and of b, taking turns; and the last two.
SPLITPOINT_INLINE Vec low_units(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_unpacklo_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_unpacklo_ps((__m256)a, (__m256)b);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}
SPLITPOINT_INLINE Vec high_units(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_unpackhi_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_unpackhi_ps((__m256)a, (__m256)b);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}
// Within each quarter: a's first two units and b's; and a's last two and b's.
SPLITPOINT_INLINE Vec low_halves(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_unpacklo_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_unpacklo_pd((__m256d)a, (__m256d)b);
#else
  return __builtin_shufflevector(a, b, 0, 1, 4, 5);
#endif
}
SPLITPOINT_INLINE Vec high_halves(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_unpackhi_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
#else
  return __builtin_shufflevector(a, b, 2, 3, 6, 7);
#endif
}

// Unit i of each quarter is the sum of that quarter of registers[i].
SPLITPOINT_INLINE Vec quarter_sums(const Vec* registers) {
  const Vec first = low_units(registers[0], registers[1]) + high_units(registers[0], registers[1]);
  const Vec last = low_units(registers[2], registers[3]) + high_units(registers[2], registers[3]);
  return low_halves(first, last) + high_halves(first, last);
}

// Each quarter's largest unit, or sum, in all of its units.
SPLITPOINT_INLINE Vec quarter_tops(Vec value) {
  const Vec low = low_halves(value, value), high = high_halves(value, value);
  const Vec pairs = low > high ? low : high;
  const Vec even = low_units(pairs, pairs);
  const Vec first = low_halves(even, even), second = high_halves(even, even);
  return first > second ? first : second;
}
SPLITPOINT_INLINE Vec quarter_totals(Vec value) {
  const Vec pairs = low_halves(value, value) + high_halves(value, value);
  const Vec even = low_units(pairs, pairs);
  return low_halves(even, even) + high_halves(even, even);
}

// a where it is larger, else b, also where one is no number.
SPLITPOINT_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline constexpr float kLog2e = 1.44269504088896341f;

// 2^t for t up to 0, or what rounding puts above it, by a polynomial of degree kTerms; zero from -127
// on. Its coefficients have the least largest relative error over half of 1 to each side: 2e-9 of
// degree 6, where rounding decides, and 3e-6 of degree 4, for results of bf16.
template <int kTerms>
SPLITPOINT_INLINE Vec exp2_below(Vec t) {
  static_assert(kTerms == 4 || kTerms == 6);
  constexpr float kShift = 12582912.0f;
  t = larger(splat(-127.0f), t);
  const Vec shifted = t + kShift;
  const Vec f = t - (shifted - kShift);
  Vec p;
  if constexpr (kTerms == 6) {
    p = splat(1.534581201e-4f) * f + 1.339993122e-3f;
    p = p * f + 9.618488957e-3f;
    p = p * f + 5.550328777e-2f;
    p = p * f + 2.402264689e-1f;
    p = p * f + 6.931472057e-1f;
    p = p * f + 1.0f;
  } else {
    p = splat(9.570101911e-3f) * f + 5.591786032e-2f;
    p = p * f + 2.402474483e-1f;
    p = p * f + 6.931218147e-1f;
    p = p * f + 9.999992614e-1f;
  }
  return p * (Vec)(((BitVec)shifted + 127u) << 23);
}

// e^x for x up to 0, as exp2_below of degree 6.
SPLITPOINT_INLINE Vec exp_below(Vec x) { return exp2_below<6>(x * kLog2e); }

// cap tanh(x / cap).
SPLITPOINT_INLINE Vec capped(Vec x, float cap) {
  return cap - 2 * cap / (1.0f + exp(x * (2.0f / cap)));
}

// Turns a square around: unit j of register i becomes unit i of register j.
SPLITPOINT_INLINE void turn(Vec (&square)[kLanes]) {
  const auto low = [](Vec a, Vec b) __attribute__((always_inline)) {
#if defined(__AVX512F__)
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
  };
  const auto high = [](Vec a, Vec b) __attribute__((always_inline)) {
#if defined(__AVX512F__)
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                   31);
#elif defined(__AVX2__)
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
  };
  // Every round moves one bit of the register's number to the unit's.
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = low(square[i], square[i + kLanes / 2]);
      next[2 * i + 1] = high(square[i], square[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = next[i];
  }
}

// Rows side by side as they are multiplied, copied to `room` only if they are stored otherwise.
template <class F>
SPLITPOINT_INLINE const typename F::Work* as_work(const typename F::T* from, int64_t count,
                                                  typename F::Work* room) {
  if constexpr (F::kWidens) {
    widen(from, room, count);
    return room;
  } else {
    return from;
  }
}

// Memory that an item works in, handed out piece by piece.
struct Scratch {
  char* next;

  template <class T>
  SPLITPOINT_INLINE T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next);
    next += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
    return taken;
  }
};

}  // namespace splitpoint::SPLITPOINT_ISA
