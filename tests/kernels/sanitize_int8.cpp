// Linear layers over int8 weights in groups of four k's, x rounded to int8, for the sanitizers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "sanitize.h"

namespace splitpoint {

namespace {

void check(const KernelTable& table, int64_t t, int64_t n, int64_t k, DType type, bool gated,
           bool extras) {
  const int64_t products = gated ? 2 : 1, groups = ceil_div(k, 4), blocks = ceil_div(n, kBlock);
  const int64_t x_stride = k + (extras ? 5 : 0), stride = ceil_div(k, 64) * 64;
  const Buffer x(type, t ? (t - 1) * x_stride + k : 0), weight(DType::i8, products * n * k);
  const Buffer scale(DType::f32, products * n), bias(type, extras ? products * n : 0);
  const Buffer residual(type, extras ? t * n : 0);
  Buffer y(type, t * n), row_scales(DType::f32, t);
  Buffer rounded(DType::i8, t * stride * (table.dots_int8 ? 1 : 2));
  std::vector<int32_t> starts(t);
  std::vector<Buffer> laid_out;
  for (int64_t p = 0; p < products; ++p) {
    laid_out.emplace_back(DType::i8, blocks * groups * kBlock * 4);
    char* to = laid_out.back().bytes.get();
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < groups; ++i) {
        for (int64_t c = 0; c < kBlock; ++c) {
          for (int64_t j = 0; j < 4; ++j) {
            const int64_t row = b * kBlock + c, at = 4 * i + j;
            const bool there = row < n && at < k;
            *to++ = there ? weight.bytes[(p * n + row) * k + at] : 0;
          }
        }
      }
    }
  }
  auto* scales = reinterpret_cast<float*>(row_scales.bytes.get());
  table.quantise({x.bytes.get(), t, x_stride, type, k, rounded.bytes.get(), stride, 0, scales,
                  starts.data()},
                 0, t);
  LinearArgs a{};
  a.t = t, a.n = n, a.k = 4 * groups, a.y = y.bytes.get(), a.y_stride = n;
  a.x = rounded.bytes.get(), a.x_stride = stride, a.x_scales = scales, a.x_starts = starts.data();
  a.x_type = DType::i8, a.w_type = DType::quads, a.y_type = type, a.gated = gated;
  a.residual = extras ? residual.bytes.get() : nullptr, a.residual_stride = n;
  Product* const into[] = {&a.first, &a.second};
  for (int64_t p = 0; p < products; ++p) {
    into[p]->values = laid_out[p].bytes.get();
    into[p]->scale = reinterpret_cast<const float*>(scale.bytes.get()) + p * n;
    if (extras) into[p]->bias = bias.bytes.get() + p * n * size_of(type);
  }
  for (const auto [t0, t1] : {std::pair{int64_t{0}, t / 2}, std::pair{t / 2, t}}) {
    table.packed(a, {t0, t1, 0, blocks / 2, nullptr});
    table.packed(a, {t0, t1, blocks / 2, blocks, nullptr});
  }
  for (int64_t r = 0; r < t; ++r) {
    double largest = 0;
    for (int64_t i = 0; i < k; ++i) largest = std::fmax(largest, std::fabs(x.at(r * x_stride + i)));
    for (int64_t c = 0; c < n; ++c) {
      double sums[2] = {};
      for (int64_t p = 0; p < products; ++p) {
        const int64_t row = p * n + c;
        for (int64_t i = 0; i < k; ++i) sums[p] += x.at(r * x_stride + i) * weight.at(row * k + i);
        sums[p] = sums[p] * scale.at(row) + (extras ? bias.at(row) : 0);
      }
      double value = gated ? sums[0] * sums[1] : sums[0];
      if (extras) value += residual.at(r * n + c);
      // Coarse: half a step of x times every weight; the property tests hold the derived bounds.
      const double off = largest / 250 * 127 * static_cast<double>(k) + 1e-3;
      const double slack = off * (1 + off + std::fabs(sums[0]) + std::fabs(sums[1])) +
                           1e-2 * std::fabs(value);
      if (!(std::fabs(y.at(r * n + c) - value) <= slack)) {
        std::printf("%s int8 t %ld n %ld k %ld at (%ld, %ld): %g, expected %g\n", table.name,
                    static_cast<long>(t), static_cast<long>(n), static_cast<long>(k),
                    static_cast<long>(r), static_cast<long>(c), y.at(r * n + c), value);
        std::exit(1);
      }
    }
  }
}

}  // namespace

long check_int8(const KernelTable& table) {
  long runs = 0;
  for (const int64_t t : {0, 1, 2, 5, 6, 7, 13, 14, 15, 29, 115}) {
    for (const int64_t n : {0, 1, 33, 70}) {
      for (const int64_t k : {0, 1, 3, 4, 17, 63, 64, 65, 515, 8200}) {
        if (k > 515 && t > 15) continue;  // slices of k are reached with fewer rows
        for (const DType type : {DType::f32, DType::bf16}) {
          check(table, t, n, k, type, runs % 3 == 0, runs % 2 == 0);
          ++runs;
        }
      }
    }
  }
  check(table, 60, 5, 16400, DType::bf16, true, true);
  return runs + 1;
}

}  // namespace splitpoint
