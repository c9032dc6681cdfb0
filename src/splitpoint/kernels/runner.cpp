// Runs the steps of a compiled model without Python: allocate, view, call a kernel, call an
// operator. The steps come as Python lists (compilers/steps.py, graph/native.py); here they
// become one flat list over a frame of tensors, and a call of the program is one call from
// Python, which holds the GIL only to take the arguments and to give back the results.
#ifdef SPLITPOINT_PYTHON
#include <torch/csrc/jit/python/pybind_utils.h>  // first: it includes Python.h

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>
#include <dlfcn.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/inductor/inductor_ops.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace splitpoint {
namespace {

namespace py = pybind11;
using at::Tensor;

// --- integers that follow from the size ------------------------------------------------

// An expression in postfix: numbers, "size", and operators, separated by spaces.
struct Expression {
  struct Token {
    char what;  // 'n' for a number, 's' for the size, or an operator
    int64_t number;
  };
  std::vector<Token> tokens;

  explicit Expression(const std::string& text) {
    int64_t depth = 0;
    for (size_t at = 0; at < text.size();) {
      size_t end = text.find(' ', at);
      if (end == std::string::npos) end = text.size();
      const std::string word = text.substr(at, end - at);
      const bool number = word.size() > 1 || (word[0] >= '0' && word[0] <= '9');
      if (word == "s") {
        tokens.push_back({'s', 0});
      } else if (number) {
        tokens.push_back({'n', std::stoll(word)});
      } else {
        TORCH_CHECK_VALUE(std::string("+-*/%<>").find(word) != std::string::npos,
                          "an expression has ", word);
        tokens.push_back({word[0], 0});
        depth -= 2;
        TORCH_CHECK_VALUE(depth >= 0, "an expression lacks a value: ", text);
      }
      ++depth;
      at = end + 1;
    }
    TORCH_CHECK_VALUE(depth == 1 && tokens.size() <= kDeepest, "not an expression: ", text);
  }

  static constexpr size_t kDeepest = 256;

  // As Python computes it: division rounds down, and a remainder has the divisor's sign.
  int64_t operator()(int64_t size) const {
    std::array<int64_t, kDeepest> stack;
    size_t top = 0;
    for (const Token& token : tokens) {
      if (token.what == 'n' || token.what == 's') {
        stack[top++] = token.what == 'n' ? token.number : size;
        continue;
      }
      const int64_t b = stack[--top], a = stack[--top];
      int64_t& result = stack[top++];
      switch (token.what) {
        case '+': result = a + b; break;
        case '-': result = a - b; break;
        case '*': result = a * b; break;
        case '<': result = std::min(a, b); break;
        case '>': result = std::max(a, b); break;
        default: {
          TORCH_CHECK(b != 0, "integer division or modulo by zero in a size");
          int64_t quotient = a / b;
          if (a % b != 0 && (a < 0) != (b < 0)) --quotient;
          result = token.what == '/' ? quotient : a - quotient * b;
        }
      }
    }
    return stack[0];
  }
};

// --- kernels ---------------------------------------------------------------------------

// Inductor's kernels take pointers and 64-bit integers only, which all pass as 64-bit words.
using Word = uint64_t;
static_assert(sizeof(void*) == sizeof(Word));
constexpr size_t kMostArguments = 64;

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

void* kernel_of(const std::string& path, const std::string& name) {
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

enum class Kind : uint8_t { empty, view, sizes, align, kernel, op, linear, free, bump };

struct Step {
  Kind kind;
  at::ScalarType dtype = at::kFloat;
  Operand dst = 0, src = 0;
  int32_t first = 0, count = 0;  // in `words`: dimensions, kernel arguments or operands
  int32_t value = 0;             // of `values`; of kernels, operators or linear layers
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

using LinearPacked = std::vector<Tensor>(const Tensor&, at::TensorList, at::IntArrayRef,
                                         at::TensorList, at::TensorList,
                                         const std::optional<Tensor>&, std::string_view, bool);
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
  std::vector<Operand> results;
};

// The tensors of the module that a program reads. A new one is made when they change; calls
// that run meanwhile go on with theirs.
struct Binding {
  std::vector<Tensor> tensors;
  std::vector<std::array<std::vector<Tensor>, 3>> linear;  // the lists of each linear layer
};

class Program {
 public:
  Program(const py::list& pieces, const py::list& steps, size_t inputs, size_t bound,
          const py::list& outputs)
      : inputs_(inputs), bound_(bound) {
    for (const py::handle piece : pieces) {
      std::vector<int32_t> indices;
      for (const py::handle kernel : piece["kernels"]) {
        const auto [path, name] = py::cast<std::pair<std::string, std::string>>(kernel);
        kernels_.push_back(kernel_of(path, name));
        indices.push_back(static_cast<int32_t>(kernels_.size()) - 1);
      }
      piece_kernels_.push_back(std::move(indices));
    }
    for (const py::handle step : steps) add(py::reinterpret_borrow<py::list>(step), pieces);
    for (const py::handle id : outputs) outputs_.push_back(outer(py::cast<int32_t>(id)));
    TORCH_CHECK_VALUE(words_.size() < INT32_MAX && registers_.size() < INT32_MAX,
                      "a program is too long");
  }

  size_t inputs() const { return inputs_; }
  size_t bound() const { return bound_; }
  const std::vector<Operand>& outputs() const { return outputs_; }

  std::shared_ptr<const Binding> bind(std::vector<Tensor> tensors) const {
    auto made = std::make_shared<Binding>();
    for (const Linear& each : linear_) {
      std::array<std::vector<Tensor>, 3> lists;
      for (size_t i = 0; i < lists.size(); ++i) {
        for (const Operand operand : each.lists[i]) lists[i].push_back(tensors[~operand]);
      }
      made->linear.push_back(std::move(lists));
    }
    made->tensors = std::move(tensors);
    return made;
  }

  using Frame = c10::SmallVector<Tensor, 64>;

  const Tensor& at(Operand operand, const Frame& frame, const Binding& binding,
                   const Tensor* arguments) const {
    if (operand >= 0) return frame[operand];
    const size_t index = ~operand;
    return index < bound_ ? binding.tensors[index] : arguments[index - bound_];
  }

  size_t frame_size() const { return registers_.size(); }

  void run(int64_t size, Frame& frame, const Binding& binding, const Tensor* arguments) const {
    c10::SmallVector<int64_t, 128> values(values_.size());
    for (size_t i = 0; i < values_.size(); ++i) values[i] = values_[i](size);
    const auto tensor = [&](Operand operand) -> const Tensor& {
      return at(operand, frame, binding, arguments);
    };
    c10::SmallVector<int64_t, 16> dims;
    const auto gather = [&](const Step& step) {
      dims.resize(step.count);
      for (int32_t i = 0; i < step.count; ++i) dims[i] = values[words_[step.first + i]];
      const size_t half = step.count / 2;
      return std::pair{c10::IntArrayRef(dims.data(), half),
                       c10::IntArrayRef(dims.data() + half, half)};
    };
    for (const Step& step : steps_) {
      switch (step.kind) {
        case Kind::empty: {
          const auto [sizes, strides] = gather(step);
          frame[step.dst] = Tensor(at::detail::empty_strided_cpu(sizes, strides, step.dtype));
          break;
        }
        case Kind::view: {
          const auto [sizes, strides] = gather(step);
          frame[step.dst] = torch::inductor::_reinterpret_tensor(tensor(step.src), sizes, strides,
                                                                 values[step.value]);
          break;
        }
        case Kind::sizes: {
          const auto [sizes, strides] = gather(step);
          check_sizes(tensor(step.src), sizes, strides, step.text);
          break;
        }
        case Kind::align:
          check_alignment(tensor(step.src), values[step.value], step.text);
          break;
        case Kind::kernel: {
          std::array<Word, kMostArguments> words;
          for (int32_t i = 0; i < step.count; ++i) {
            const int32_t* argument = &words_[step.first + 2 * i];  // a tensor's, or kNone
            const int64_t value = values[argument[1]];
            if (argument[0] == kNone) {
              words[i] = static_cast<Word>(value);
            } else {
              const Tensor& of = tensor(argument[0]);
              words[i] = reinterpret_cast<Word>(of.data_ptr()) + value * of.itemsize();
            }
          }
          call_kernel(kernels_[step.value], words.data(), step.count);
          break;
        }
        case Kind::op:
          call_operator(operators_[step.value], frame, values.data(), tensor);
          break;
        case Kind::linear:
          call_linear(linear_[step.value], binding.linear[step.value], frame, tensor);
          break;
        case Kind::free:
          for (int32_t i = 0; i < step.count; ++i) frame[words_[step.first + i]].reset();
          break;
        case Kind::bump:
          for (int32_t i = 0; i < step.count; ++i) {
            const Tensor& each = tensor(words_[step.first + i]);
            if (!each.is_inference()) each.unsafeGetTensorImpl()->bump_version();
          }
          break;
      }
    }
  }

 private:
  // --- running -------------------------------------------------------------------------

  static void call_kernel(void* kernel, const Word* words, int32_t count) {
    try {
      kCallers[count](kernel, words);
    } catch (const std::exception& error) {
      throw std::runtime_error(error.what());  // what Inductor's own binding makes of it
    }
  }

  template <class F>
  static void call_operator(const Operator& op, Frame& frame, const int64_t* values,
                            const F& tensor) {
    torch::jit::Stack stack;
    stack.reserve(op.arguments.size());
    for (const OpArgument& each : op.arguments) {
      switch (each.kind) {
        case OpArgument::Kind::constant:
          stack.push_back(each.constant);
          break;
        case OpArgument::Kind::tensor:
          stack.emplace_back(tensor(each.items[0]));
          break;
        case OpArgument::Kind::integer:
          stack.emplace_back(values[each.items[0]]);
          break;
        case OpArgument::Kind::tensors: {
          c10::List<Tensor> list;
          list.reserve(each.items.size());
          for (const Operand item : each.items) list.push_back(tensor(item));
          stack.emplace_back(std::move(list));
          break;
        }
        case OpArgument::Kind::optional_tensors: {
          c10::List<std::optional<Tensor>> list;
          list.reserve(each.items.size());
          for (const Operand item : each.items) {
            list.push_back(item == kNone ? std::nullopt : std::optional<Tensor>(tensor(item)));
          }
          stack.emplace_back(std::move(list));
          break;
        }
        case OpArgument::Kind::integers: {
          c10::List<int64_t> list;
          list.reserve(each.items.size());
          for (const int32_t item : each.items) list.push_back(values[item]);
          stack.emplace_back(std::move(list));
          break;
        }
      }
    }
    op.handle.callBoxed(stack);
    if (op.is_list) {
      c10::List<Tensor> list = stack.at(0).toTensorList();
      for (size_t i = 0; i < op.results.size(); ++i) {
        if (op.results[i] != kNone) frame[op.results[i]] = list.get(i);
      }
      return;
    }
    for (size_t i = 0; i < op.results.size(); ++i) {
      if (op.results[i] != kNone) frame[op.results[i]] = std::move(stack.at(i)).toTensor();
    }
  }

  template <class F>
  static void call_linear(const Linear& layer, const std::array<std::vector<Tensor>, 3>& lists,
                          Frame& frame, const F& tensor) {
    std::optional<Tensor> residual;
    if (layer.residual != kNone) residual = tensor(layer.residual);
    std::vector<Tensor> found =
        layer.packed ? layer.packed->call(tensor(layer.x), lists[0], layer.n, lists[1], lists[2],
                                          residual, layer.activation, layer.gated)
                     : layer.gemv->call(tensor(layer.x), lists[0], lists[1], lists[2], residual,
                                        layer.activation, layer.gated);
    for (size_t i = 0; i < layer.results.size(); ++i) {
      if (layer.results[i] != kNone) frame[layer.results[i]] = std::move(found.at(i));
    }
  }

  void check_sizes(const Tensor& tensor, c10::IntArrayRef sizes, c10::IntArrayRef strides,
                   int32_t text) const {
    if (C10_LIKELY(tensor.dim() == static_cast<int64_t>(sizes.size()))) {
      bool right = true;
      for (size_t i = 0; i < sizes.size(); ++i) {
        const int64_t size = tensor.size(i);
        // The stride of a dimension of one element is of no meaning.
        right = right && size == sizes[i] && (size == 1 || tensor.stride(i) == strides[i]);
      }
      if (C10_LIKELY(right)) return;
    }
    // The function that the Python form calls decides, and its words are the error's.
    const py::gil_scoped_acquire gil;
    const py::tuple wanted_sizes = py::cast(sizes.vec()), wanted_strides = py::cast(strides.vec());
    ask_python("assert_size_stride", tensor, text, wanted_sizes, wanted_strides);
  }

  void check_alignment(const Tensor& tensor, int64_t bytes, int32_t text) const {
    const int64_t offset = tensor.storage_offset() * static_cast<int64_t>(tensor.itemsize());
    if (C10_LIKELY(offset % bytes == 0)) return;
    const py::gil_scoped_acquire gil;
    ask_python("assert_alignment", tensor, text, py::int_(bytes));
  }

  template <class... Args>
  void ask_python(const char* function, const Tensor& tensor, int32_t text, Args... args) const {
    const py::object check = py::module_::import("torch._C._dynamo.guards").attr(function);
    const auto given = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
    try {
      if (text < 0) {
        check(given, args...);
      } else {
        check(given, args..., texts_[text]);
      }
    } catch (py::error_already_set& error) {
      error.restore();
      python_error raised;
      raised.persist();
      throw raised;
    }
  }

  // --- reading -------------------------------------------------------------------------

  int32_t value(const py::handle& text) {
    const auto key = py::cast<std::string>(text);
    const auto [found, is_new] = value_index_.try_emplace(key, values_.size());
    if (is_new) values_.emplace_back(key);
    return found->second;
  }

  void dims(Step& step, const py::handle& sizes, const py::handle& strides) {
    step.first = static_cast<int32_t>(words_.size());
    for (const py::handle each : sizes) words_.push_back(value(each));
    for (const py::handle each : strides) words_.push_back(value(each));
    step.count = static_cast<int32_t>(words_.size()) - step.first;
    TORCH_CHECK_VALUE(step.count % 2 == 0, "as many strides as sizes are needed");
  }

  int32_t text(const py::handle& what) {
    if (what.is_none()) return -1;
    texts_.push_back(py::cast<std::string>(what));
    return static_cast<int32_t>(texts_.size()) - 1;
  }

  // A register with no name left is free for what comes next, the last one freed first: what
  // it points to is still in the cache.
  Operand take() {
    if (free_.empty()) {
      registers_.push_back(1);
      return static_cast<Operand>(registers_.size()) - 1;
    }
    const Operand found = free_.back();
    free_.pop_back();
    registers_[found] = 1;
    return found;
  }

  void name(Operand operand) {
    if (operand >= 0) ++registers_[operand];
  }

  void drop(Operand operand, std::vector<int32_t>& dead) {
    if (operand < 0 || operand == kNone || --registers_[operand] > 0) return;
    free_.push_back(operand);
    dead.push_back(operand);
  }

  void release(const std::vector<int32_t>& dead) {
    if (dead.empty()) return;
    Step step{Kind::free};
    step.first = static_cast<int32_t>(words_.size());
    step.count = static_cast<int32_t>(dead.size());
    words_.insert(words_.end(), dead.begin(), dead.end());
    steps_.push_back(step);
  }

  Operand outer(int32_t id) const {
    if (id < 0) return id;  // bound, or an argument
    const auto found = outer_.find(id);
    TORCH_CHECK_VALUE(found != outer_.end(), "a step reads value ", id, " before it is made");
    return found->second;
  }

  void add(const py::list& step, const py::list& pieces) {
    const auto kind = py::cast<std::string>(step[0]);
    if (kind == "piece") {
      add_piece(py::cast<int32_t>(step[1]), pieces, step[2], step[3], step[4]);
    } else if (kind == "op") {
      const auto resolve = [&](int32_t id) { return outer(id); };
      std::vector<Operand> results;
      for (const py::handle id : step[2]) {
        const int32_t of = py::cast<int32_t>(id);
        results.push_back(of < 0 ? kNone : take());
        if (of >= 0) made_[of] = results.back();
      }
      add_operator(py::cast<std::string>(step[1]), results, step[3], step[4], resolve);
      outer_.insert(made_.begin(), made_.end());
      made_.clear();
    } else {
      TORCH_CHECK_VALUE(kind == "free", "no step is called ", kind);
      std::vector<int32_t> dead;
      for (const py::handle id : step[1]) drop_outer(py::cast<int32_t>(id), dead);
      release(dead);
    }
  }

  void drop_outer(int32_t id, std::vector<int32_t>& dead) {
    const auto found = outer_.find(id);
    TORCH_CHECK_VALUE(found != outer_.end(), "a step frees value ", id, ", which is not there");
    drop(found->second, dead);
    outer_.erase(found);
  }

  // The steps of a piece, over registers of the whole. `last` are values that nobody reads
  // after this piece: they go with the piece's own last use.
  void add_piece(int32_t index, const py::list& pieces, const py::handle& given,
                 const py::handle& outputs, const py::handle& last) {
    const py::handle piece = pieces[index];
    std::map<int32_t, Operand> slots;
    const py::list parameters = piece["parameters"];
    const py::list inputs = py::reinterpret_borrow<py::list>(given);
    TORCH_CHECK_VALUE(parameters.size() == inputs.size(), "a piece takes ", parameters.size(),
                      " tensors, got ", inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Operand operand = outer(py::cast<int32_t>(inputs[i]));
      slots[py::cast<int32_t>(parameters[i])] = operand;
      name(operand);
    }
    std::vector<int32_t> dead;
    for (const py::handle id : last) drop_outer(py::cast<int32_t>(id), dead);
    TORCH_CHECK_VALUE(dead.empty(), "a piece's last values are none that it takes");
    for (const py::handle step : piece["steps"]) {
      add_inner(py::reinterpret_borrow<py::list>(step), slots, piece_kernels_[index]);
    }
    const py::list results = piece["outputs"];
    const py::list ids = py::reinterpret_borrow<py::list>(outputs);
    TORCH_CHECK_VALUE(results.size() == ids.size(), "a piece returns ", results.size(),
                      " tensors, wanted ", ids.size());
    for (size_t i = 0; i < ids.size(); ++i) {
      const Operand operand = slots.at(py::cast<int32_t>(results[i]));
      name(operand);
      outer_[py::cast<int32_t>(ids[i])] = operand;
    }
    for (const auto& [slot, operand] : slots) drop(operand, dead);
    release(dead);
  }

  void add_inner(const py::list& step, std::map<int32_t, Operand>& slots,
                 const std::vector<int32_t>& kernels) {
    const auto kind = py::cast<std::string>(step[0]);
    const auto slot = [&](const py::handle& of) { return slots.at(py::cast<int32_t>(of)); };
    const auto make = [&](const py::handle& of) { return slots[py::cast<int32_t>(of)] = take(); };
    Step made{};
    if (kind == "empty") {
      made.kind = Kind::empty;
      made.dtype = static_cast<at::ScalarType>(
          torch::jit::toIValue(step[2], c10::IntType::get()).toInt());
      dims(made, step[3], step[4]);
      made.dst = make(step[1]);
    } else if (kind == "view") {
      made.kind = Kind::view;
      made.src = slot(step[2]);
      dims(made, step[3], step[4]);
      made.value = value(step[5]);
      made.dst = make(step[1]);
    } else if (kind == "sizes") {
      made.kind = Kind::sizes;
      made.src = slot(step[1]);
      dims(made, step[2], step[3]);
      made.text = text(step[4]);
    } else if (kind == "align") {
      made.kind = Kind::align;
      made.src = slot(step[1]);
      made.value = value(step[2]);
      made.text = text(step[3]);
    } else if (kind == "kernel") {
      made.kind = Kind::kernel;
      made.value = kernels.at(py::cast<size_t>(step[1]));
      made.first = static_cast<int32_t>(words_.size());
      const py::list given = step[2];
      made.count = static_cast<int32_t>(given.size());
      TORCH_CHECK_VALUE(given.size() <= kMostArguments, "a kernel takes ", given.size(),
                        " arguments");
      for (const py::handle each : given) {
        if (py::isinstance<py::list>(each)) {
          const auto place = py::reinterpret_borrow<py::list>(each);
          words_.push_back(slot(place[0]));
          words_.push_back(value(place[1]));
        } else if (py::isinstance<py::str>(each)) {
          words_.push_back(kNone);
          words_.push_back(value(each));
        } else {
          words_.push_back(slot(each));
          words_.push_back(value(py::str("0")));
        }
      }
    } else if (kind == "op") {
      const auto resolve = [&](int32_t of) { return slots.at(of); };
      std::vector<std::pair<int32_t, Operand>> results;
      std::vector<Operand> operands;
      for (const py::handle of : step[2]) {
        const int32_t id = py::cast<int32_t>(of);
        operands.push_back(id < 0 ? kNone : take());
        if (id >= 0) results.emplace_back(id, operands.back());
      }
      add_operator(py::cast<std::string>(step[1]), operands, step[3], step[4], resolve);
      for (const auto& [id, operand] : results) slots[id] = operand;
      return;
    } else if (kind == "free") {
      std::vector<int32_t> dead;
      for (const py::handle of : step[1]) {
        const auto found = slots.find(py::cast<int32_t>(of));
        TORCH_CHECK_VALUE(found != slots.end(), "a step frees a slot that is not there");
        drop(found->second, dead);
        slots.erase(found);
      }
      release(dead);
      return;
    } else {
      TORCH_CHECK_VALUE(kind == "bump", "no step is called ", kind);
      made.kind = Kind::bump;
      made.first = static_cast<int32_t>(words_.size());
      for (const py::handle of : step[1]) words_.push_back(slot(of));
      made.count = static_cast<int32_t>(words_.size()) - made.first;
    }
    steps_.push_back(made);
  }

  template <class F>
  OpArgument argument(const py::handle& given, const c10::Argument& schema, const F& resolve) {
    OpArgument made;
    const c10::TypePtr type = schema.real_type();
    const auto operand = [&](const py::handle& each) { return resolve(py::cast<int32_t>(each)); };
    if (!holds_values(given)) {
      made.constant = torch::jit::toIValue(given, type, schema.N());
    } else if (py::isinstance<py::dict>(given)) {
      const auto dict = py::reinterpret_borrow<py::dict>(given);
      const bool is_tensor = dict.contains("t");
      made.kind = is_tensor ? OpArgument::Kind::tensor : OpArgument::Kind::integer;
      made.items.push_back(is_tensor ? operand(dict["t"]) : value(dict["e"]));
    } else {
      c10::TypePtr inner = type;
      if (const auto optional = inner->cast<c10::OptionalType>()) inner = optional->getElementType();
      const auto list = inner->expect<c10::ListType>();
      const bool optional = list->getElementType()->kind() == c10::TypeKind::OptionalType;
      const bool tensors = optional || list->getElementType()->kind() == c10::TypeKind::TensorType;
      made.kind = optional  ? OpArgument::Kind::optional_tensors
                  : tensors ? OpArgument::Kind::tensors
                            : OpArgument::Kind::integers;
      for (const py::handle each : given) {
        if (each.is_none()) {
          TORCH_CHECK_TYPE(optional, "None among the values of ", schema.name());
          made.items.push_back(kNone);
        } else if (py::isinstance<py::int_>(each)) {
          TORCH_CHECK_TYPE(!tensors, "an integer among the tensors of ", schema.name());
          made.items.push_back(value(py::str(each)));
        } else {
          const auto dict = py::reinterpret_borrow<py::dict>(each);
          TORCH_CHECK_TYPE(dict.contains("t") == tensors, "a mixture of values for ",
                           schema.name());
          made.items.push_back(tensors ? operand(dict["t"]) : value(dict["e"]));
        }
      }
    }
    return made;
  }

  // Whether an argument is a value of the run, {"t": tensor} or {"e": expression}, or a list
  // that has one.
  static bool holds_values(const py::handle& given) {
    if (py::isinstance<py::dict>(given)) return true;
    if (!py::isinstance<py::list>(given)) return false;
    for (const py::handle each : given) {
      if (py::isinstance<py::dict>(each)) return true;
    }
    return false;
  }

  template <class F>
  void add_operator(const std::string& called, const std::vector<Operand>& results,
                    const py::handle& positional, const py::handle& named, const F& resolve) {
    const size_t dot = called.find('.', called.find("::"));
    const std::string base = called.substr(0, dot);
    std::string overload = dot == std::string::npos ? "" : called.substr(dot + 1);
    if (overload == "default") overload = "";
    Operator made{c10::Dispatcher::singleton().findSchemaOrThrow(base.c_str(), overload.c_str()),
                  {}, results, false};
    const c10::FunctionSchema& schema = made.handle.schema();
    const auto args = py::reinterpret_borrow<py::list>(positional);
    const auto kwargs = py::reinterpret_borrow<py::dict>(named);
    size_t used = 0;
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
      const c10::Argument& each = schema.arguments()[i];
      if (i < args.size() && !each.kwarg_only()) {
        made.arguments.push_back(argument(args[i], each, resolve));
        ++used;
      } else if (kwargs.contains(each.name().c_str())) {
        made.arguments.push_back(argument(kwargs[each.name().c_str()], each, resolve));
        ++used;
      } else {
        TORCH_CHECK_TYPE(each.default_value().has_value(), called, " lacks ", each.name());
        OpArgument standard;
        standard.constant = *each.default_value();
        made.arguments.push_back(std::move(standard));
      }
    }
    TORCH_CHECK_TYPE(used == args.size() + kwargs.size(), called, " is given too much");
    made.is_list = schema.returns().size() == 1 &&
                   schema.returns()[0].type()->isSubtypeOf(*c10::ListType::ofTensors());
    if (called.starts_with("splitpoint::linear_") && add_linear(made)) return;
    Step step{Kind::op};
    step.value = static_cast<int32_t>(operators_.size());
    operators_.push_back(std::move(made));
    steps_.push_back(step);
  }

  // False where it is no linear layer of bound weights.
  bool add_linear(const Operator& op) {
    const std::string& called = op.handle.operator_name().name;
    const bool packed = called == "splitpoint::linear_packed";
    if (!packed && called != "splitpoint::linear_gemv") return false;
    size_t next = 0;
    const auto take_next = [&]() -> const OpArgument& { return op.arguments[next++]; };
    Linear made{};
    const OpArgument& x = take_next();
    if (x.kind != OpArgument::Kind::tensor) return false;
    made.x = x.items[0];
    for (size_t i = 0; i < made.lists.size(); ++i) {
      const OpArgument& list = take_next();
      if (list.kind == OpArgument::Kind::tensors) {
        for (const Operand each : list.items) {
          if (each >= 0 || static_cast<size_t>(~each) >= bound_) return false;
        }
        made.lists[i] = list.items;
      } else if (!list.constant.isList() || !list.constant.toListRef().empty()) {
        return false;
      }
      if (packed && i == 0) {
        const OpArgument& n = take_next();
        if (n.kind != OpArgument::Kind::constant || !n.constant.isList()) return false;
        for (const c10::IValue& each : n.constant.toListRef()) {
          if (!each.isInt()) return false;
          made.n.push_back(each.toInt());
        }
      }
    }
    const OpArgument& residual = take_next();
    if (residual.kind == OpArgument::Kind::constant && !residual.constant.isNone()) return false;
    made.residual = residual.kind == OpArgument::Kind::tensor ? residual.items[0] : kNone;
    made.activation = take_next().constant.toStringRef();
    made.gated = take_next().constant.toBool();
    made.results = op.results;
    if (packed) {
      made.packed = op.handle.typed<LinearPacked>();
    } else {
      made.gemv = op.handle.typed<LinearGemv>();
    }
    Step step{Kind::linear};
    step.value = static_cast<int32_t>(linear_.size());
    linear_.push_back(std::move(made));
    steps_.push_back(step);
    return true;
  }

  const size_t inputs_, bound_;
  std::vector<Step> steps_;
  std::vector<int32_t> words_;
  std::vector<Expression> values_;
  std::vector<std::string> texts_;
  std::vector<void*> kernels_;
  std::vector<Operator> operators_;
  std::vector<Linear> linear_;
  std::vector<Operand> outputs_;
  // Only while it is made:
  std::vector<int32_t> registers_;  // how many names each has
  std::vector<Operand> free_;
  std::unordered_map<std::string, int32_t> value_index_;
  std::unordered_map<int32_t, Operand> outer_, made_;
  std::vector<std::vector<int32_t>> piece_kernels_;
};

// --- the Python type -------------------------------------------------------------------

struct PyProgram {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  std::unique_ptr<Program> program;
  std::shared_ptr<const Binding> binding;
};

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

// program(size, *tensors) -> tuple of tensors
PyObject* program_call(PyObject* self, PyObject* const* args, size_t nargsf, PyObject* names) {
  HANDLE_TH_ERRORS
  const auto* me = reinterpret_cast<PyProgram*>(self);
  const size_t count = PyVectorcall_NARGS(nargsf);
  const Program& program = *me->program;
  TORCH_CHECK_TYPE(count == program.inputs() + 1 && names == nullptr, "a program takes the size and ",
                   program.inputs(), " tensors");
  const int64_t size = PyLong_AsLongLong(args[0]);
  if (size == -1 && PyErr_Occurred()) throw python_error();
  c10::SmallVector<Tensor, 8> tensors;
  for (size_t i = 1; i < count; ++i) {
    TORCH_CHECK_TYPE(THPVariable_Check(args[i]), "a program takes tensors, got ",
                     Py_TYPE(args[i])->tp_name);
    tensors.push_back(THPVariable_Unpack(args[i]));
  }
  // A call that runs while another thread binds anew goes on with what it has.
  const std::shared_ptr<const Binding> binding = me->binding;
  TORCH_CHECK(binding != nullptr, "a program is called before its tensors are bound");
  c10::SmallVector<Tensor, 8> results;
  {
    const WithoutGil without;
    Program::Frame frame(program.frame_size());
    program.run(size, frame, *binding, tensors.data());
    for (const Operand each : program.outputs()) {
      results.push_back(program.at(each, frame, *binding, tensors.data()));
    }
  }
  auto made = THPObjectPtr(PyTuple_New(static_cast<Py_ssize_t>(results.size())));
  if (!made) throw python_error();
  for (size_t i = 0; i < results.size(); ++i) {
    PyObject* wrapped = THPVariable_Wrap(std::move(results[i]));
    if (!wrapped) throw python_error();
    PyTuple_SET_ITEM(made.get(), static_cast<Py_ssize_t>(i), wrapped);
  }
  return made.release();
  END_HANDLE_TH_ERRORS
}

PyObject* program_bind(PyObject* self, PyObject* given) {
  HANDLE_TH_ERRORS
  auto* me = reinterpret_cast<PyProgram*>(self);
  TORCH_CHECK_TYPE(PyList_Check(given), "bind takes a list of tensors");
  TORCH_CHECK_VALUE(static_cast<size_t>(PyList_GET_SIZE(given)) == me->program->bound(),
                    "a program reads ", me->program->bound(), " tensors of the module, got ",
                    PyList_GET_SIZE(given));
  std::vector<Tensor> tensors;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(given); ++i) {
    PyObject* each = PyList_GET_ITEM(given, i);
    TORCH_CHECK_TYPE(THPVariable_Check(each), "bind takes tensors, got ", Py_TYPE(each)->tp_name);
    tensors.push_back(THPVariable_Unpack(each));
  }
  const std::shared_ptr<const Binding> before =
      std::exchange(me->binding, me->program->bind(std::move(tensors)));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* program_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  PyObject *pieces, *steps, *outputs;
  Py_ssize_t inputs, bound;
  static const char* const names[] = {"pieces", "steps", "inputs", "bound", "outputs", nullptr};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!nnO!", const_cast<char**>(names),
                                   &PyList_Type, &pieces, &PyList_Type, &steps, &inputs, &bound,
                                   &PyList_Type, &outputs)) {
    return nullptr;
  }
  auto program = std::make_unique<Program>(py::reinterpret_borrow<py::list>(pieces),
                                           py::reinterpret_borrow<py::list>(steps), inputs, bound,
                                           py::reinterpret_borrow<py::list>(outputs));
  PyObject* self = type->tp_alloc(type, 0);
  if (!self) return nullptr;
  auto* me = reinterpret_cast<PyProgram*>(self);
  me->vectorcall = program_call;
  new (&me->program) std::unique_ptr<Program>(std::move(program));
  new (&me->binding) std::shared_ptr<const Binding>();
  return self;
  END_HANDLE_TH_ERRORS
}

void program_dealloc(PyObject* self) {
  auto* me = reinterpret_cast<PyProgram*>(self);
  me->program.~unique_ptr();
  me->binding.~shared_ptr();
  Py_TYPE(self)->tp_free(self);
}

PyMethodDef program_methods[] = {
    {"bind", program_bind, METH_O, "Give it the tensors of the module that it reads, in order."},
    {nullptr, nullptr, 0, nullptr},
};

PyTypeObject program_type = {PyVarObject_HEAD_INIT(nullptr, 0) "splitpoint.Program"};

PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "runner", nullptr, -1, nullptr};

}  // namespace
}  // namespace splitpoint

PyMODINIT_FUNC PyInit_runner() {
  using namespace splitpoint;
  program_type.tp_basicsize = sizeof(PyProgram);
  program_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  program_type.tp_doc = "Steps of a compiled model: call with the size, then the tensors.";
  program_type.tp_vectorcall_offset = offsetof(PyProgram, vectorcall);
  program_type.tp_call = PyVectorcall_Call;
  program_type.tp_new = program_new;
  program_type.tp_dealloc = program_dealloc;
  program_type.tp_methods = program_methods;
  if (PyType_Ready(&program_type) < 0) return nullptr;
  PyObject* made = PyModule_Create(&module_definition);
  if (!made) return nullptr;
  if (PyModule_AddObjectRef(made, "Program", reinterpret_cast<PyObject*>(&program_type)) < 0) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}
#endif
