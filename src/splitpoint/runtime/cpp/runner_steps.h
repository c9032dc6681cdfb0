// What a program of the runner consists of: its steps, what they call, and what is bound to them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "linear.h"
#include "runner_collective.h"

namespace splitpoint::runner {

using at::Tensor;

// --- kernels ---------------------------------------------------------------------------

// Inductor's kernels take pointers and 64-bit integers only, which all pass as 64-bit words.
using Word = uint64_t;
static_assert(sizeof(void*) == sizeof(Word));
constexpr size_t kMostArguments = 64;

// Of a piece: more is a mistake, and not worth the memory.
constexpr int32_t kMostSlots = 1 << 20;

using CallWords = void (*)(void*, const Word*);

template <size_t N>
void call_with(void* kernel, const Word* words) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    reinterpret_cast<void (*)(std::conditional_t<true, Word, decltype(I)>...)>(kernel)(words[I]...);
  }(std::make_index_sequence<N>{});
}

template <size_t... N>
constexpr std::array<CallWords, sizeof...(N)> callers(std::index_sequence<N...>) {
  return {call_with<N>...};
}

constexpr auto kCallers = callers(std::make_index_sequence<kMostArguments + 1>{});

inline void* kernel_of(const std::string& path, const std::string& name) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library, "a kernel cannot be loaded: ", dlerror());
  void* found = dlsym(library, name.c_str());
  TORCH_CHECK(found, path, " has no function '", name, "'");
  return found;  // the library stays: Python has it too
}

// --- steps -----------------------------------------------------------------------------

// What a step reads: an index into the frame, or ~index into what is bound, and behind that
// into the arguments of the call.
using Operand = int32_t;

enum class Kind : uint8_t {
  empty, view, sizes, dtype, align, kernel, op, linear, collective, free, bump
};

struct Step {
  Kind kind;
  at::ScalarType dtype = at::kFloat;
  Operand dst = 0, src = 0;
  int32_t first = 0, count = 0;  // in `words`: dimensions, kernel arguments or operands
  int32_t value = 0;             // of `values`, kernels, operators, layers, collectives or layouts
  int32_t text = -1;             // of `texts`
};

// One argument of an operator.
struct OpArgument {
  enum class Kind : uint8_t { constant, tensor, integer, tensors, optional_tensors, integers };
  Kind kind = Kind::constant;
  c10::IValue constant;
  std::vector<int32_t> items;  // operands, or indices of `values`; kNone for None
};

constexpr int32_t kNone = INT32_MIN;

struct Operator {
  c10::OperatorHandle handle;
  std::vector<OpArgument> arguments;
  std::vector<Operand> results;  // kNone where nobody wants it
  bool is_list;                  // one list of tensors
};

// A step of a piece as it is read, over numbered slots instead of operands.
struct PieceStep {
  Step step;                   // `dst` and `src` are slots, `first` is not used
  std::vector<int32_t> words;  // as those from `first` on, slots where operands will be
  std::optional<Operator> op;  // over slots
};

// A piece is read once and placed wherever it is called.
struct Piece {
  std::vector<int32_t> parameters, outputs;  // slots
  std::vector<PieceStep> steps;
  int32_t slots = 0;
};

using LinearPacked = std::vector<Tensor>(const Tensor&, at::TensorList, at::IntArrayRef,
                                         at::TensorList, at::TensorList,
                                         const std::optional<Tensor>&, std::string_view, bool, bool,
                                         bool);
using LinearGemv = std::vector<Tensor>(const Tensor&, at::TensorList, at::TensorList,
                                       at::TensorList, const std::optional<Tensor>&,
                                       std::string_view, bool);

// A linear layer of this package, all of whose weights are bound: called without boxing.
struct Linear {
  std::optional<c10::TypedOperatorHandle<LinearPacked>> packed;
  std::optional<c10::TypedOperatorHandle<LinearGemv>> gemv;
  Operand x, residual;  // kNone without one
  std::array<std::vector<Operand>, 3> lists;  // weights, scales, biases
  std::vector<int64_t> n;
  std::string activation;
  bool gated;
  bool batch_invariant = false, round_x = false;
  std::vector<Operand> results;
  std::vector<int32_t> layouts;  // of the results
};

// A linear layer with its weights. `ready` are the layers for an x of `type` and [..., k], where
// nothing but packed weights is read: these are the package's own copies, which never change
// their place. What a module holds is looked at in each call.
struct BoundLinear {
  std::array<std::vector<Tensor>, 3> lists;
  std::optional<LinearLayers> ready;
  at::ScalarType type = at::kFloat;
  int64_t k = 0;

  BoundLinear(const Linear& layer, const std::vector<Tensor>& tensors) {
    for (size_t i = 0; i < lists.size(); ++i) {
      for (const Operand operand : layer.lists[i]) lists[i].push_back(tensors[~operand]);
    }
    if (!layer.packed || !lists[1].empty() || !lists[2].empty()) return;
    const Tensor& weight = lists[0].at(0);  // [blocks, k, 32], or [blocks, k / 2, 32, 2]
    if (weight.dim() != 3 && weight.dim() != 4) return;
    if (weight.scalar_type() == at::kByte) return;  // 4 bits: any type of x fits
    type = weight.scalar_type();
    k = weight.size(1) * (weight.dim() == 4 ? 2 : 1);
    ready = linear_layers(type, k,
                          {lists[0], layer.n, lists[1], lists[2], layer.activation, layer.gated,
                           layer.batch_invariant, layer.round_x});
  }
};

// A collective of this package between values of the run.
struct CollectiveStep {
  Collective call;
  Operand x, residual, weight;    // kNone where there is none
  std::array<Operand, 2> results; // the norm and the sum, or the sum; kNone where nobody wants it
  bool last = false;              // nobody reads x and the residual after it
};

// The tensors of the module that a program reads. A new one is made when they change; calls
// that run meanwhile go on with theirs.
struct Binding {
  std::vector<Tensor> tensors;
  std::vector<BoundLinear> linear;
};

}  // namespace splitpoint::runner
