// Two registers of fp32 lanes at a time. Neighbouring bf16 values share 32 bits, which a shift and
// a mask split into a register of the even values and one of the odd ones: cheaper than widening
// them in order, and what is computed lane by lane does not mind. Other types come as two halves.
#pragma once

#include <bit>
#include <type_traits>
#include <utility>

#include "norm_vector.h"

namespace splitpoint::SPLITPOINT_ISA {

inline constexpr int64_t kPair = 2 * kLanes;  // values

struct Pair {
  Vec first, second;
};

SPLITPOINT_INLINE Pair operator+(Pair a, Pair b) {
  return {a.first + b.first, a.second + b.second};
}
SPLITPOINT_INLINE Pair operator*(Pair a, Pair b) {
  return {a.first * b.first, a.second * b.second};
}
SPLITPOINT_INLINE Pair operator*(Pair a, Vec b) { return {a.first * b, a.second * b}; }

// Whether pairs of a type are of even and odd values.
template <class T>
inline constexpr bool kEvenOdd = std::is_same_v<T, Bf16>;

template <int... kLane>
SPLITPOINT_INLINE Pair even_odd(Pair halves, std::integer_sequence<int, kLane...>) {
  return {__builtin_shufflevector(halves.first, halves.second, (2 * kLane)...),
          __builtin_shufflevector(halves.first, halves.second, (2 * kLane + 1)...)};
}
// Halves to even and odd values.
SPLITPOINT_INLINE Pair even_odd(Pair halves) {
  return even_odd(halves, std::make_integer_sequence<int, kLanes>{});
}

template <int... kLane>
SPLITPOINT_INLINE Pair halves(Pair pair, std::integer_sequence<int, kLane...>) {
  return {__builtin_shufflevector(pair.first, pair.second, (kLane / 2 + kLane % 2 * kLanes)...),
          __builtin_shufflevector(pair.first, pair.second,
                                  (kLanes / 2 + kLane / 2 + kLane % 2 * kLanes)...)};
}
// Even and odd values to halves.
SPLITPOINT_INLINE Pair halves(Pair even_odd) {
  return halves(even_odd, std::make_integer_sequence<int, kLanes>{});
}

// Values of any type as pairs of T are.
template <class T, class From>
SPLITPOINT_INLINE Pair load_pair(const From* from) {
  if constexpr (kEvenOdd<From>) {
    static_assert(kEvenOdd<T> && std::endian::native == std::endian::little);
    const BitVec bits = load_bits<BitVec>(from);
    return {(Vec)(bits << 16), (Vec)(bits & 0xffff0000u)};
  } else {
    const Pair pair{load(from), load(from + kLanes)};
    return kEvenOdd<T> ? even_odd(pair) : pair;
  }
}

SPLITPOINT_INLINE BitVec rounded_pair(Pair even_odd) {
#if defined(__AVX512BF16__)
  const auto packed = (__m512i)_mm512_cvtne2ps_pbh((__m512)even_odd.second, (__m512)even_odd.first);
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                       23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (BitVec)_mm512_permutexvar_epi16(zip, packed);
#else
  // Round to nearest even; a NaN keeps its sign and becomes quiet.
  const auto upper = [](Vec value) {
    const BitVec bits = (BitVec)value;
    const BitVec up = bits + 0x7fffu + ((bits >> 16) & 1u);
    return value == value ? up : bits | 0x400000u;
  };
  return upper(even_odd.first) >> 16 | (upper(even_odd.second) & 0xffff0000u);
#endif
}

// A pair of T's order, as values of any type.
template <class T, class To>
SPLITPOINT_INLINE void store_pair(To* to, Pair pair) {
  if constexpr (kEvenOdd<To>) {
    static_assert(kEvenOdd<T>);
    const BitVec bits = rounded_pair(pair);
    __builtin_memcpy(to, &bits, sizeof(bits));
  } else {
    if constexpr (kEvenOdd<T>) pair = halves(pair);
    store(to, pair.first);
    store(to + kLanes, pair.second);
  }
}

}  // namespace splitpoint::SPLITPOINT_ISA
