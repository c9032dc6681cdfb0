// Runs every kernel of every instruction set that this CPU has over many shapes, for the address
// and undefined-behaviour sanitizers: each matrix has a heap allocation of exactly its size.
// Results are compared with double sums as well, so that a kernel that does nothing is noticed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "amx_permission.h"
#include "sanitize.h"

using namespace splitpoint;

namespace {

struct Shape {
  int64_t t, n, k;
};

long runs = 0;

void check(const KernelTable& table, bool packed, const Shape& s, DType type, DType w_type,
           Activation activation, bool gated, bool extras) {
  const int64_t products = gated ? 2 : 1, rows = products * s.n;
  const int64_t gap = extras ? 5 : 0;
  // The last row ends where the allocation does.
  const int64_t x_stride = s.k + gap, r_stride = s.n + gap;
  const Buffer x(type, s.t ? (s.t - 1) * x_stride + s.k : 0), weight(w_type, rows * s.k);
  const Buffer scale(DType::f32, w_type == DType::i8 ? rows : 0);
  const Buffer bias(type, extras ? rows : 0);
  const Buffer residual(type, extras && s.t ? (s.t - 1) * r_stride + s.n : 0);
  Buffer y(type, s.t * s.n);
  const int64_t blocks = ceil_div(s.n, kBlock);

  LinearArgs a{};
  a.t = s.t, a.n = s.n, a.k = s.k;
  a.x = x.bytes.get(), a.x_stride = x_stride;
  a.residual = extras ? residual.bytes.get() : nullptr, a.residual_stride = r_stride;
  a.y = y.bytes.get(), a.y_stride = s.n;
  a.x_type = type, a.y_type = type, a.w_type = w_type, a.activation = activation, a.gated = gated;
  Buffer wide(DType::f32, 0);
  if (type == DType::bf16 && (!table.dots_bf16 || (!packed && w_type == DType::i8))) {
    wide = Buffer(DType::f32, s.t * s.k);
    for (int64_t t = 0; t < s.t; ++t) {
      table.widen(reinterpret_cast<const Bf16*>(x.bytes.get()) + t * x_stride,
                  reinterpret_cast<float*>(wide.bytes.get()) + t * s.k, s.k);
    }
    a.x = wide.bytes.get(), a.x_stride = s.k, a.x_type = DType::f32;
  }
  const int64_t stored_k = w_type == DType::f32 ? s.k : ceil_div(s.k, 2) * 2;
  const int64_t panels = blocks * kBlock * stored_k;
  std::vector<Buffer> laid_out;
  Product* const into[] = {&a.first, &a.second};
  for (int64_t i = 0; i < products; ++i) {
    const char* plain = weight.bytes.get() + i * s.n * s.k * size_of(w_type);
    laid_out.emplace_back(w_type, packed ? panels : 0);
    if (packed) table.pack({plain, laid_out[i].bytes.get(), s.n, s.k, w_type}, 0, blocks);
    into[i]->values = packed ? laid_out[i].bytes.get() : plain;
    if (scale.count) into[i]->scale = reinterpret_cast<const float*>(scale.bytes.get()) + i * s.n;
    if (extras) into[i]->bias = bias.bytes.get() + i * s.n * size_of(type);
  }
  // In four parts, as threads would.
  const auto kernel = packed ? table.packed : table.gemv;
  for (const auto [t0, t1] : {std::pair{int64_t{0}, s.t / 2}, std::pair{s.t / 2, s.t}}) {
    kernel(a, {t0, t1, 0, blocks / 2});
    kernel(a, {t0, t1, blocks / 2, blocks});
  }
  ++runs;

  for (int64_t t = 0; t < s.t; ++t) {
    for (int64_t c = 0; c < s.n; ++c) {
      double sums[2] = {};
      for (int half = 0; half < products; ++half) {
        const int64_t row = half * s.n + c;
        for (int64_t k = 0; k < s.k; ++k) sums[half] += x.at(t * x_stride + k) * weight.at(row * s.k + k);
        if (scale.count) sums[half] *= scale.at(row);
        if (extras) sums[half] += bias.at(row);
      }
      double value = sums[0];
      if (activation == Activation::silu) value /= 1 + std::exp(-value);
      if (activation == Activation::gelu_erf) value *= 0.5 * (1 + std::erf(value / std::sqrt(2.0)));
      if (activation == Activation::gelu_tanh) {
        const double u = 0.79788456080286536 * (value + 0.044715 * value * value * value);
        value *= 0.5 * (1 + std::tanh(u));
      }
      if (gated) value *= sums[1];
      if (extras) value += residual.at(t * r_stride + c);
      // Coarse: the property tests hold the derived bounds, these sums only catch nonsense.
      const double size = s.k * (w_type == DType::i8 ? 127.0 : 1.0) + 4;
      const double slack = (type == DType::bf16 ? 1e-2 : 1e-5) * (1 + std::fabs(value)) +
                           1e-6 * size * (1 + std::fabs(sums[0]) + std::fabs(sums[1]));
      if (!(std::fabs(y.at(t * s.n + c) - value) <= slack)) {
        std::printf("%s %s t %ld n %ld k %ld activation %d at (%ld, %ld): %g, expected %g\n",
                    table.name, packed ? "packed" : "gemv", static_cast<long>(s.t),
                    static_cast<long>(s.n), static_cast<long>(s.k), static_cast<int>(activation),
                    static_cast<long>(t), static_cast<long>(c), y.at(t * s.n + c), value);
        std::exit(1);
      }
    }
  }
}

// A 4-bit weight: any bits are one. Its values are read back by hand. It multiplies x, and then an x
// that is rounded to int8.
void check_int4(const KernelTable& table, const Shape& s, DType type, int64_t group,
                bool zero_points, bool wide_scales) {
  const int64_t blocks = ceil_div(s.n, kBlock), groups = s.k / group;
  const int64_t scale_bytes = (wide_scales ? 4 : 2) * kBlock;
  const int64_t head = scale_bytes + (zero_points ? kBlock : 0), bytes = head + group / 2 * kBlock;
  Buffer packed(DType::i8, blocks * groups * bytes);
  for (int64_t i = 0; i < blocks * groups; ++i) {
    char* scales = packed.bytes.get() + i * bytes;
    for (int64_t c = 0; c < kBlock; ++c) {
      if (wide_scales) {
        reinterpret_cast<float*>(scales)[c] = static_cast<float>(uniform());
      } else {
        reinterpret_cast<Bf16*>(scales)[c] = to_bf16(uniform());
      }
    }
    for (int64_t c = scale_bytes; c < head; ++c) packed.bytes[i * bytes + c] %= 8;
  }
  const Buffer x(type, s.t * s.k);
  Buffer y(type, s.t * s.n), wide(DType::f32, 0), x_sums(DType::f32, s.t * groups);
  Buffer whole(type, s.k * s.n), y_rounded(type, s.t * s.n), scales_of_x(DType::f32, s.t);
  const int64_t stride = ceil_div(s.k, 64) * 64;
  Buffer x_rounded(DType::i8, s.t * stride * (table.bytes_int4 ? 1 : 2));
  std::vector<int32_t> starts(s.t * s.k / 32);
  LinearArgs a{};
  a.t = s.t, a.n = s.n, a.k = s.k, a.x_stride = s.k, a.y_stride = s.n;
  a.group = group, a.zero_points = zero_points, a.wide_scales = wide_scales, a.w_type = DType::i4;
  a.x = x.bytes.get(), a.y = y.bytes.get(), a.x_type = type, a.y_type = type;
  a.first.values = packed.bytes.get();
  if (type == DType::bf16 && !table.dots_bf16) {
    wide = Buffer(DType::f32, s.t * s.k);
    table.widen(reinterpret_cast<const Bf16*>(x.bytes.get()),
                reinterpret_cast<float*>(wide.bytes.get()), s.t * s.k);
    a.x = wide.bytes.get(), a.x_type = DType::f32;
  }
  auto* sums = reinterpret_cast<float*>(x_sums.bytes.get());
  table.sum_groups(a, 0, s.t, sums);
  a.x_sums = zero_points ? sums : nullptr;
  table.packed(a, {0, s.t, 0, blocks / 2});
  table.packed(a, {0, s.t, blocks / 2, blocks});
  a.y = whole.bytes.get();
  table.unpack(a, 0, blocks);
  auto* x_scales = reinterpret_cast<float*>(scales_of_x.bytes.get());
  table.quantise({x.bytes.get(), s.t, s.k, type, s.k, x_rounded.bytes.get(), stride, group, x_scales,
                  starts.data()},
                 0, s.t);
  a.x = x_rounded.bytes.get(), a.x_stride = stride, a.x_type = DType::i8, a.x_scales = x_scales;
  a.x_starts = starts.data(), a.y = y_rounded.bytes.get();
  for (const auto& [t0, t1] : {std::pair{int64_t{0}, s.t / 2}, std::pair{s.t / 2, s.t}}) {
    if (t0 == t1) continue;
    table.packed(a, {t0, t1, 0, blocks / 2});
    table.packed(a, {t0, t1, blocks / 2, blocks});
  }
  runs += 2;
  for (int64_t c = 0; c < s.n; ++c) {
    std::vector<double> weight(s.k);
    for (int64_t k = 0; k < s.k; ++k) {
      const char* at = packed.bytes.get() + (c / kBlock * groups + k / group) * bytes;
      uint32_t word;
      std::memcpy(&word, at + head + k % group / 8 * 4 * kBlock + c % kBlock * 4, 4);
      const int shift = k % 8 / 2 * 4 + k % 2 * 16;
      double value = static_cast<int32_t>(word << (28 - shift)) >> 28;
      if (zero_points) value -= static_cast<signed char>(at[scale_bytes + c % kBlock]);
      weight[k] = value * (wide_scales ? reinterpret_cast<const float*>(at)[c % kBlock]
                                       : to_float(reinterpret_cast<const Bf16*>(at)[c % kBlock]));
      if (!(std::fabs(whole.at(k * s.n + c) - weight[k]) <= 1e-2 * std::fabs(weight[k]))) {
        std::printf("%s unpacks to %g, expected %g\n", table.name, whole.at(k * s.n + c), weight[k]);
        std::exit(1);
      }
    }
    for (int64_t t = 0; t < s.t; ++t) {
      double value = 0, size = 0, step = 0;
      for (int64_t k = 0; k < s.k; ++k) {
        value += x.at(t * s.k + k) * weight[k];
        step += std::fabs(weight[k]) / 250;  // no value of x is larger than 1
        size += std::fabs(x.at(t * s.k + k) * weight[k]) + 1e-3;
      }
      if (!(std::fabs(y.at(t * s.n + c) - value) <= 1e-2 * size)) {
        std::printf("%s int4 t %ld n %ld k %ld: %g, expected %g\n", table.name,
                    static_cast<long>(s.t), static_cast<long>(s.n), static_cast<long>(s.k),
                    y.at(t * s.n + c), value);
        std::exit(1);
      }
      if (!(std::fabs(y_rounded.at(t * s.n + c) - value) <= 1e-2 * size + step)) {
        std::printf("%s int4 of a rounded x t %ld n %ld k %ld: %g, expected %g\n", table.name,
                    static_cast<long>(s.t), static_cast<long>(s.n), static_cast<long>(s.k),
                    y_rounded.at(t * s.n + c), value);
        std::exit(1);
      }
    }
  }
}

}  // namespace

int main() {
  std::vector<const KernelTable*> tables{&kPortable};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (avx2) tables.push_back(&kAvx2);
  if (avx2 && __builtin_cpu_supports("avxvnni")) tables.push_back(&kAvx2Vnni);
  if (avx512) tables.push_back(&kAvx512);
  if (vnni) tables.push_back(&kAvx512Vnni);
  if (vnni && __builtin_cpu_supports("avx512bf16")) tables.push_back(&kAvx512Bf16);
  if (vnni && __builtin_cpu_supports("avx512bf16") && tiles_permitted()) tables.push_back(&kAmx);
#endif
  std::vector<Shape> shapes{{0, 5, 5},   {3, 0, 5},   {3, 5, 0},   {1, 1, 1},
                            {2, 70, 47}, {30, 33, 64}, {61, 17, 96}, {130, 40, 33},
                            {3, 33, 4100}, {60, 5, 8200}};
  for (int64_t t = 1; t <= 15; ++t) shapes.push_back({t, 20 + 3 * t, 2 * t + 29});
  for (int64_t n = 1; n <= 66; n += 5) shapes.push_back({5, n, 18 + n});
  for (int64_t k = 1; k <= 67; k += 3) shapes.push_back({4, 35, k});
  const DType types[][2] = {{DType::f32, DType::f32},
                            {DType::bf16, DType::bf16},
                            {DType::f32, DType::i8},
                            {DType::bf16, DType::i8}};
  for (const KernelTable* table : tables) {
    for (const Shape& shape : shapes) {
      for (const auto& [type, w_type] : types) {
        for (const bool packed : {false, true}) {
          const auto with = [&](Activation activation, bool gated, bool extras) {
            check(*table, packed, shape, type, w_type, activation, gated, extras);
          };
          with(Activation::none, false, false);
          with(Activation::none, runs % 4 == 0, true);
          with(Activation::silu, runs % 4 != 0, runs % 2 == 0);
          with(runs % 3 ? Activation::gelu_erf : Activation::gelu_tanh, runs % 5 == 0, runs % 2 == 1);
        }
      }
    }
    for (const int64_t group : {32, 64, 128}) {
      for (const int64_t t : {1, 2, 6, 7, 12, 13, 15, 115}) {
        for (const int64_t n : {1, 33, 70}) {
          for (const int64_t k : {group, 5 * group, int64_t{1152}}) {
            for (const DType type : {DType::f32, DType::bf16}) {
              check_int4(*table, {t, n, k}, type, group, t % 2 == n % 2, t % 3 == n % 3);
            }
          }
        }
      }
    }
    runs += check_int8(*table) + check_attention(*table) + check_cached(*table);
    std::printf("%s\n", table->name);
  }
  std::printf("%ld runs\n", runs);
}
