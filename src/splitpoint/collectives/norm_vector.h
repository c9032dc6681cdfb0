// One register's worth of fp16, fp8 (e4m3) and fp4 (e2m1), on top of what linear layers have for
// fp32 and bf16. All roundings are to nearest, ties to even.
#pragma once

#include "linear_vector.h"
#include "norm_types.h"

namespace splitpoint::SPLITPOINT_ISA {

struct Half {
  uint16_t bits;
};

typedef uint64_t LongVec __attribute__((vector_size(4 * kLanes)));
typedef uint8_t CodeVec __attribute__((vector_size(kLanes)));
typedef uint8_t PairVec __attribute__((vector_size(kLanes / 2)));

SPLITPOINT_INLINE Vec load(const Half* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)load_bits<HalfVec>(from));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps((__m128i)load_bits<HalfVec>(from));
#else
  // 2^112 moves fp16's exponents, those of its subnormals too, to where fp32 has them.
  const BitVec bits = widened(load_bits<HalfVec>(from));
  const BitVec magnitude = (bits & 0x7fffu) << 13;
  const BitVec scaled = (BitVec)((Vec)magnitude * 0x1p112f);
  const BitVec value = magnitude >= (0x7c00u << 13) ? (magnitude | 0x7f800000u) : scaled;
  return (Vec)(value | (bits & 0x8000u) << 16);
#endif
}

SPLITPOINT_INLINE void store(Half* to, Vec value) {
#if defined(__AVX512F__)
  const auto rounded = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  const auto rounded = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
  // Adding a power of two that is 2^13 ulp of the result (2^-24 for a subnormal one) above the
  // value rounds it there; what overflows has become infinite by then.
  const BitVec bits = (BitVec)value;
  const BitVec magnitude = bits & 0x7fffffffu;
  const Vec grown = (Vec)magnitude * 0x1p112f * 0x1p-110f;
  const BitVec exponent = magnitude & 0x7f800000u;
  const BitVec floor = exponent < 0x38800000u ? (BitVec)(IntVec{} + 0x38800000) : exponent;
  const BitVec sum = (BitVec)((Vec)(floor + 0x07800000u) + grown);
  const BitVec finite = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  const BitVec magnitude16 = magnitude > 0x7f800000u ? (BitVec)(IntVec{} + 0x7e00) : finite;
  const HalfVec rounded = narrowed(magnitude16 | ((bits >> 16) & 0x8000u));
#endif
  __builtin_memcpy(to, &rounded, sizeof(rounded));
}

// The first `count` lanes, 0 < count <= kLanes; the others are zero.
template <class T>
SPLITPOINT_INLINE Vec load_some(const T* from, int64_t count) {
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, from, count * sizeof(T));
  return load(lanes);
}
template <class T>
SPLITPOINT_INLINE void store_some(T* to, Vec value, int64_t count) {
  T lanes[kLanes];
  store(lanes, value);
  __builtin_memcpy(to, lanes, count * sizeof(T));
}

// --- fp8 -------------------------------------------------------------------------------

inline constexpr float kFp8Largest = 448.0f;

// e4m3 codes, one a lane; beyond 448 the code of 448.
SPLITPOINT_INLINE BitVec fp8_codes(Vec value) {
  const BitVec bits = (BitVec)value;
  const BitVec whole = bits & 0x7fffffffu;
  constexpr uint32_t kLargest = 0x43e00000u;  // 448
  const BitVec magnitude = whole < kLargest ? whole : BitVec{} + kLargest;
  // Normal: the exponent moves from a bias of 127 to one of 7, half an ulp less one is added, and
  // one more if the last bit that stays is odd.
  const BitVec normal = (magnitude + (0xc4000000u + 0x7ffffu) + ((magnitude >> 20) & 1u)) >> 20;
  // Below 2^-6: at 2^14, the last bit of fp32 counts 2^-9, as e4m3's last bit does there.
  constexpr uint32_t kMagic = 141u << 23;
  const Vec magic = (Vec)(BitVec{} + kMagic);
  const BitVec small = (BitVec)((Vec)magnitude + magic) - kMagic;
  BitVec code = magnitude < (121u << 23) ? small : normal;
  code = whole > 0x7f800000u ? BitVec{} + 0x7fu : code;
  return code | (bits >> 24 & 0x80u);
}

// What codes without a sign stand for.
SPLITPOINT_INLINE Vec fp8_values(BitVec codes) {
  const Vec small = __builtin_convertvector((IntVec)codes, Vec) * 0x1p-9f;
  const Vec normal = (Vec)((codes << 20) + (120u << 23));
  const Vec value = codes < 8u ? small : normal;
  return codes == 0x7fu ? splat(__builtin_nanf("")) : value;
}

SPLITPOINT_INLINE void store_codes(uint8_t* to, BitVec codes) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)codes));
#elif defined(__AVX2__)
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)codes),
                                         _mm256_extracti128_si256((__m256i)codes, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(words, words));
#else
  const CodeVec narrow = __builtin_convertvector(codes, CodeVec);
  __builtin_memcpy(to, &narrow, sizeof(narrow));
#endif
}

// --- fp4 -------------------------------------------------------------------------------

// e2m1 codes of scaled values, with the signs of others: 0, 0.5, 1, 1.5, 2, 3, 4 and 6, and half
// way between two the even code. A NaN becomes 0; its block's scale is one.
SPLITPOINT_INLINE BitVec fp4_codes(Vec scaled, Vec signs) {
  const Vec magnitude = (Vec)((BitVec)scaled & 0x7fffffffu);
  const IntVec above = (magnitude > 0.25f) + (magnitude >= 0.75f) + (magnitude > 1.25f) +
                       (magnitude >= 1.75f) + (magnitude > 2.5f) + (magnitude >= 3.5f) +
                       (magnitude > 5.0f);  // each counts -1
  return (BitVec)-above | ((BitVec)signs >> 31 << 3);
}

// Two lanes to a byte, the first in its low half.
SPLITPOINT_INLINE void store_pairs(uint8_t* to, BitVec codes) {
  const LongVec pairs = (LongVec)codes;
  const LongVec bytes = pairs | pairs >> 28;
#if defined(__AVX512F__)
  _mm_storel_epi64((__m128i*)to, _mm512_cvtepi64_epi8((__m512i)bytes));
#else
  const PairVec narrow = __builtin_convertvector(bytes, PairVec);
  __builtin_memcpy(to, &narrow, sizeof(narrow));
#endif
}

// --- the largest lane ------------------------------------------------------------------

// Bits of magnitudes compare as integers do, and a NaN is above them all.
SPLITPOINT_INLINE IntVec larger(IntVec a, IntVec b) { return a > b ? a : b; }

template <int kWidth, class V>
SPLITPOINT_INLINE int32_t largest_lane(V value) {
  if constexpr (kWidth == 1) {
    return value[0];
  } else {
    typedef int32_t Part __attribute__((vector_size(2 * kWidth)));
    Part halves[2];
    __builtin_memcpy(halves, &value, sizeof(value));
    return largest_lane<kWidth / 2>(halves[0] > halves[1] ? halves[0] : halves[1]);
  }
}

SPLITPOINT_INLINE float as_float(int32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace splitpoint::SPLITPOINT_ISA
