// The kernels of every instruction set over buffers of exactly the size they may touch: what an
// address sanitizer must find nothing in. Prints the instruction sets and the number of runs.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "norm_types.h"

using namespace splitpoint;

namespace {

// Exactly as long as said, at an address that is a multiple of the element's size only.
class Buffer {
 public:
  explicit Buffer(int64_t bytes, int64_t item = 4)
      : memory_(static_cast<char*>(std::malloc(bytes + item))), data_(memory_ + item) {
    std::memset(data_, 0x3c, bytes);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }
  template <class T = char>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char* memory_;
  char* data_;
};

long runs = 0;

void fused(const NormTable& table, Element element, int residual, Quant quant, int ranks,
           int64_t hidden) {
  constexpr int64_t kRows = 3;
  const int64_t item = bytes_of(element), count = kRows * hidden;
  std::vector<Buffer*> inputs;
  FusedArgs a{};
  for (int rank = 0; rank < ranks; ++rank) {
    inputs.push_back(new Buffer(count * item, item));
    a.sources[rank] = inputs.back()->as();
  }
  const int64_t kept_item = residual == 2 ? 4 : item;
  Buffer residual_in(count * kept_item, kept_item), kept(count * kept_item, kept_item);
  Buffer norm(count * item, item), weight(hidden * 4), narrow(hidden * item, item);
  Buffer quantised(quant == Quant::nvfp4 ? count / 2 : count, 1);
  Buffer scales(quant == Quant::nvfp4 ? count / kFp4Block : kRows * 4);
  a.ranks = ranks;
  a.residual = residual ? residual_in.as() : nullptr;
  a.weight = weight.as();
  a.norm = norm.as();
  a.residual_out = kept.as();
  if (quant != Quant::none) {
    a.quantised = quantised.as<uint8_t>();
    a.scales = scales.as();
  }
  a.hidden = hidden, a.eps = 1e-6f, a.quant_scale = 0.5f;
  a.input = element, a.residual_type = residual == 2 ? Element::f32 : element, a.quant = quant;
  table.fused(a, 0, kRows);
  if (residual < 2) table.move(a, 0, kRows);
  a.weight = narrow.as(), a.weight_type = element;
  table.fused(a, 0, kRows);
  if (quant != Quant::none) {
    a.norm = nullptr, a.residual_out = nullptr;
    table.fused(a, 0, kRows);
  }
  SumArgs s{};
  std::memcpy(s.sources, a.sources, sizeof s.sources);
  s.ranks = ranks, s.out = norm.as(), s.element = element;
  table.sum(s, 0, count);
  table.sum(s, count / 3, count);
  table.add_bias(inputs[0]->as(), element, 1.0f, weight.as<float>(), hidden);
  for (Buffer* each : inputs) delete each;
  ++runs;
}

void copies(const NormTable& table) {
  for (const int64_t bytes : {0, 1, 63, 64, 65, 255, 1000, 4099}) {
    for (const int64_t shift : {1, 2, 31, 64}) {
      Buffer from(bytes, 2), to(bytes + shift, 1);
      std::memset(from.as(), static_cast<int>(bytes + shift), bytes);
      table.copy_past_caches(to.as() + shift, from.as(), bytes);
      if (std::memcmp(to.as() + shift, from.as(), bytes) != 0) std::abort();
      ++runs;
    }
  }
}

void all(const NormTable& table) {
  std::printf("%s\n", table.name);
  copies(table);
  for (const Element element : {Element::f32, Element::bf16, Element::f16}) {
    for (const Quant quant : {Quant::none, Quant::fp8_static, Quant::fp8_token, Quant::nvfp4}) {
      for (const int64_t hidden : {1, 7, 16, 33, 64, 77, 240, 1008}) {
        if (quant == Quant::nvfp4 && hidden % kFp4Block) continue;
        for (int residual = 0; residual < 3; ++residual) {
          if (residual == 2 && element == Element::f32) continue;
          for (const int ranks : {1, 2, 3}) fused(table, element, residual, quant, ranks, hidden);
        }
      }
    }
  }
}

}  // namespace

int main() {
  all(kNormPortable);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) all(kNormAvx2);
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    all(kNormAvx512);
    if (__builtin_cpu_supports("avx512bf16")) all(kNormAvx512Bf16);
  }
#endif
  std::printf("%ld runs\n", runs);
}
