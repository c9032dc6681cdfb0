// The passes over a row of a fused call, register by register, and how they go over it together.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "norm_pairs.h"

namespace splitpoint::SPLITPOINT_ISA {

// Room for one row between the passes over it. Aligned: every other load of a register as wide as a
// cache line would touch two of them otherwise.
template <class T>
class RowBuffer {
 public:
  T* of(int64_t count) {
    if (count > count_) {
      lines_.reset(new Line[(count + 2 * kLanes) / kLineValues + 1]);
      count_ = count;
    }
    return lines_[0].values;
  }

 private:
  static constexpr int64_t kLineValues = 64 / sizeof(T);
  struct alignas(64) Line {
    T values[kLineValues];
  };
  std::unique_ptr<Line[]> lines_;
  int64_t count_ = 0;
};

// Makes passes over a row together: all of them over two registers, then over the next two. A pass
// has pair(i, turn) for values i to i + kPair, with turn 0 and 1 alternately, and some(i, count) for
// the up to kLanes values that may be left at the row's end.
template <class... Passes>
SPLITPOINT_INLINE void over_row(int64_t hidden, Passes&... passes) {
  int64_t i = 0;
  for (; i + 2 * kPair <= hidden; i += 2 * kPair) {
    (passes.pair(i, 0), ...);
    (passes.pair(i + kPair, 1), ...);
  }
  if (i + kPair <= hidden) {
    (passes.pair(i, 0), ...);
    i += kPair;
  }
  for (; i < hidden; i += kLanes) {
    (passes.some(i, std::min<int64_t>(kLanes, hidden - i)), ...);
  }
}

template <class T, int kRanks>
SPLITPOINT_INLINE Pair sum_pair(const T* const* sources, int ranks, int64_t i) {
  Pair sum = load_pair<T>(sources[0] + i);
  const int count = kRanks ? kRanks : ranks;
  for (int rank = 1; rank < count; ++rank) sum = sum + load_pair<T>(sources[rank] + i);
  return sum;
}

template <class T>
SPLITPOINT_INLINE Vec sum_some(const T* const* sources, int ranks, int64_t i, int64_t count) {
  Vec sum = load_some(sources[0] + i, count);
  for (int rank = 1; rank < ranks; ++rank) sum += load_some(sources[rank] + i, count);
  return sum;
}

// Sums a row over the ranks and with the residual, and adds up the squares. R is the residual's type;
// sums are rounded to it, and without a residual to the input's.
template <class T, class R, bool kResidual, int kRanks>
class RowSum {
 public:
  RowSum(const FusedArgs& a, int64_t row, R* sums) : ranks_(a.ranks), sums_(sums) {
    for (int rank = 0; rank < a.ranks; ++rank) {
      sources_[rank] = reinterpret_cast<const T*>(a.sources[rank]) + row * a.hidden;
    }
    if constexpr (kResidual) residual_ = static_cast<const R*>(a.residual) + row * a.hidden;
  }

  // Two chains of squares, so that one addition need not wait for the last.
  SPLITPOINT_INLINE void pair(int64_t i, int turn) {
    Pair sum = sum_pair<T, kRanks>(sources_, ranks_, i);
    if constexpr (kResidual) sum = sum + load_pair<T>(residual_ + i);
    store_pair<T>(sums_ + i, sum);
    squares_[turn] = squares_[turn] + sum * sum;
  }

  SPLITPOINT_INLINE void some(int64_t i, int64_t count) {
    Vec sum = sum_some(sources_, ranks_, i, count);
    if constexpr (kResidual) sum += load_some(residual_ + i, count);
    store_some(sums_ + i, sum, count);
    squares_[0].first += sum * sum;
  }

  float squares() const {
    const Pair all = squares_[0] + squares_[1];
    return sum(all.first + all.second);
  }

 private:
  const T* sources_[kMostRanks];
  const R* residual_ = nullptr;
  int ranks_;
  R* sums_;
  Pair squares_[2] = {};
};

// Has a row of the other ranks' inputs brought into the nearest cache, and into no other, since they
// are read once. This rank's own are near: they have just been copied for the others.
template <class T, int kRanks>
class RowFetch {
 public:
  RowFetch(const FusedArgs& a, int64_t row) {
    for (int rank = 0; rank < a.ranks; ++rank) {
      if (rank != a.rank) others_[count_++] = a.sources[rank] + row * a.hidden * int64_t{sizeof(T)};
    }
  }

  SPLITPOINT_INLINE void pair(int64_t i, int) const {
    const int count = kRanks ? kRanks - 1 : count_;
    for (int other = 0; other < count; ++other) {
      const char* from = others_[other] + i * int64_t{sizeof(T)};
      __builtin_prefetch(from, 0, 0);
      if constexpr (kPair * sizeof(T) > 64) __builtin_prefetch(from + 64, 0, 0);
    }
  }

  void some(int64_t, int64_t) const {}

 private:
  const char* others_[kMostRanks];
  int count_ = 0;
};

// Makes a row's norm of its sums. W is the weight's type.
template <class T, class R, class W>
class RowNorm {
 public:
  RowNorm() = default;
  RowNorm(const FusedArgs& a, int64_t row, const R* sums, float squares)
      : sums_(sums),
        weight_(static_cast<const W*>(a.weight)),
        norm_(a.norm ? static_cast<T*>(a.norm) + row * a.hidden : nullptr),
        scale_(splat(1.0f / std::sqrt(squares / static_cast<float>(a.hidden) + a.eps))) {}

  SPLITPOINT_INLINE void pair(int64_t i, int) { store_pair<T>(norm_ + i, value(i)); }
  SPLITPOINT_INLINE void some(int64_t i, int64_t count) {
    store_some(norm_ + i, value_of_some(i, count), count);
  }

 protected:
  SPLITPOINT_INLINE Pair value(int64_t i) const {
    return load_pair<T>(sums_ + i) * scale_ * load_pair<T>(weight_ + i);
  }
  SPLITPOINT_INLINE Vec value_of_some(int64_t i, int64_t count) const {
    return load_some(sums_ + i, count) * scale_ * load_some(weight_ + i, count);
  }

  const R* sums_ = nullptr;
  const W* weight_ = nullptr;
  T* norm_ = nullptr;
  Vec scale_ = {};
};

}  // namespace splitpoint::SPLITPOINT_ISA
