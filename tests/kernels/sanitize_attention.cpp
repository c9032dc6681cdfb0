// Runs the attention kernel of an instruction set over many shapes; see sanitize.cpp.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "attention_wide_types.h"
#include "sanitize.h"

namespace splitpoint {
namespace {

struct Shape {
  int64_t heads, group, queries, keys, size, value_size;
};

// Rows lie `gap` values apart; the last one ends where the allocation does.
Strides strides_for(int64_t heads, int64_t rows, int64_t size, int64_t gap) {
  return {heads * rows * (size + gap), rows * (size + gap), size + gap};
}
int64_t count_of(int64_t heads, int64_t rows, int64_t size, int64_t gap) {
  return heads && rows ? 2 * heads * rows * (size + gap) - gap : 0;
}

void run_rowwise(const KernelTable& table, const AttentionArgs& a) {
  // In two parts, as threads would.
  const int64_t items = attention_items(a);
  for (const auto [begin, end] : {std::pair{int64_t{0}, items / 2}, std::pair{items / 2, items}}) {
    const std::unique_ptr<float[]> scores(new float[kQueryRows * score_stride(a.keys)]);
    table.attend(a, {begin, end, scores.get()});
  }
}

void run_blockwise(const KernelTable& table, const AttentionArgs& a) {
  const int64_t bytes = wide_floats(a.size, a.value_size) * static_cast<int64_t>(sizeof(float));
  void* const scratch = ::operator new[](bytes, std::align_val_t{64});
  for (int64_t batch = 0; batch < a.batches; ++batch) {
    const WideArgs wide = wide_args(a, batch);
    for (int64_t item = 0; item < wide_items(wide); ++item) {
      table.attend_wide(wide, item, static_cast<char*>(scratch));
    }
  }
  ::operator delete[](scratch, std::align_val_t{64});
}

void check(const KernelTable& table, const Shape& s, DType type, Mask mask_type, bool causal,
           int64_t gap, bool blockwise) {
  const int64_t heads = s.heads * s.group;
  const Buffer q(type, count_of(heads, s.queries, s.size, gap));
  const Buffer k(type, count_of(s.heads, s.keys, s.size, gap));
  const Buffer v(type, count_of(s.heads, s.keys, s.value_size, gap));
  const DType types[] = {DType::i8, DType::i8, DType::f32, DType::bf16};
  const int64_t mask_stride = gap ? 2 : 1, row = (s.keys - 1) * mask_stride + 1;
  Buffer mask(types[static_cast<int>(mask_type)],
              mask_type != Mask::none && s.keys ? s.queries * row : 0);
  if (mask_type == Mask::boolean) {
    for (int64_t i = 0; i < mask.count; ++i) mask.bytes[i] = uniform() > -0.4f;
  }
  Buffer y(type, 2 * heads * s.queries * s.value_size);
  AttentionArgs a{};
  a.q = q.bytes.get(), a.k = k.bytes.get(), a.v = v.bytes.get(), a.y = y.bytes.get();
  a.mask = mask_type == Mask::none ? nullptr : mask.bytes.get();
  a.q_strides = strides_for(heads, s.queries, s.size, gap);
  a.k_strides = strides_for(s.heads, s.keys, s.size, gap);
  a.v_strides = strides_for(s.heads, s.keys, s.value_size, gap);
  a.y_strides = strides_for(heads, s.queries, s.value_size, 0);
  a.mask_strides = {0, 0, row}, a.mask_stride = mask_stride;
  a.batches = 2, a.kv_heads = s.heads, a.group = s.group, a.queries = s.queries, a.keys = s.keys;
  a.size = s.size, a.value_size = s.value_size, a.scale = 0.3f, a.type = type;
  a.mask_type = mask_type, a.causal = causal;
  blockwise ? run_blockwise(table, a) : run_rowwise(table, a);

  std::vector<double> weights(s.keys);
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < s.queries; ++i) {
        const auto at = [&](const Strides& x, int64_t head, int64_t r) {
          return b * x.batch + head * x.head + r * x.row;
        };
        double total = 0;
        for (int64_t j = 0; j < s.keys; ++j) {
          double dot = 0;
          for (int64_t e = 0; e < s.size; ++e) {
            dot += q.at(at(a.q_strides, h, i) + e) * k.at(at(a.k_strides, h / s.group, j) + e);
          }
          dot *= 0.3;
          const double m = mask_type == Mask::none ? 1 : mask.at(i * row + j * mask_stride);
          if (mask_type == Mask::f32 || mask_type == Mask::bf16) dot += m;
          const bool hidden = (mask_type == Mask::boolean && m == 0) || (causal && j > i);
          weights[j] = hidden ? 0 : std::exp(dot);
          total += weights[j];
        }
        for (int64_t e = 0; e < s.value_size; ++e) {
          double value = 0;
          for (int64_t j = 0; j < s.keys; ++j) {
            value += weights[j] * v.at(at(a.v_strides, h / s.group, j) + e);
          }
          value = total == 0 ? 0 : value / total;
          const double made = y.at(at(a.y_strides, h, i) + e);
          // Coarse, as in sanitize.cpp.
          const double slack = (type == DType::bf16 ? 2e-2 : 1e-4) * (1 + std::fabs(value));
          if (!(std::fabs(made - value) <= slack)) {
            std::printf("%s %s attention of %ld x %ld heads, %ld queries, %ld keys, size %ld: %g at "
                        "(%ld, %ld, %ld), expected %g\n",
                        table.name, blockwise ? "blockwise" : "rowwise",
                        static_cast<long>(s.heads), static_cast<long>(s.group),
                        static_cast<long>(s.queries), static_cast<long>(s.keys),
                        static_cast<long>(s.size), made, static_cast<long>(h),
                        static_cast<long>(i), static_cast<long>(e), value);
            std::exit(1);
          }
        }
      }
    }
  }
}

}  // namespace

long check_attention(const KernelTable& table) {
  std::vector<Shape> shapes{{1, 1, 1, 1, 1, 1},   {2, 3, 5, 0, 8, 8},   {3, 1, 4, 16, 64, 64},
                            {1, 4, 3, 33, 80, 72}, {2, 2, 9, 70, 96, 40}, {1, 1, 1, 300, 128, 128}};
  for (int64_t n = 1; n <= 40; n += 3) {
    shapes.push_back({1, 1 + n % 3, n % 7 + 1, n, 2 * n + 3, n + 1});
    if (n % 2) shapes.push_back({1, 1 + n % 3, 3 * n, 3 * n, 8 * (1 + n % 9), 8 * (1 + n % 8)});
  }
  long runs = 0;
  for (const Shape& shape : shapes) {
    for (const DType type : {DType::f32, DType::bf16}) {
      for (const Mask mask : {Mask::none, Mask::boolean, Mask::f32, Mask::bf16}) {
        for (const bool blockwise : {false, true}) {
          if (blockwise && !(fits_wide(shape.size) && fits_wide(shape.value_size))) continue;
          check(table, shape, type, mask, runs % 2 == 1, runs % 3 == 0 ? 3 : 0, blockwise);
          ++runs;
        }
      }
    }
  }
  return runs;
}

}  // namespace splitpoint
