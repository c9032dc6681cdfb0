// What the torch operators of all kernels share: the instruction set in use, and torch's threads.
#pragma once

#include <c10/util/Exception.h>
#include <torch/csrc/stable/c/shim.h>

#include "linear_types.h"

namespace splitpoint {

// The kernels of the instruction set that was chosen, by default the best that this CPU has.
const KernelTable* kernels_in_use();

// torch's own intra-op threads, through its C interface: linking OpenMP here could bring a
// second runtime, with threads of its own, into the process.
template <class F>
void parallel(int64_t count, int64_t grain, const F& run) {
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  void* context = const_cast<void*>(static_cast<const void*>(&run));
  TORCH_CHECK(torch_parallel_for(0, count, grain, call, context) == 0,
              "splitpoint: a thread of a kernel failed");
}

// What a thread must have to do before a second one is worth waking, which takes some
// microseconds: as many bytes as memory delivers, or multiplications as a core does, meanwhile.
inline constexpr double kBytesWorthAThread = 200e3;
inline constexpr double kProductsWorthAThread = 1e6;

}  // namespace splitpoint
