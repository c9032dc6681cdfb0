// What a program of the runner is: flat lists of steps and of what they name.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "runner_expression.h"
#include "runner_steps.h"

namespace splitpoint::runner {

struct ProgramCode {
  size_t inputs_, bound_;
  size_t frame_size_ = 0;  // tensors in a frame
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
};

}  // namespace splitpoint::runner
