// Runs the kernels of attention over a paged cache over many shapes; see sanitize.cpp. What no
// query may read of the cache holds NaN.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cached_attention_types.h"
#include "sanitize.h"

namespace splitpoint {
namespace {

struct Shape {
  int64_t kv_heads, group, tokens, held, size, block_tokens, window;
  float softcap;
};

void put(Buffer& buffer, int64_t i, float value) {
  if (buffer.type == DType::f32) reinterpret_cast<float*>(buffer.bytes.get())[i] = value;
  if (buffer.type == DType::bf16) reinterpret_cast<Bf16*>(buffer.bytes.get())[i] = to_bf16(value);
}

void check(const KernelTable& table, const Shape& s, DType type, int64_t gap) {
  const int64_t heads = s.kv_heads * s.group, length = s.held + s.tokens;
  const int64_t used = ceil_div(length, s.block_tokens), blocks = used + 1;
  // Rows lie `gap` values apart; the last one ends where the allocation does.
  const Buffer q(type, heads * s.tokens * (s.size + gap) - gap);
  const int64_t block_values = s.kv_heads * s.block_tokens * s.size;
  Buffer k(type, blocks * block_values), v(type, blocks * block_values);
  Buffer y(type, heads * s.tokens * s.size);
  const std::unique_ptr<int32_t[]> numbers(new int32_t[used]);  // the first block is nobody's
  for (int64_t i = 0; i < used; ++i) numbers[i] = static_cast<int32_t>(used - i);

  CachedArgs a{};
  a.q = q.bytes.get(), a.q_head = s.tokens * (s.size + gap), a.q_row = s.size + gap;
  a.keys = k.bytes.get(), a.values = v.bytes.get(), a.y = y.bytes.get();
  a.kv_heads = s.kv_heads, a.group = s.group, a.size = s.size, a.block_tokens = s.block_tokens;
  a.window = s.window, a.scale = 0.3f, a.softcap = s.softcap, a.type = type;
  const auto at = [&](int64_t head, int64_t position) {
    return numbers[position / s.block_tokens] * block_values +
           (head * s.block_tokens + position % s.block_tokens) * s.size;
  };
  const int64_t first = first_seen(a.window, s.held);
  for (Buffer* each : {&k, &v}) {
    for (int64_t i = 0; i < each->count; ++i) put(*each, i, NAN);
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      for (int64_t j = first; j < length; ++j) {
        for (int64_t e = 0; e < s.size; ++e) put(*each, at(h, j) + e, uniform());
      }
    }
  }
  CachedSequence sequence{};
  sequence.tokens = s.tokens, sequence.held = s.held, sequence.blocks = numbers.get();
  plan(a, sequence);
  const auto floats = [](int64_t count) {
    return static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t{64}));
  };
  float* const scratch = floats(scratch_floats(a));
  float* const partials = floats(partial_floats(a, sequence));
  sequence.partials = partials;
  for (int64_t item = 0; item < sequence.items; ++item) {
    attend_cached(table, a, sequence, item, reinterpret_cast<char*>(scratch));
  }
  for (int64_t h = 0; sequence.splits > 1 && h < s.kv_heads; ++h) table.merge_few(a, sequence, h);
  ::operator delete[](scratch, std::align_val_t{64});
  ::operator delete[](partials, std::align_val_t{64});

  std::vector<double> weights(length);
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < s.tokens; ++i) {
      const int64_t own = s.held + i;
      const int64_t begin = s.window && own >= s.window ? own - s.window + 1 : 0;
      double total = 0;
      for (int64_t j = begin; j <= own; ++j) {
        double dot = 0;
        for (int64_t e = 0; e < s.size; ++e) {
          dot += q.at(h * a.q_head + i * a.q_row + e) * k.at(at(h / s.group, j) + e);
        }
        dot *= 0.3;
        if (s.softcap > 0) dot = s.softcap * std::tanh(dot / s.softcap);
        total += weights[j] = std::exp(dot);
      }
      for (int64_t e = 0; e < s.size; ++e) {
        double value = 0;
        for (int64_t j = begin; j <= own; ++j) value += weights[j] * v.at(at(h / s.group, j) + e);
        value /= total;
        const double made = y.at((i * heads + h) * s.size + e);
        // Coarse, as in sanitize.cpp.
        const double slack = (type == DType::bf16 ? 2e-2 : 1e-4) * (1 + std::fabs(value));
        if (!(std::fabs(made - value) <= slack)) {
          std::printf("%s cached attention of %ld x %ld heads, %ld tokens after %ld, size %ld: %g at "
                      "(%ld, %ld, %ld), expected %g\n",
                      table.name, static_cast<long>(s.kv_heads), static_cast<long>(s.group),
                      static_cast<long>(s.tokens), static_cast<long>(s.held),
                      static_cast<long>(s.size), made, static_cast<long>(h), static_cast<long>(i),
                      static_cast<long>(e), value);
          std::exit(1);
        }
      }
    }
  }
}

}  // namespace

long check_cached(const KernelTable& table) {
  std::vector<Shape> shapes{{1, 1, 1, 0, 8, 16, 0, 0},      {3, 3, 1, 600, 64, 32, 0, 0},
                            {2, 4, 2, 300, 72, 48, 0, 3},   {1, 8, 1, 530, 40, 64, 100, 0},
                            {2, 3, 60, 70, 64, 32, 0, 0},   {1, 1, 150, 5, 72, 16, 20, 0},
                            {1, 4, 13, 33, 256, 128, 0, 9}, {1, 1, 1, 90, 256, 16, 0, 0}};
  for (int64_t n = 1; n <= 40; n += 3) {
    shapes.push_back({1 + n % 2, 1 + n % 5, n, 2 * n + 3, 8 * (1 + n % 13), 16 * (1 + n % 3),
                      n % 4 ? 0 : n, 0});
    shapes.push_back({1, 1 + n % 8, 1, 7 * n, 8 * (1 + n % 13), 16 * (1 + n % 3), n % 4 ? 0 : n, 0});
  }
  long runs = 0;
  for (const Shape& shape : shapes) {
    for (const DType type : {DType::f32, DType::bf16}) {
      check(table, shape, type, runs % 3 == 0 ? 3 : 0);
      ++runs;
    }
  }
  return runs;
}

}  // namespace splitpoint
