// Linear layers for callers in C++: checked once, run again and again.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/MaybeOwned.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <string_view>

#include "linear_types.h"

namespace splitpoint {

// What the linear operators are given, beside x and the residual.
struct LinearGiven {
  at::TensorList weights;
  std::optional<at::IntArrayRef> n;  // of packed weights
  at::TensorList scales, biases;
  std::string_view activation;
  bool gated;
  bool batch_invariant = false;  // packed weights of fp32, bf16 or int8
  bool round_x = false;          // to int8, for packed weights of 4 bits; those of quads always do
};

// Layers of one x, one for each result, with all that does not depend on x's rows. They point
// into the tensors that were given, which must stay.
struct LinearLayers {
  c10::SmallVector<LinearArgs, 3> layers;
  c10::SmallVector<c10::MaybeOwned<at::Tensor>, 6> held;
  int64_t weight_bytes = 0;
  bool packed = false, rounds_x = false;
};

// Raises where weights, scales, biases or the activation do not fit each other or an x of `type`
// and [..., k].
LinearLayers linear_layers(at::ScalarType type, int64_t k, const LinearGiven& given);

// x is of the type and k that the layers were made for. The results, y, are contiguous tensors of
// x's shape but for the last dimension, which is their layer's n. Raises where the residual does
// not fit.
void run_linear(const LinearLayers& made, const at::Tensor& x, const at::Tensor* residual,
                at::ArrayRef<at::Tensor> y);

}  // namespace splitpoint
