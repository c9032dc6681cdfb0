// All-reduces of this package as the runner calls them, alone or with what follows them in one:
// without boxing, and over their inputs where nobody else has these. At one token, taking
// apart what is boxed and making results costs as much as the sum over the ranks does.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/GradMode.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

namespace splitpoint {

// Calls the kernels of operators without asking autograd, whose answer for operators that it has
// no formula for is boxed. Where gradients are recorded it is asked.
class PastAutograd {
 public:
  PastAutograd() {
    if (!c10::GradMode::is_enabled()) below_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> below_;
};

// Whether a tensor is all of memory that torch allocated, and has one owner only.
inline bool has_one_owner(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.use_count() != 1 || !tensor.is_contiguous()) return false;
  const c10::Storage& storage = tensor.storage();
  return storage.use_count() == 1 && storage.nbytes() == tensor.nbytes() &&
         storage.data_ptr().get_deleter() == c10::GetCPUAllocator()->raw_deleter();
}

class Collective {
 public:
  using Both = std::tuple<at::Tensor, at::Tensor>;  // the norm and the sum

  // The plain all-reduce, which has no norm.
  Collective(std::string group, std::string algorithm)
      : group_(std::move(group)),
        algorithm_(std::move(algorithm)),
        reduce_(found<Reduce>("splitpoint::all_reduce", "")),
        reduce_over_(found<ReduceOver>("splitpoint::all_reduce_", "")) {}

  // With residual add and norm.
  Collective(std::string group, std::string algorithm, double eps, double weight_bias)
      : Collective(std::move(group), std::move(algorithm)) {
    eps_ = eps;
    weight_bias_ = weight_bias;
    fused_ = found<Fused>("splitpoint::allreduce_rmsnorm", "both");
    fused_over_ = found<FusedOver>("splitpoint::allreduce_rmsnorm_", "");
  }

  bool has_norm() const { return fused_.has_value(); }

  at::Tensor reduce(const at::Tensor& x) const {
    const PastAutograd past;
    return reduce_.call(x, group_, algorithm_);
  }

  // The sum lies in x.
  void reduce_over(const at::Tensor& x) const {
    const PastAutograd past;
    reduce_over_.call(x, group_, algorithm_);
  }

  Both fuse(const at::Tensor& x, const std::optional<at::Tensor>& residual,
            const at::Tensor& weight) const {
    const PastAutograd past;
    return fused_->call(x, residual, weight, group_, eps_, weight_bias_, algorithm_);
  }

  // The norm lies in x, and the sum in the residual.
  void fuse_over(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight) const {
    const PastAutograd past;
    fused_over_->call(x, residual, weight, group_, eps_, weight_bias_, algorithm_);
  }

 private:
  using Reduce = at::Tensor(const at::Tensor&, std::string_view, std::string_view);
  using ReduceOver = void(const at::Tensor&, std::string_view, std::string_view);
  using Fused = Both(const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&,
                     std::string_view, double, double, std::string_view);
  using FusedOver = void(const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&,
                         std::string_view, double, double, std::string_view);

  template <class Signature>
  static c10::TypedOperatorHandle<Signature> found(const char* name, const char* overload) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
  }

  std::string group_, algorithm_;
  c10::TypedOperatorHandle<Reduce> reduce_;
  c10::TypedOperatorHandle<ReduceOver> reduce_over_;
  std::optional<c10::TypedOperatorHandle<Fused>> fused_;
  std::optional<c10::TypedOperatorHandle<FusedOver>> fused_over_;
  double eps_ = 0, weight_bias_ = 0;
};

}  // namespace splitpoint
