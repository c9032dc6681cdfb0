// Reads a program of the runner from Python lists, once.
#pragma once

#include <pybind11/pybind11.h>  // first: it includes Python.h

#include <c10/util/SmallVector.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>

#include <algorithm>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "runner_builder.h"

// As in torch/csrc/jit/python/pybind_utils.h, whose other declarations take seconds to compile.
namespace torch::jit {
TORCH_PYTHON_API c10::IValue toIValue(pybind11::handle given, const c10::TypePtr& type,
                                      std::optional<int32_t> length);
}

namespace splitpoint::runner {

namespace py = pybind11;

class ProgramReader : private ProgramBuilder {
 public:
  // The tensors that steps read are numbered: those that are made from 0 up; of those given,
  // `bound` of the module's and `inputs` arguments, from -1 down.
  ProgramReader(const py::list& pieces, const py::list& steps, size_t inputs, size_t bound,
                const py::list& outputs) {
    inputs_ = inputs;
    bound_ = bound;
    TORCH_CHECK_VALUE(inputs < INT32_MAX / 2 && bound < INT32_MAX / 2,
                      "a program cannot take so many tensors");
    for (const py::handle piece : pieces) pieces_.push_back(read_piece(piece));
    for (const py::handle step : steps) add(py::cast<py::list>(step));
    for (const py::handle id : outputs) outputs_.push_back(outer(py::cast<int32_t>(id)));
    note_last_reads();
    TORCH_CHECK_VALUE(words_.size() < INT32_MAX && registers_.size() < INT32_MAX,
                      "a program is too long");
    frame_size_ = registers_.size();
  }

  // What was read; the reader is empty then.
  ProgramCode take_code() { return std::move(static_cast<ProgramCode&>(*this)); }

 private:
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

  int32_t text(const py::handle& what) {
    if (what.is_none()) return -1;
    texts_.push_back(py::cast<std::string>(what));
    return static_cast<int32_t>(texts_.size()) - 1;
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

  static at::ScalarType dtype(const py::handle& given) {
    TORCH_CHECK_TYPE(THPDtype_Check(given.ptr()), "a step has a dtype that is none");
    return reinterpret_cast<THPDtype*>(given.ptr())->scalar_type;
  }

  template <class F>
  PieceStep read_step(const py::list& step, const F& slot, const std::vector<int32_t>& kernels) {
    const auto kind = py::cast<std::string>(step[0]);
    PieceStep read{};
    Step& made = read.step;
    if (kind == "empty") {
      made.kind = Kind::empty;
      made.dtype = dtype(step[2]);
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
    } else if (kind == "dtype") {
      made.kind = Kind::dtype;
      made.src = slot(step[1]);
      made.dtype = dtype(step[2]);
      made.text = text(step[3]);
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

  std::unordered_map<std::string, int32_t> value_index_;
  std::unordered_map<int32_t, Operand> outer_;
  std::vector<Piece> pieces_;
};

}  // namespace splitpoint::runner
