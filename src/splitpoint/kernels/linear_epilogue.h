// What happens to the fp32 sums of a matrix product before they are stored.
#pragma once

#include "linear_vector.h"

namespace splitpoint::SPLITPOINT_ISA {

// How far ahead of its use a weight that is read once is fetched: at 40 GB/s, 12 KiB are 300 ns. It
// comes into the second-level cache, as a core waits for many more lines there than in the first
// (48 and 16 on Golden Cove), and from there on into the first a little before.
inline constexpr int64_t kAheadBytes = 12 * 1024;
inline constexpr int64_t kSoonBytes = 1024;

SPLITPOINT_INLINE Vec activated(Activation activation, Vec x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::silu: return silu(x);
    case Activation::gelu_tanh: return gelu_tanh(x);
    case Activation::gelu_erf: return gelu_erf(x);
  }
  return x;
}

// One register of columns of one row. Null pointers stand for what is not there.
template <class Y>
SPLITPOINT_INLINE Vec product(Vec sums, const float* scale, const Y* bias) {
  if (scale) sums *= load(scale);
  if (bias) sums += load(bias);
  return sums;
}

template <class Y>
SPLITPOINT_INLINE const Y* offset(const Y* from, int64_t by) {
  return from ? from + by : nullptr;
}

// What finish_row reads of a register of columns.
template <class Y>
struct Columns {
  const float* scale;
  const Y* bias;
};

template <class Y>
SPLITPOINT_INLINE Vec finished(const LinearArgs& a, const float* sums, const float* second_sums,
                               Columns<Y> first, Columns<Y> second, const Y* residual) {
  Vec out = activated(a.activation, product(load(sums), first.scale, first.bias));
  if (a.gated) out *= product(load(second_sums), second.scale, second.bias);
  if (residual) out += load(residual);
  return out;
}

// Copies what there is of a register into one that is padded with zeros.
template <class T>
struct Padded {
  T lanes[kLanes] = {};
  const T* pointer = nullptr;

  Padded(const T* from, int64_t count) {
    if (!from) return;
    for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
    pointer = lanes;
  }
};

template <class Y>
struct PaddedColumns {
  Padded<float> scale;
  Padded<Y> bias;

  PaddedColumns(Columns<Y> from, int64_t count)
      : scale(from.scale, count), bias(from.bias, count) {}
  Columns<Y> columns() const { return {scale.pointer, bias.pointer}; }
};

// Stores `count` columns of row t from column c on. `sums` (and, if gated, `second_sums`) hold
// their fp32 sums, readable up to a whole register beyond the last.
template <class Y>
inline void finish_row(const LinearArgs& a, const float* sums, const float* second_sums, int64_t t,
                       int64_t c, int64_t count) {
  Y* y = static_cast<Y*>(a.y) + t * a.y_stride + c;
  const auto columns = [&](const Product& p, int64_t i) -> Columns<Y> {
    return {offset(p.scale, c + i), offset(static_cast<const Y*>(p.bias), c + i)};
  };
  const Y* residual = offset(static_cast<const Y*>(a.residual), t * a.residual_stride + c);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(y + i, finished(a, sums + i, second_sums + i, columns(a.first, i), columns(a.second, i),
                          offset(residual, i)));
  }
  if (i < count) {
    const int64_t left = count - i;
    const PaddedColumns<Y> first(columns(a.first, i), left), second(columns(a.second, i), left);
    const Padded<Y> r(offset(residual, i), left);
    Y out[kLanes];
    store(out, finished(a, sums + i, second_sums + i, first.columns(), second.columns(), r.pointer));
    for (int64_t j = 0; j < left; ++j) y[i + j] = out[j];
  }
}

}  // namespace splitpoint::SPLITPOINT_ISA
