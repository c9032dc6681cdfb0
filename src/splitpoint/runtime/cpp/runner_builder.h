// Puts a program of the runner together: registers that are used again, and steps that stand for
// this package's own operators.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "runner_code.h"

namespace splitpoint::runner {

class ProgramBuilder : protected ProgramCode {
 protected:
  // A number for tensors that differ in nothing but what they hold, at one size.
  int32_t layout(std::vector<int32_t> key) {
    return layouts_.try_emplace(std::move(key), static_cast<int32_t>(layouts_.size()))
        .first->second;
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
    if (packed) {
      made.batch_invariant = take_next().constant.toBool();
      made.round_x = take_next().constant.toBool();
    }
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

  struct Register {
    int32_t names;
    int32_t layout = kNone;    // of the tensor it holds, where another step could use it again
    Operand viewed = kNone;    // the register whose memory it views
  };
  std::vector<Register> registers_;
  std::vector<Operand> free_;
};

}  // namespace splitpoint::runner
