// Random values in heap allocations of exactly their size, for the sanitizers.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "linear_types.h"

namespace splitpoint {

inline uint32_t state = 12345;
inline float uniform() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
}

inline Bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {static_cast<uint16_t>(bits >> 16)};
}
inline float to_float(Bf16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline int64_t size_of(DType type) { return type == DType::f32 ? 4 : type == DType::bf16 ? 2 : 1; }

// `count` values in an allocation of exactly their bytes.
struct Buffer {
  DType type;
  int64_t count;
  std::unique_ptr<char[]> bytes;

  Buffer(DType type, int64_t count)
      : type(type), count(count), bytes(new char[count * size_of(type)]) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = uniform();
      if (type == DType::f32) reinterpret_cast<float*>(bytes.get())[i] = value;
      if (type == DType::bf16) reinterpret_cast<Bf16*>(bytes.get())[i] = to_bf16(value);
      if (type == DType::i8) bytes[i] = static_cast<char>(static_cast<int>(value * 127));
    }
  }
  double at(int64_t i) const {
    if (type == DType::f32) return reinterpret_cast<const float*>(bytes.get())[i];
    if (type == DType::bf16) return to_float(reinterpret_cast<const Bf16*>(bytes.get())[i]);
    return static_cast<signed char>(bytes[i]);
  }
};

// The kernels of x rounded to int8, of attention, and of that over a paged cache, over many shapes;
// how many runs that were.
long check_int8(const KernelTable& table);
long check_attention(const KernelTable& table);
long check_cached(const KernelTable& table);

}  // namespace splitpoint
