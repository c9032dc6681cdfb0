// The linear-layer kernels of one instruction set: y = activation(x @ w^T * scale + bias) + r.
//
// Free of ATen and of the standard library, so that a sanitizer can run them alone and no
// template compiled for AVX-512 can replace one that the rest of the program uses.
// Define SPLITPOINT_ISA (the namespace) and SPLITPOINT_TABLE (the KernelTable) before.
#pragma once

#include "linear_gemv.h"
#include "linear_int4.h"
#include "linear_packed.h"
#if !defined(__AVX512BF16__)
#include "linear_int4_dots.h"
#endif

namespace splitpoint::SPLITPOINT_ISA {

inline constexpr bool kTakesLines = false;
inline constexpr int64_t kWidenedInt8Rows = 0;

#if defined(__AVX512BF16__)

// Only what has bf16 on both sides is compiled again for this instruction set.
inline constexpr bool kDots = true;
inline constexpr bool kInt8Dots = true;
inline constexpr bool kInt4Bytes = true;

inline void run_packed(const LinearArgs& a, const Part& part) {
  if (a.x_type == DType::i8) return kAvx512Vnni.packed(a, part);
  if (a.x_type == DType::f32) return kAvx512.packed(a, part);
  if (a.w_type == DType::bf16) return packed_part<Dot<Bf16Pairs>, Bf16>(a, part);
  if (a.w_type == DType::i4) return int4_part<Int4Dots, Bf16>(a, part);
  return packed_part<Dot<Int8Pairs>, Bf16>(a, part);
}

inline void run_gemv(const LinearArgs& a, const Part& part) {
  if (a.x_type == DType::f32) return kAvx512.gemv(a, part);
  return gemv_part<DotRow, Bf16>(a, part);
}

inline void quantise(const QuantiseArgs& a, int64_t t0, int64_t t1) {
  kAvx512Vnni.quantise(a, t0, t1);
}

#else

inline constexpr bool kDots = false;

inline void run_packed(const LinearArgs& a, const Part& part) {
  switch (a.w_type) {
    case DType::f32: return packed_part<F32, float>(a, part);
    case DType::bf16: return packed_part<Bf16Wide, Bf16>(a, part);
    case DType::i8:
      if (a.y_type == DType::bf16) return packed_part<Int8Wide, Bf16>(a, part);
      return packed_part<Int8Wide, float>(a, part);
    case DType::i4:
      if (a.x_type == DType::i8) return run_int4_dots(a, part);
      if (a.y_type == DType::bf16) return int4_part<Int4Wide, Bf16>(a, part);
      return int4_part<Int4Wide, float>(a, part);
    case DType::quads:
      if (a.y_type == DType::bf16) return packed_part<Quads, Bf16>(a, part);
      return packed_part<Quads, float>(a, part);
  }
}

inline void run_gemv(const LinearArgs& a, const Part& part) {
  switch (a.w_type) {
    case DType::f32: return gemv_part<WideRow<float>, float>(a, part);
    case DType::bf16: return gemv_part<WideRow<Bf16>, Bf16>(a, part);
    case DType::i8:
      if (a.y_type == DType::bf16) return gemv_part<WideRow<int8_t>, Bf16>(a, part);
      return gemv_part<WideRow<int8_t>, float>(a, part);
    case DType::i4:
    case DType::quads: return;  // have no plain layout
  }
}

#endif

inline void widen(const Bf16* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) {
    float lanes[kLanes];
    store(lanes, load(Padded<Bf16>(from + i, count - i).lanes));
    for (int64_t j = i; j < count; ++j) to[j] = lanes[j - i];
  }
}

// Reads whole registers and combines them: nothing but the memory bandwidth takes time.
inline uint32_t read(const char* from, int64_t bytes) {
  BitVec sums[4] = {};
  constexpr int64_t kStep = 4 * sizeof(BitVec);
  for (int64_t i = 0; i + kStep <= bytes; i += kStep) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] ^= load_bits<BitVec>(from + i + j * sizeof(BitVec));
  }
  const BitVec all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  uint32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total ^= all[i];
  return total;
}

// Multiplies and adds in registers, with nothing to wait for; returns how many operations that were.
// The sum is of no use but that it must be computed.
inline int64_t multiply(DType type, int64_t steps, float* sum) {
  Vec acc[kAccumulators], a = splat(sum[0]), b = splat(sum[1]);
  for (Vec& each : acc) each = Vec{};
  const bool pairs = kDots && type == DType::bf16;
  for (int64_t step = 0; step < steps; ++step) {
    // The factors might have changed, so that the product is computed anew.
#if defined(__x86_64__)
    __asm__ volatile("" : "+x"(a), "+x"(b));
#else
    __asm__ volatile("" : "+m"(a), "+m"(b));
#endif
#if defined(__AVX512BF16__)
    if (pairs) {
#pragma GCC unroll 32
      for (int i = 0; i < kAccumulators; ++i) {
        acc[i] = (Vec)_mm512_dpbf16_ps((__m512)acc[i], (__m512bh)a, (__m512bh)b);
      }
      continue;
    }
#endif
#pragma GCC unroll 32
    for (int i = 0; i < kAccumulators; ++i) acc[i] += a * b;
  }
  for (const Vec& each : acc) sum[0] += splitpoint::SPLITPOINT_ISA::sum(each);
  return steps * kAccumulators * kLanes * (pairs ? 4 : 2);
}

// [rows, k] to [ceil(rows / 32)][k / depth][32][depth], zeros for what is not there. int8 has
// depth 1 but an even number of k's, so that pairs can be read from two rows.
template <class T, int kDepth, int kEven>
inline void pack_blocks(const PackArgs& a, int64_t block0, int64_t block1) {
  const auto* weight = static_cast<const T*>(a.weight);
  const int64_t stored_k = ceil_div(a.k, kEven) * kEven;
  for (int64_t block = block0; block < block1; ++block) {
    const T* rows[kBlock];
    for (int64_t c = 0; c < kBlock; ++c) {
      const int64_t row = block * kBlock + c;
      rows[c] = row < a.rows ? weight + row * a.k : nullptr;
    }
    T* to = static_cast<T*>(a.packed) + block * stored_k * kBlock;
    for (int64_t k = 0; k < stored_k; k += kDepth) {
      for (int64_t c = 0; c < kBlock; ++c) {
        for (int d = 0; d < kDepth; ++d) {
          *to++ = rows[c] && k + d < a.k ? rows[c][k + d] : T{};
        }
      }
    }
  }
}

inline void run_pack(const PackArgs& a, int64_t block0, int64_t block1) {
  switch (a.type) {
    case DType::f32: return pack_blocks<float, 1, 1>(a, block0, block1);
    case DType::bf16: return pack_blocks<Bf16, 2, 2>(a, block0, block1);
    case DType::i8: return pack_blocks<int8_t, 1, 2>(a, block0, block1);
    case DType::i4:
    case DType::quads: return;  // laid out where they are quantised
  }
}

}  // namespace splitpoint::SPLITPOINT_ISA
