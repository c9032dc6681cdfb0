// Attention over few queries: scores of a block of rows against all keys, their softmax, and the
// weighted sum of values, all in fp32. Nothing is packed or transposed, so that short inputs pay
// for no more than they use.
#pragma once

#include "attention_types.h"
#include "linear_gemv.h"

namespace splitpoint::SPLITPOINT_ISA {

// The lanes of two registers added in pairs that are half a register apart, taking turns: a's
// first sum, b's first sum, a's second sum and so on.
SPLITPOINT_INLINE Vec folded(Vec a, Vec b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23) +
         __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11) +
         __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Lane i is the sum of the lanes of registers[i].
template <int kCount>
SPLITPOINT_INLINE Vec sums_of(Vec (&registers)[kLanes]) {
  if constexpr (kCount == 1) {
    return registers[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      registers[i] = folded(registers[i], registers[i + kCount / 2]);
    }
    return sums_of<kCount / 2>(registers);
  }
}

template <int kWidth, class V>
SPLITPOINT_INLINE float max_lanes(V value) {
  if constexpr (kWidth == 1) {
    return value[0];
  } else {
    typedef float Half __attribute__((vector_size(2 * kWidth)));
    Half halves[2];
    __builtin_memcpy(halves, &value, sizeof(value));
    return max_lanes<kWidth / 2>(halves[0] > halves[1] ? halves[0] : halves[1]);
  }
}

SPLITPOINT_INLINE IntVec lane_numbers() {
  IntVec numbers;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  return numbers;
}

inline constexpr float kMinusInfinity = -__builtin_inff();

// One query: where it and all that belongs to it lies.
template <class T>
struct QueryRow {
  const T* q;
  const char* mask;
  T* y;
  int64_t keys;  // that it may see
};

// q . each of kLanes keys.
template <class R, class T>
SPLITPOINT_INLINE Vec dots_with_keys(const T* q, const T* const (&keys)[kLanes], int64_t size) {
  Vec acc[kLanes];
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) acc[j] = Vec{};
  int64_t i = 0;
  for (; i + R::kStep <= size; i += R::kStep) {
    const auto x = R::all(q + i);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) acc[j] = R::add(acc[j], R::all(keys[j] + i), x);
  }
  if (i < size) {
    const auto x = R::part(q + i, size - i);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) acc[j] = R::add(acc[j], R::part(keys[j] + i, size - i), x);
  }
  return sums_of<kLanes>(acc);
}

// What a mask, whose values lie `stride` apart, adds to the scores of `count` keys from j on; a
// boolean one takes away those where it is false.
SPLITPOINT_INLINE Vec masked(Mask type, int64_t stride, const void* mask, int64_t j,
                             int64_t count) {
  const auto* bytes = static_cast<const int8_t*>(mask);
  const auto* floats = static_cast<const float*>(mask);
  const auto* halves = static_cast<const Bf16*>(mask);
  if (stride == 1 && count == kLanes) {
    switch (type) {
      case Mask::boolean:
        return widened(load_bits<ByteVec>(bytes + j)) != 0 ? Vec{} : splat(kMinusInfinity);
      case Mask::f32: return load(floats + j);
      case Mask::bf16: return load(halves + j);
      case Mask::none: break;
    }
  }
  float lanes[kLanes] = {};
  Bf16 short_lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (j + i) * stride;
    if (type == Mask::boolean) lanes[i] = bytes[at] ? 0.0f : kMinusInfinity;
    if (type == Mask::f32) lanes[i] = floats[at];
    if (type == Mask::bf16) short_lanes[i] = halves[at];
  }
  return type == Mask::bf16 ? load(short_lanes) : load(lanes);
}

// Scores of a block of rows against all keys that one of them sees.
template <class R, class T>
SPLITPOINT_INLINE void score(const AttentionArgs& a, const QueryRow<T>* rows, int64_t count,
                             const T* k, int64_t seen, float* scores) {
  const int64_t stride = score_stride(a.keys);
  const IntVec numbers = lane_numbers();
  for (int64_t j = 0; j < seen; j += kLanes) {
    const T* keys[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      // The last key again where there is none: its score is dropped.
      keys[i] = k + (j + i < a.keys ? j + i : a.keys - 1) * a.k_strides.row;
    }
    for (int64_t r = 0; r < count; ++r) {
      Vec s = splat(kMinusInfinity);
      const int64_t left = rows[r].keys - j;
      if (left > 0) {
        const int64_t lanes = left < kLanes ? left : kLanes;
        Vec dots = dots_with_keys<R>(rows[r].q, keys, a.size) * a.scale;
        if (a.mask_type != Mask::none) {
          dots += masked(a.mask_type, a.mask_stride, rows[r].mask, j, lanes);
        }
        s = numbers < static_cast<int32_t>(lanes) ? dots : s;
      }
      store(scores + r * stride + j, s);
    }
  }
}

// Scores to weights that still lack the factor that is returned. Where every score is minus
// infinity all weights are zero; a score that is no number makes the factor none.
SPLITPOINT_INLINE float weights_of(float* scores, int64_t seen) {
  Vec tops = splat(kMinusInfinity);
  for (int64_t j = 0; j < seen; j += kLanes) {
    const Vec s = load(scores + j);
    tops = s > tops ? s : tops;
  }
  const float top = max_lanes<kLanes>(tops);
  const float shift = top == kMinusInfinity ? 0.0f : top;
  Vec total{};
  for (int64_t j = 0; j < seen; j += kLanes) {
    const Vec s = load(scores + j);
    // exp stops at a small number above zero.
    const Vec weight = s == kMinusInfinity ? Vec{} : exp(s - shift);
    store(scores + j, weight);
    total += weight;
  }
  const float sum_of_all = sum(total);
  return sum_of_all == 0.0f ? 0.0f : 1.0f / sum_of_all;
}

// Registers of columns of the values that are summed side by side.
inline constexpr int kValueVecs = kLanes == 16 ? 4 : 2;

// kVecs registers of columns from c on of the weighted sum of values; of the last one `count`.
template <class T, int kRows, int kVecs>
SPLITPOINT_INLINE void weigh_columns(const AttentionArgs& a, const QueryRow<T>* rows,
                                     const float* weights, const float* factors, const T* v,
                                     int64_t seen, int64_t c, int64_t count) {
  const int64_t stride = score_stride(a.keys);
  Vec acc[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) acc[r][i] = Vec{};
  }
  const auto add = [&](int64_t j, auto read) __attribute__((always_inline)) {
    const T* value = v + j * a.v_strides.row + c;
    Vec values[kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) values[i] = read(value + i * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = splat(weights[r * stride + j]);
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) acc[r][i] += values[i] * weight;
    }
  };
  if (count == kLanes) {
    for (int64_t j = 0; j < seen; ++j) {
      add(j, [](const T* from) __attribute__((always_inline)) { return load(from); });
    }
  } else {
    for (int64_t j = 0; j < seen; ++j) {
      add(j, [&](const T* from) __attribute__((always_inline)) {
        return load(Padded<T>(from, count).lanes);
      });
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Vec factor = splat(factors[r]);
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      T* y = rows[r].y + c + i * kLanes;
      if (count == kLanes) {
        store(y, acc[r][i] * factor);
        continue;
      }
      T lanes[kLanes];
      store(lanes, acc[r][i] * factor);
      for (int64_t l = 0; l < count; ++l) y[l] = lanes[l];
    }
  }
}

template <class T, int kRows>
inline void weigh(const AttentionArgs& a, const QueryRow<T>* rows, const float* weights,
                  const float* factors, const T* v, int64_t seen) {
  int64_t c = 0;
  for (; c + kValueVecs * kLanes <= a.value_size; c += kValueVecs * kLanes) {
    weigh_columns<T, kRows, kValueVecs>(a, rows, weights, factors, v, seen, c, kLanes);
  }
  for (; c < a.value_size; c += kLanes) {
    const int64_t left = a.value_size - c;
    weigh_columns<T, kRows, 1>(a, rows, weights, factors, v, seen, c, left < kLanes ? left : kLanes);
  }
}

template <class R, class T>
inline void attend_part(const AttentionArgs& a, const AttentionPart& part) {
  const int64_t blocks = row_blocks(a), all_rows = a.group * a.queries;
  const int64_t mask_bytes = a.mask_type == Mask::boolean ? 1 : a.mask_type == Mask::f32 ? 4 : 2;
  for (int64_t item = part.begin; item < part.end; ++item) {
    const int64_t block = item % blocks, kv_head = item / blocks % a.kv_heads;
    const int64_t b = item / blocks / a.kv_heads;
    // Heads that share keys follow each other before the next query: rows of a block that are
    // neighbours see about as many keys.
    const int64_t first = block * kQueryRows;
    const int64_t count = all_rows - first < kQueryRows ? all_rows - first : kQueryRows;
    QueryRow<T> rows[kQueryRows];
    int64_t seen = 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = (first + r) / a.group, h = kv_head * a.group + (first + r) % a.group;
      const auto at = [&](const Strides& s) { return b * s.batch + h * s.head + i * s.row; };
      rows[r].q = static_cast<const T*>(a.q) + at(a.q_strides);
      rows[r].y = static_cast<T*>(a.y) + at(a.y_strides);
      rows[r].mask = a.mask_type == Mask::none
                         ? nullptr
                         : static_cast<const char*>(a.mask) + at(a.mask_strides) * mask_bytes;
      rows[r].keys = a.causal && i + 1 < a.keys ? i + 1 : a.keys;
      if (rows[r].keys > seen) seen = rows[r].keys;
    }
    const T* k = static_cast<const T*>(a.k) + b * a.k_strides.batch + kv_head * a.k_strides.head;
    const T* v = static_cast<const T*>(a.v) + b * a.v_strides.batch + kv_head * a.v_strides.head;
    score<R>(a, rows, count, k, seen, part.scores);
    float factors[kQueryRows];
    for (int64_t r = 0; r < count; ++r) {
      factors[r] = weights_of(part.scores + r * score_stride(a.keys), seen);
    }
    switch (count) {
      case 1: weigh<T, 1>(a, rows, part.scores, factors, v, seen); break;
      case 2: weigh<T, 2>(a, rows, part.scores, factors, v, seen); break;
      case 3: weigh<T, 3>(a, rows, part.scores, factors, v, seen); break;
      default: weigh<T, 4>(a, rows, part.scores, factors, v, seen); break;
    }
  }
}

#if defined(__AVX512BF16__)

inline void attend(const AttentionArgs& a, const AttentionPart& part) {
  if (a.type == DType::f32) return kAvx512.attend(a, part);
  attend_part<DotRow, Bf16>(a, part);
}

#else

inline void attend(const AttentionArgs& a, const AttentionPart& part) {
  if (a.type == DType::f32) return attend_part<WideRow<float>, float>(a, part);
  attend_part<WideRow<Bf16>, Bf16>(a, part);
}

#endif

}  // namespace splitpoint::SPLITPOINT_ISA
