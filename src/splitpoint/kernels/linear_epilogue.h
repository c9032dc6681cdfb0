// What happens to the fp32 sums of a matrix product before they are stored.
#pragma once

#include "linear_vector.h"

namespace splitpoint::SPLITPOINT_ISA {

// How far ahead of its use a weight that is read once is fetched: at 40 GB/s, 12 KiB are 300 ns.
inline constexpr int64_t kAheadBytes = 12 * 1024;

// One register of columns of one row: (sums * scale + bias), activated, plus the residual.
// Null pointers stand for what is not there.
template <class Y>
SPLITPOINT_INLINE Vec activated(Activation activation, Vec sums, const float* scale,
                                const Y* bias) {
  if (scale) sums *= load(scale);
  if (bias) sums += load(bias);
  if (activation == Activation::gelu_tanh) return gelu_tanh(sums);
  if (activation == Activation::gelu_erf) return gelu_erf(sums);
  return sums;
}

template <class Y>
SPLITPOINT_INLINE const Y* offset(const Y* from, int64_t by) {
  return from ? from + by : nullptr;
}

template <class Y>
SPLITPOINT_INLINE Vec finished(Activation activation, const float* sums, const float* up_sums,
                               const float* scale, const float* up_scale, const Y* bias,
                               const Y* up_bias, const Y* residual) {
  Vec out = activated(activation, load(sums), scale, bias);
  if (activation == Activation::silu_mul) {
    out = silu(out) * activated(Activation::none, load(up_sums), up_scale, up_bias);
  }
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

// Stores `count` columns of row t from column c on. `sums` (and, with silu_mul, `up_sums`)
// hold their fp32 sums, readable up to a whole register beyond the last.
template <class Y>
inline void finish_row(const LinearArgs& a, const float* sums, const float* up_sums, int64_t t,
                       int64_t c, int64_t count) {
  Y* y = static_cast<Y*>(a.y) + t * a.y_stride + c;
  const float* scale = offset(a.scale, c);
  const float* up_scale = offset(a.scale, a.n + c);
  const Y* bias = offset(static_cast<const Y*>(a.bias), c);
  const Y* up_bias = offset(static_cast<const Y*>(a.bias), a.n + c);
  const Y* residual = offset(static_cast<const Y*>(a.residual), t * a.residual_stride + c);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(y + i, finished(a.activation, sums + i, up_sums + i, offset(scale, i),
                          offset(up_scale, i), offset(bias, i), offset(up_bias, i),
                          offset(residual, i)));
  }
  if (i < count) {
    const int64_t left = count - i;
    const bool two = a.activation == Activation::silu_mul;
    const Padded<float> s(offset(scale, i), left);
    const Padded<float> us(two ? offset(up_scale, i) : nullptr, left);
    const Padded<Y> b(offset(bias, i), left);
    const Padded<Y> ub(two ? offset(up_bias, i) : nullptr, left);
    const Padded<Y> r(offset(residual, i), left);
    Y out[kLanes];
    store(out, finished(a.activation, sums + i, up_sums + i, s.pointer, us.pointer, b.pointer,
                        ub.pointer, r.pointer));
    for (int64_t j = 0; j < left; ++j) y[i + j] = out[j];
  }
}

}  // namespace splitpoint::SPLITPOINT_ISA
