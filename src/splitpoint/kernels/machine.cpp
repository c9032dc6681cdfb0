// Which instruction set is used, and what the machine can do: reading memory, multiplying.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>
#include <string>
#include <string_view>
#include <vector>

#include "amx_permission.h"
#include "glue.h"

namespace splitpoint {
namespace {

using at::Tensor;

// --- the instruction set ---------------------------------------------------------------

struct Candidate {
  const KernelTable* table;
  bool runs;
};

// Best first. __builtin_cpu_supports also asks whether the system saves the registers.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = [] {
    std::vector<Candidate> found;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    // Every CPU with dot products of bf16 has those of int8 too.
    const bool dots = avx512 && __builtin_cpu_supports("avx512bf16") &&
                      __builtin_cpu_supports("avx512vnni");
    found.push_back({&kAmx, dots && tiles_permitted()});
    found.push_back({&kAvx512Bf16, dots});
    found.push_back({&kAvx512Vnni, avx512 && __builtin_cpu_supports("avx512vnni")});
    found.push_back({&kAvx512, avx512});
    found.push_back({&kAvx2Vnni, avx2 && __builtin_cpu_supports("avxvnni")});
    found.push_back({&kAvx2, avx2});
#endif
    found.push_back({&kPortable, true});
    return found;
  }();
  return all;
}

const KernelTable* best() {
  for (const Candidate& each : candidates()) {
    if (each.runs) return each.table;
  }
  return &kPortable;
}

std::atomic<const KernelTable*>& chosen() {
  static std::atomic<const KernelTable*> table{best()};
  return table;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& each : candidates()) {
    if (each.runs) names.emplace_back(each.table->name);
  }
  return names;
}

// "" asks which one is in use, "best" and a name choose one.
std::string instruction_set(std::string_view name) {
  if (name == "best") chosen() = best();
  if (!name.empty() && name != "best") {
    const KernelTable* found = nullptr;
    for (const Candidate& each : candidates()) {
      if (name == each.table->name && each.runs) found = each.table;
    }
    TORCH_CHECK_VALUE(found, "this CPU has no instruction set named '", name, "'");
    chosen() = found;
  }
  return chosen().load()->name;
}

// Multiplies in the registers of all threads, for measuring what arithmetic can do; returns how many
// operations that were.
int64_t multiply_registers(bool bf16, int64_t steps) {
  const KernelTable* table = kernels_in_use();
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  std::atomic<int64_t> operations{0};
  parallel(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sums[2] = {0, 1};
      operations += table->multiply(bf16 ? DType::bf16 : DType::f32, steps, sums);
    }
  });
  return operations;
}

// Reads a tensor's memory in all threads, for measuring bandwidth; the result is of no use.
int64_t read_memory(const Tensor& data) {
  TORCH_CHECK_VALUE(data.is_contiguous(), "data must be contiguous");
  const KernelTable* table = kernels_in_use();
  const auto* from = static_cast<const char*>(data.const_data_ptr());
  std::atomic<uint32_t> total{0};
  parallel(static_cast<int64_t>(data.nbytes()), 1 << 20, [&](int64_t begin, int64_t end) {
    total ^= table->read(from + begin, end - begin);
  });
  return total;
}

}  // namespace

const KernelTable* kernels_in_use() { return chosen().load(std::memory_order_relaxed); }

TORCH_LIBRARY_FRAGMENT(splitpoint, m) {
  m.def("read_memory(Tensor data) -> int", {at::Tag::pt2_compliant_tag});
  m.def("multiply_registers(bool bf16, int steps) -> int", multiply_registers);
  m.def("instruction_sets() -> str[]", instruction_sets);
  m.def("instruction_set(str name) -> str", instruction_set);
}

TORCH_LIBRARY_IMPL(splitpoint, CPU, m) { m.impl("read_memory", read_memory); }

}  // namespace splitpoint
