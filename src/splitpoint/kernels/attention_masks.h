// Masks of attention of many rows: whether a piece of one matters at all, and its values as scores lie.
#pragma once

#include "attention_vector.h"
#include "attention_wide_types.h"

namespace splitpoint::SPLITPOINT_ISA {

// Registers of rows that are multiplied side by side: a strip.
inline constexpr int kStripVecs = 3;
inline constexpr int64_t kStrip = kStripVecs * kLanes;
static_assert(kStrip <= kStripRows && kWideRows % kStrip == 0);

// What of a piece a mask shows.
enum class Shown { none, some, all };

template <class B>
SPLITPOINT_INLINE bool any_bit(const B& bits) {
  int64_t words[sizeof(B) / 8], all = 0;
  __builtin_memcpy(words, &bits, sizeof(B));
#pragma GCC unroll 8
  for (int64_t word : words) all |= word;
  return all != 0;
}

// The mask of a strip's rows.
struct StripMask {
  const char* data;
  Mask type;
  int64_t key;            // values from key to key
  const int64_t* row_at;  // where each row's starts

  // Where a row's starts at a position.
  SPLITPOINT_INLINE const char* from(int64_t row, int64_t begin) const {
    const int64_t bytes = type == Mask::boolean ? 1 : type == Mask::f32 ? 4 : 2;
    return data + (row_at[row] + begin * key) * bytes;
  }

  // Which of `count` keys the rows of so many registers are shown. Triangles, bands and blocks along
  // the diagonal leave most pieces out or as they are.
  SPLITPOINT_INLINE Shown shown(int64_t vecs, int64_t begin, int64_t count) const {
    typedef int8_t Bytes __attribute__((vector_size(64)));
    const bool bytes = type == Mask::boolean && key == 1 && count % 64 == 0;
    Bytes some{}, hidden{};
    IntVec any{}, changed{};
    for (int64_t r = 0; r < vecs * kLanes; ++r) {
      if (r > 0 && row_at[r] == row_at[r - 1]) continue;
      const char* row = from(r, begin);
      if (bytes) {
        for (int64_t j = 0; j < count; j += 64) {
          const auto piece = load_bits<Bytes>(row + j);
          some |= piece;
          hidden |= piece == 0;
        }
        continue;
      }
      for (int64_t j = 0; j < count; j += kLanes) {
        const int64_t lanes = count - j < kLanes ? count - j : kLanes;
        const Vec added = masked(type, key, row, j, lanes);
        any |= lane_numbers() < static_cast<int32_t>(lanes) ? added != kMinusInfinity : IntVec{};
        changed |= added != 0.0f;
      }
    }
    if (bytes) {
      if (!any_bit(some)) return Shown::none;
      return any_bit(hidden) ? Shown::some : Shown::all;
    }
    if (!any_bit(any)) return Shown::none;
    return any_bit(changed) ? Shown::some : Shown::all;
  }

  // What it adds to scores, turned around as these are: to[keys][kStrip].
  template <int kVecs>
  SPLITPOINT_INLINE void turn(int64_t begin, int64_t count, float* to) const {
    for (int64_t j = 0; j < count; j += kLanes) {
      const int64_t lanes = count - j < kLanes ? count - j : kLanes;
      for (int64_t v = 0; v < kVecs; ++v) {
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const char* row = from(v * kLanes + i, begin);
          square[i] = masked(type, key, row, j, lanes);
        }
        SPLITPOINT_ISA::turn(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + (j + i) * kStrip + v * kLanes, square[i]);
      }
    }
  }
};

}  // namespace splitpoint::SPLITPOINT_ISA
