// A program of the runner: read from Python lists once, then run again and again.
#pragma once

#include <pybind11/pybind11.h>  // first: it includes Python.h

#include <ATen/EmptyTensor.h>
#include <ATen/record_function.h>
#include <c10/util/SmallVector.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/inductor/inductor_ops.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "pool.h"
#include "runner_expression.h"
#include "runner_steps.h"

// As in torch/csrc/jit/python/pybind_utils.h, whose other declarations take seconds to compile.
namespace torch::jit {
TORCH_PYTHON_API c10::IValue toIValue(pybind11::handle given, const c10::TypePtr& type,
                                      std::optional<int32_t> length);
}

namespace splitpoint::runner {

namespace py = pybind11;

class Program {
 public:
  Program(const py::list& pieces, const py::list& steps, size_t inputs, size_t bound,
          const py::list& outputs)
      : inputs_(inputs), bound_(bound) {
    TORCH_CHECK_VALUE(inputs < INT32_MAX / 2 && bound < INT32_MAX / 2,
                      "a program cannot take so many tensors");
    for (const py::handle piece : pieces) pieces_.push_back(read_piece(piece));
    for (const py::handle step : steps) add(py::cast<py::list>(step));
    for (const py::handle id : outputs) outputs_.push_back(outer(py::cast<int32_t>(id)));
    note_last_reads();
    TORCH_CHECK_VALUE(words_.size() < INT32_MAX && registers_.size() < INT32_MAX,
                      "a program is too long");
    pieces_.clear();
  }

  size_t inputs() const { return inputs_; }
  size_t bound() const { return bound_; }
  const std::vector<Operand>& outputs() const { return outputs_; }

  std::shared_ptr<const Binding> bind(std::vector<Tensor> tensors) const {
    auto made = std::make_shared<Binding>();
    for (const Linear& each : linear_) made->linear.emplace_back(each, tensors);
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

  void run(int64_t size, Frame& frame, const Binding& binding, const Tensor* arguments) {
    std::unique_ptr<Pool> pool = pool_.take();
    pool->prepare(size, layouts_.size());
    run(size, frame, binding, arguments, *pool);
    pool_.put_back(std::move(pool));
  }

 private:
  // --- running -------------------------------------------------------------------------

  void run(int64_t size, Frame& frame, const Binding& binding, const Tensor* arguments,
           Pool& pool) const {
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
          Tensor& made = frame[step.dst] = pool.take(step.value);
          // A step in place may have given it another shape since.
          if (!made.defined() || made.sizes() != sizes || made.strides() != strides) {
            made = Tensor(at::detail::empty_strided_cpu(sizes, strides, step.dtype));
          }
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
          call_linear(linear_[step.value], binding.linear[step.value], frame, pool, tensor);
          break;
        case Kind::collective:
          call_collective(collectives_[step.value], frame, tensor);
          break;
        case Kind::free:
          for (int32_t i = 0; i < step.count; ++i) {
            Tensor& dead = frame[words_[step.first + 2 * i]];
            const int32_t layout = words_[step.first + 2 * i + 1];
            if (layout == kNone) {
              dead.reset();
            } else {
              pool.park(std::move(dead), layout);
            }
          }
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
  static void call_linear(const Linear& layer, const BoundLinear& bound, Frame& frame, Pool& pool,
                          const F& tensor) {
    const Tensor& x = tensor(layer.x);
    if (bound.ready && !c10::GradMode::is_enabled() && x.scalar_type() == bound.type &&
        x.dim() > 0 && x.size(-1) == bound.k) {
      c10::SmallVector<Tensor, 3> y;
      for (size_t i = 0; i < bound.ready->layers.size(); ++i) {
        y.push_back(linear_result(x, bound.ready->layers[i].n, layer.layouts[i], pool));
      }
      const Tensor* residual = layer.residual == kNone ? nullptr : &tensor(layer.residual);
      RECORD_FUNCTION("splitpoint::linear_packed", std::vector<c10::IValue>({x}));
      run_linear(*bound.ready, x, residual, y);
      for (size_t i = 0; i < layer.results.size(); ++i) {
        if (layer.results[i] != kNone) frame[layer.results[i]] = std::move(y[i]);
      }
      return;
    }
    std::optional<Tensor> residual;
    if (layer.residual != kNone) residual = tensor(layer.residual);
    const PastAutograd past;
    const auto& lists = bound.lists;
    std::vector<Tensor> found =
        layer.packed ? layer.packed->call(x, lists[0], layer.n, lists[1], lists[2], residual,
                                          layer.activation, layer.gated)
                     : layer.gemv->call(x, lists[0], lists[1], lists[2], residual,
                                        layer.activation, layer.gated);
    for (size_t i = 0; i < layer.results.size(); ++i) {
      if (layer.results[i] != kNone) frame[layer.results[i]] = std::move(found.at(i));
    }
  }

  // Contiguous, of x's dtype and sizes but for the last one, n.
  static Tensor linear_result(const Tensor& x, int64_t n, int32_t layout, Pool& pool) {
    Tensor kept = pool.take(layout);
    const auto rows = x.sizes().slice(0, x.dim() - 1);
    if (kept.defined() && kept.scalar_type() == x.scalar_type() && kept.dim() == x.dim() &&
        kept.sizes().slice(0, x.dim() - 1) == rows && kept.size(-1) == n && kept.is_contiguous()) {
      return kept;
    }
    at::DimVector sizes(rows);
    sizes.push_back(n);
    return Tensor(at::detail::empty_cpu(sizes, x.scalar_type()));
  }

  template <class F>
  static void call_collective(const CollectiveStep& step, Frame& frame, const F& tensor) {
    // A result is a register of its own, and what it is moved from is freed by the next step.
    const auto give = [&](size_t result, Tensor made) {
      if (step.results[result] != kNone) frame[step.results[result]] = std::move(made);
    };
    const bool over = step.last && !c10::GradMode::is_enabled() && has_one_owner(frame[step.x]) &&
                      (step.residual == kNone || has_one_owner(frame[step.residual]));
    if (!step.call.has_norm()) {
      if (over) {
        step.call.reduce_over(frame[step.x]);
        give(0, std::move(frame[step.x]));
      } else {
        give(0, step.call.reduce(tensor(step.x)));
      }
    } else if (over) {
      step.call.fuse_over(frame[step.x], frame[step.residual], tensor(step.weight));
      give(0, std::move(frame[step.x]));
      give(1, std::move(frame[step.residual]));
    } else {
      std::optional<Tensor> residual;
      if (step.residual != kNone) residual = tensor(step.residual);
      auto [norm, sum] = step.call.fuse(tensor(step.x), residual, tensor(step.weight));
      give(0, std::move(norm));
      give(1, std::move(sum));
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
    TORCH_CHECK_VALUE(bytes > 0, "memory cannot be aligned to ", bytes, " bytes");
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

  void dims(PieceStep& step, const py::handle& sizes, const py::handle& strides) {
    for (const py::handle each : sizes) step.words.push_back(value(each));
    const size_t half = step.words.size();
    for (const py::handle each : strides) step.words.push_back(value(each));
    TORCH_CHECK_VALUE(step.words.size() == 2 * half, "as many strides as sizes are needed");
  }

  // A number for tensors that differ in nothing but what they hold, at one size.
  int32_t layout(std::vector<int32_t> key) {
    return layouts_.try_emplace(std::move(key), static_cast<int32_t>(layouts_.size()))
        .first->second;
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
      registers_.push_back({1});
      return static_cast<Operand>(registers_.size()) - 1;
    }
    const Operand found = free_.back();
    free_.pop_back();
    registers_[found] = {1};
    return found;
  }

  void name(Operand operand) {
    if (operand >= 0) ++registers_[operand].names;
  }

  void drop(Operand operand, std::vector<int32_t>& dead) {
    if (operand < 0 || --registers_[operand].names > 0) return;
    const Register last = registers_[operand];
    free_.push_back(operand);
    dead.push_back(operand);
    dead.push_back(last.layout);
    drop(last.viewed, dead);
  }

  void release(const std::vector<int32_t>& dead) {
    if (dead.empty()) return;
    Step step{Kind::free};
    step.first = static_cast<int32_t>(words_.size());
    step.count = static_cast<int32_t>(dead.size() / 2);
    words_.insert(words_.end(), dead.begin(), dead.end());
    steps_.push_back(step);
  }

  Operand outer(int32_t id) const {
    if (id < 0) {  // bound, or an argument
      TORCH_CHECK_VALUE(static_cast<size_t>(~id) < bound_ + inputs_, "a step reads tensor ", ~id,
                        " of ", bound_ + inputs_, " that a program is given");
      return id;
    }
    const auto found = outer_.find(id);
    TORCH_CHECK_VALUE(found != outer_.end(), "a step reads value ", id, " before it is made");
    return found->second;
  }

  void add(const py::list& step) {
    const auto kind = py::cast<std::string>(step[0]);
    if (kind == "piece") {
      add_piece(pieces_.at(py::cast<size_t>(step[1])), numbers(step[2]), numbers(step[3]),
                numbers(step[4]));
    } else if (kind == "op") {
      Operator made = read_operator(py::cast<std::string>(step[1]), step[3], step[4],
                                    [&](int32_t id) { return outer(id); });
      const std::vector<int32_t> ids = numbers(step[2]);
      for (const int32_t id : ids) made.results.push_back(id < 0 ? kNone : take());
      for (size_t i = 0; i < ids.size(); ++i) {
        if (ids[i] >= 0) define_outer(ids[i], made.results[i]);
      }
      add_operator(std::move(made));
    } else {
      TORCH_CHECK_VALUE(kind == "free", "no step is called ", kind);
      std::vector<int32_t> dead;
      for (const int32_t id : numbers(step[1])) drop_outer(id, dead);
      release(dead);
    }
  }

  void define_outer(int32_t id, Operand operand) {
    TORCH_CHECK_VALUE(id >= 0 && outer_.emplace(id, operand).second, "a step makes value ", id,
                      ", which is there already or cannot be made");
  }

  static std::vector<int32_t> numbers(const py::handle& given) {
    std::vector<int32_t> made;
    for (const py::handle each : given) made.push_back(py::cast<int32_t>(each));
    return made;
  }

  void drop_outer(int32_t id, std::vector<int32_t>& dead) {
    const auto found = outer_.find(id);
    TORCH_CHECK_VALUE(found != outer_.end(), "a step frees value ", id, ", which is not there");
    drop(found->second, dead);
    outer_.erase(found);
  }

  // The steps of a piece, over registers of the whole. `last` are values that nobody reads
  // after this piece: they go with the piece's own last use.
  void add_piece(const Piece& piece, const std::vector<int32_t>& inputs,
                 const std::vector<int32_t>& outputs, const std::vector<int32_t>& last) {
    std::vector<Operand> slots(piece.slots, kNone);  // kNone: nothing is there
    TORCH_CHECK_VALUE(piece.parameters.size() == inputs.size(), "a piece takes ",
                      piece.parameters.size(), " tensors, got ", inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Operand operand = outer(inputs[i]);
      slots[piece.parameters[i]] = operand;
      name(operand);
    }
    std::vector<int32_t> dead;
    for (const int32_t id : last) drop_outer(id, dead);
    TORCH_CHECK_VALUE(dead.empty(), "a piece's last values are none that it takes");
    for (const PieceStep& step : piece.steps) place(step, slots);
    TORCH_CHECK_VALUE(piece.outputs.size() == outputs.size(), "a piece returns ",
                      piece.outputs.size(), " tensors, wanted ", outputs.size());
    for (size_t i = 0; i < outputs.size(); ++i) {
      const Operand operand = filled(slots, piece.outputs[i]);
      name(operand);
      define_outer(outputs[i], operand);
    }
    for (const Operand operand : slots) drop(operand, dead);
    release(dead);
  }

  static Operand filled(const std::vector<Operand>& slots, int32_t slot) {
    const Operand found = slots.at(slot);
    TORCH_CHECK_VALUE(found != kNone, "a step reads slot ", slot, " before it is filled");
    return found;
  }

  // A step of a piece over the operands that its slots have.
  void place(const PieceStep& given, std::vector<Operand>& slots) {
    Step made = given.step;
    if (made.kind == Kind::free) {
      std::vector<int32_t> dead;
      for (const int32_t slot : given.words) {
        drop(filled(slots, slot), dead);
        slots[slot] = kNone;
      }
      return release(dead);
    }
    if (given.op) {
      Operator op = *given.op;
      for (Operand& each : op.results) {
        if (each != kNone) each = take();
      }
      for (OpArgument& argument : op.arguments) {
        if (argument.kind != OpArgument::Kind::tensor &&
            argument.kind != OpArgument::Kind::tensors &&
            argument.kind != OpArgument::Kind::optional_tensors) {
          continue;
        }
        for (int32_t& each : argument.items) {
          if (each != kNone) each = filled(slots, each);
        }
      }
      for (size_t i = 0; i < op.results.size(); ++i) {
        if (op.results[i] != kNone) slots[given.op->results[i]] = op.results[i];
      }
      return add_operator(std::move(op));
    }
    made.first = static_cast<int32_t>(words_.size());
    words_.insert(words_.end(), given.words.begin(), given.words.end());
    const auto place_word = [&](size_t at) {
      int32_t& word = words_[made.first + at];
      if (word != kNone) word = filled(slots, word);
    };
    switch (made.kind) {
      case Kind::kernel:  // pairs of a slot and a value
        for (size_t i = 0; i < given.words.size(); i += 2) place_word(i);
        break;
      case Kind::bump:
        for (size_t i = 0; i < given.words.size(); ++i) place_word(i);
        break;
      case Kind::empty:
        made.dst = slots[made.dst] = take();
        registers_[made.dst].layout = made.value;
        break;
      case Kind::view:
        made.src = filled(slots, made.src);
        name(made.src);  // before a register is taken: it must stay, and goes with its last view
        made.dst = slots[made.dst] = take();
        registers_[made.dst].viewed = made.src;
        break;
      default:
        made.src = filled(slots, made.src);
    }
    steps_.push_back(made);
  }

  Piece read_piece(const py::handle& given) {
    Piece made;
    std::vector<int32_t> kernels;
    for (const py::handle kernel : given["kernels"]) {
      const auto [path, name] = py::cast<std::pair<std::string, std::string>>(kernel);
      kernels.push_back(static_cast<int32_t>(kernels_.size()));
      kernels_.push_back(kernel_of(path, name));
    }
    const auto slot = [&](const py::handle& of) {
      const int32_t found = py::cast<int32_t>(of);
      TORCH_CHECK_VALUE(found >= 0 && found < kMostSlots, "a step has slot ", found);
      made.slots = std::max(made.slots, found + 1);
      return found;
    };
    for (const py::handle each : given["parameters"]) made.parameters.push_back(slot(each));
    for (const py::handle step : given["steps"]) {
      made.steps.push_back(read_step(py::cast<py::list>(step), slot, kernels));
    }
    for (const py::handle each : given["outputs"]) made.outputs.push_back(slot(each));
    return made;
  }

  template <class F>
  PieceStep read_step(const py::list& step, const F& slot, const std::vector<int32_t>& kernels) {
    const auto kind = py::cast<std::string>(step[0]);
    PieceStep read{};
    Step& made = read.step;
    if (kind == "empty") {
      made.kind = Kind::empty;
      const py::object dtype = step[2];
      TORCH_CHECK_TYPE(THPDtype_Check(dtype.ptr()), "a step allocates a dtype that is none");
      made.dtype = reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
      dims(read, step[3], step[4]);
      made.dst = slot(step[1]);
      std::vector<int32_t> key = read.words;
      key.push_back(static_cast<int32_t>(made.dtype));
      made.value = layout(std::move(key));
    } else if (kind == "view") {
      made.kind = Kind::view;
      made.src = slot(step[2]);
      dims(read, step[3], step[4]);
      made.value = value(step[5]);
      made.dst = slot(step[1]);
    } else if (kind == "sizes") {
      made.kind = Kind::sizes;
      made.src = slot(step[1]);
      dims(read, step[2], step[3]);
      made.text = text(step[4]);
    } else if (kind == "align") {
      made.kind = Kind::align;
      made.src = slot(step[1]);
      made.value = value(step[2]);
      made.text = text(step[3]);
    } else if (kind == "kernel") {
      made.kind = Kind::kernel;
      made.value = kernels.at(py::cast<size_t>(step[1]));
      const py::list given = step[2];
      TORCH_CHECK_VALUE(given.size() <= kMostArguments, "a kernel takes ", given.size(),
                        " arguments");
      for (const py::handle each : given) {
        if (py::isinstance<py::list>(each)) {
          const auto place = py::reinterpret_borrow<py::list>(each);
          read.words.push_back(slot(place[0]));
          read.words.push_back(value(place[1]));
        } else if (py::isinstance<py::str>(each)) {
          read.words.push_back(kNone);
          read.words.push_back(value(each));
        } else {
          read.words.push_back(slot(each));
          read.words.push_back(value(py::str("0")));
        }
      }
      made.count = static_cast<int32_t>(given.size());
      return read;
    } else if (kind == "op") {
      made.kind = Kind::op;
      read.op = read_operator(py::cast<std::string>(step[1]), step[3], step[4],
                              [&](int32_t of) { return slot(py::int_(of)); });
      for (const int32_t id : numbers(step[2])) {
        read.op->results.push_back(id < 0 ? kNone : slot(py::int_(id)));
      }
    } else {
      TORCH_CHECK_VALUE(kind == "free" || kind == "bump", "no step is called ", kind);
      made.kind = kind == "free" ? Kind::free : Kind::bump;
      for (const py::handle of : step[1]) read.words.push_back(slot(of));
    }
    made.count = static_cast<int32_t>(read.words.size());
    return read;
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
          const auto dict = py::cast<py::dict>(each);
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

  // An operator without its results.
  template <class F>
  Operator read_operator(const std::string& called, const py::handle& positional,
                         const py::handle& named, const F& resolve) {
    const size_t dot = called.find('.', called.find("::"));
    const std::string base = called.substr(0, dot);
    std::string overload = dot == std::string::npos ? "" : called.substr(dot + 1);
    if (overload == "default") overload = "";
    Operator made{c10::Dispatcher::singleton().findSchemaOrThrow(base.c_str(), overload.c_str()),
                  {}, {}, false};
    const c10::FunctionSchema& schema = made.handle.schema();
    const auto args = py::cast<py::list>(positional);
    const auto kwargs = py::cast<py::dict>(named);
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
    return made;
  }

  void add_operator(Operator&& op) {
    const size_t returned = op.handle.schema().returns().size();
    TORCH_CHECK_VALUE(op.is_list || op.results.size() <= returned, op.handle.operator_name().name,
                      " has ", returned, " results, wanted ", op.results.size());
    if (add_linear(op)) return;
    if (add_collective(op)) return;
    Step step{Kind::op};
    step.value = static_cast<int32_t>(operators_.size());
    operators_.push_back(std::move(op));
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
    for (const int64_t n : made.n) {
      made.layouts.push_back(layout({kNone, static_cast<int32_t>(n)}));
    }
    for (size_t i = 0; i < made.results.size() && i < made.layouts.size(); ++i) {
      if (made.results[i] != kNone) registers_[made.results[i]].layout = made.layouts[i];
    }
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

  // False where it is none, or one of those with more arguments.
  bool add_collective(const Operator& op) {
    const std::string& called = op.handle.operator_name().name;
    const bool fused = called == "splitpoint::allreduce_rmsnorm" &&
                       op.handle.operator_name().overload_name == "both";
    if (!fused && called != "splitpoint::all_reduce") return false;
    const size_t tensors = fused ? 3 : 1;
    std::array<Operand, 3> operands{kNone, kNone, kNone};
    for (size_t i = 0; i < op.arguments.size(); ++i) {
      const OpArgument& each = op.arguments[i];
      const bool none = each.kind == OpArgument::Kind::constant && each.constant.isNone();
      if (i >= tensors) {
        if (each.kind != OpArgument::Kind::constant) return false;
      } else if (each.kind == OpArgument::Kind::tensor) {
        operands[i] = each.items[0];
      } else if (!none || i != 1) {
        return false;
      }
    }
    const auto constant = [&](size_t i) -> const c10::IValue& { return op.arguments[i].constant; };
    const auto text = [&](size_t i) { return constant(i).toStringRef(); };
    CollectiveStep made{
        fused ? Collective(text(3), text(6), constant(4).toDouble(), constant(5).toDouble())
              : Collective(text(1), text(2)),
        operands[0], operands[1], operands[2], {kNone, kNone}};
    std::copy(op.results.begin(), op.results.end(), made.results.begin());
    Step step{Kind::collective};
    step.value = static_cast<int32_t>(collectives_.size());
    collectives_.push_back(std::move(made));
    steps_.push_back(step);
    return true;
  }

  // Finds the collectives that may write over what they read: it is freed right after them, and
  // is not given to them twice.
  void note_last_reads() {
    for (size_t at = 0; at < steps_.size(); ++at) {
      if (steps_[at].kind != Kind::collective) continue;
      CollectiveStep& each = collectives_[steps_[at].value];
      const auto freed = [&](Operand operand) {
        for (size_t next = at + 1; next < steps_.size() && steps_[next].kind == Kind::free; ++next) {
          for (int32_t i = 0; i < steps_[next].count; ++i) {
            if (words_[steps_[next].first + 2 * i] == operand) return true;
          }
        }
        return false;
      };
      const bool fused = each.call.has_norm();
      each.last = freed(each.x) && each.x != each.residual && each.x != each.weight &&
                  (!fused || (freed(each.residual) && each.residual != each.weight));
    }
  }

  const size_t inputs_, bound_;
  std::vector<Step> steps_;
  std::vector<int32_t> words_;
  std::vector<Expression> values_;
  std::vector<std::string> texts_;
  std::vector<void*> kernels_;
  std::vector<Operator> operators_;
  std::vector<Linear> linear_;
  std::vector<CollectiveStep> collectives_;
  std::vector<Operand> outputs_;
  std::map<std::vector<int32_t>, int32_t> layouts_;
  SparePool pool_;
  // Only while it is made:
  struct Register {
    int32_t names;
    int32_t layout = kNone;    // of the tensor it holds, where another step could use it again
    Operand viewed = kNone;    // the register whose memory it views
  };
  std::vector<Register> registers_;
  std::vector<Operand> free_;
  std::unordered_map<std::string, int32_t> value_index_;
  std::unordered_map<int32_t, Operand> outer_;
  std::vector<Piece> pieces_;
};

}  // namespace splitpoint::runner
