// One register's worth of fp32 lanes, as wide as the instruction set this file is compiled
// for. GCC's vector extensions (which clang has too) make one source do for SSE2, AVX2,
// AVX-512 and NEON; the compiler turns a * b + c into a fused multiply-add where there is one.
#pragma once

#include "linear_types.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define SPLITPOINT_INLINE inline __attribute__((always_inline))

namespace splitpoint::SPLITPOINT_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
inline constexpr int kRegisters = 32;
inline constexpr int kAccumulators = 28;  // two others hold weights, one holds x
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
inline constexpr int kRegisters = 16;
inline constexpr int kAccumulators = 12;
#else
inline constexpr int kLanes = 4;
inline constexpr int kRegisters = 16;
inline constexpr int kAccumulators = 12;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitVec __attribute__((vector_size(4 * kLanes)));
typedef int16_t ShortVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));
typedef int8_t ByteVec __attribute__((vector_size(kLanes)));

// Unaligned: a tensor may start anywhere in its storage.
template <class V>
SPLITPOINT_INLINE V load_bits(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

// Minus zero leaves every value as it is, so that only the broadcast remains; plus would not.
SPLITPOINT_INLINE Vec splat(float value) { return value - Vec{}; }

// Changes of width are spelt out where there is an instruction: GCC 12 does most of them lane by
// lane.
SPLITPOINT_INLINE BitVec widened(HalfVec value) {
#if defined(__AVX512F__)
  return (BitVec)_mm512_cvtepu16_epi32((__m256i)value);
#elif defined(__AVX2__)
  return (BitVec)_mm256_cvtepu16_epi32((__m128i)value);
#else
  return __builtin_convertvector(value, BitVec);
#endif
}
SPLITPOINT_INLINE IntVec widened(ByteVec value) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_cvtepi8_epi32((__m128i)value);
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)value));
#else
  return __builtin_convertvector(value, IntVec);
#endif
}
SPLITPOINT_INLINE HalfVec narrowed(BitVec value) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtepi32_epi16((__m512i)value);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)value, (__m256i)value);
  return (HalfVec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(value, HalfVec);
#endif
}

SPLITPOINT_INLINE Vec load(const float* from) { return load_bits<Vec>(from); }
SPLITPOINT_INLINE Vec load(const Bf16* from) {
  return (Vec)(widened(load_bits<HalfVec>(from)) << 16);
}
SPLITPOINT_INLINE Vec load(const int8_t* from) {
  return __builtin_convertvector(widened(load_bits<ByteVec>(from)), Vec);
}

SPLITPOINT_INLINE void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof(Vec)); }
SPLITPOINT_INLINE void store(Bf16* to, Vec value) {
#if defined(__AVX512BF16__)
  const auto rounded = _mm512_cvtneps_pbh((__m512)value);
#else
  // Round to nearest even; a NaN keeps its sign and becomes quiet.
  const BitVec bits = (BitVec)value;
  const BitVec up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const BitVec nan = (bits >> 16) | 0x40u;
  const HalfVec rounded = narrowed(value == value ? up : nan);
#endif
  __builtin_memcpy(to, &rounded, sizeof(rounded));
}

// The sum of the lanes, halves added to halves, which rounds less than a running sum.
template <int kWidth, class V>
SPLITPOINT_INLINE float sum_lanes(V value) {
  if constexpr (kWidth == 1) {
    return value[0];
  } else {
    typedef float Half __attribute__((vector_size(2 * kWidth)));
    Half halves[2];
    __builtin_memcpy(halves, &value, sizeof(value));
    return sum_lanes<kWidth / 2>(halves[0] + halves[1]);
  }
}
SPLITPOINT_INLINE float sum(Vec value) { return sum_lanes<kLanes>(value); }

// e^x to 2 ulp, after the Cephes library's expf: x = n ln 2 + r, a polynomial in r, times 2^n.
// Clamped to [-87.3, 88], where the result is a normal number; a NaN stays one.
SPLITPOINT_INLINE Vec exp(Vec x) {
  x = x < -87.3f ? splat(-87.3f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  // Adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits of the sum.
  constexpr float kShift = 12582912.0f;
  const Vec shifted = x * 1.44269504088896341f + kShift;
  const Vec n = shifted - kShift;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (Vec)(((BitVec)shifted + 127u) << 23);
}

SPLITPOINT_INLINE Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

// 0.5 x (1 + tanh u) = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
SPLITPOINT_INLINE Vec gelu_tanh(Vec x) {
  const Vec u2 = 1.5957691216057308f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exp(-u2));
}

// x Phi(x). Phi comes from erfc by Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7.
SPLITPOINT_INLINE Vec gelu_erf(Vec x) {
  const Vec z = (x < 0.0f ? -x : x) * 0.70710678118654752f;
  const Vec t = 1.0f / (1.0f + 0.3275911f * z);
  Vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec tail = 0.5f * p * t * exp(-z * z);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

}  // namespace splitpoint::SPLITPOINT_ISA
