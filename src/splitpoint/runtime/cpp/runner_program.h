// A program of the runner: read once, then run again and again.
#pragma once

#include <pybind11/pybind11.h>  // first: it includes Python.h

#include <ATen/EmptyTensor.h>
#include <ATen/record_function.h>
#include <c10/util/SmallVector.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/inductor/inductor_ops.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "pool.h"
#include "runner_reader.h"

namespace splitpoint::runner {

namespace py = pybind11;

class Program : private ProgramCode {
 public:
  Program(const py::list& pieces, const py::list& steps, size_t inputs, size_t bound,
          const py::list& outputs)
      : ProgramCode(ProgramReader(pieces, steps, inputs, bound, outputs).take_code()) {
    for (const Expression& each : values_) lengths_ = std::max(lengths_, each.lengths);
  }

  // How many lengths of dynamic dimensions a call needs to have.
  size_t lengths() const { return lengths_; }

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

  size_t frame_size() const { return frame_size_; }

  void run(const Lengths& given, Frame& frame, const Binding& binding, const Tensor* arguments) {
    std::unique_ptr<Pool> pool = pool_.take();
    pool->prepare(given, layouts_.size());
    run(given, frame, binding, arguments, *pool);
    pool_.put_back(std::move(pool));
  }

 private:
  void run(const Lengths& given, Frame& frame, const Binding& binding, const Tensor* arguments,
           Pool& pool) const {
    c10::SmallVector<int64_t, 128> values(values_.size());
    for (size_t i = 0; i < values_.size(); ++i) values[i] = values_[i](given);
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
        case Kind::dtype:
          check_dtype(tensor(step.src), step.dtype, step.text);
          break;
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
                                          layer.activation, layer.gated, layer.batch_invariant,
                                          layer.round_x)
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

  void check_dtype(const Tensor& tensor, at::ScalarType dtype, int32_t text) const {
    if (C10_LIKELY(tensor.scalar_type() == dtype)) return;
    TORCH_CHECK(false, "expected dtype ", dtype, " but got ", tensor.scalar_type(),
                "\nError in op: ", text < 0 ? std::string("?") : texts_[text]);
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

  size_t lengths_ = 1;
  SparePool pool_;
};

}  // namespace splitpoint::runner
