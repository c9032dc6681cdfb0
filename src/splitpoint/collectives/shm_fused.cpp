// All-reduce, residual add, RMSNorm and quantisation over shared memory, as torch operators.
// Compiled without instruction set flags.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "shm_workspace.h"

namespace splitpoint {
namespace {

struct Fused {
  const Tensor& input;
  const Tensor* residual;
  const Tensor& weight;
  const Tensor* quant_scale;
  Quant quant;
  double eps, weight_bias;
  std::string_view algorithm;
  // Where results go, null where they are not wanted.
  void *norm, *residual_out, *quantised, *scales;
  bool only_moves = false;  // NormTable::move instead of NormTable::fused, and no weight
};

// What must hold of the arguments whichever form they come in.
void check(const Tensor& input, const Tensor* residual, const Tensor& weight,
           const Tensor* quant_scale, Quant quant) {
  element_of(input, "input");
  TORCH_CHECK_VALUE(input.dim() > 0, "input must be [..., hidden], got a scalar");
  const int64_t hidden = input.size(-1);
  element_of(weight, "weight");
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == hidden, "weight must be [", hidden,
                    "] as the input, got ", weight.sizes());
  TORCH_CHECK_TYPE(weight.device().is_cpu(), "weight must be on the CPU, got ", weight.device());
  if (residual) {
    TORCH_CHECK_VALUE(residual->sizes() == input.sizes(),
                      "residual must have the input's shape ", input.sizes(), ", got ",
                      residual->sizes());
    TORCH_CHECK_TYPE(residual->scalar_type() == input.scalar_type() ||
                         residual->scalar_type() == at::kFloat,
                     "residual must be of the input's dtype ", input.scalar_type(),
                     " or float32, got ", residual->scalar_type());
    TORCH_CHECK_TYPE(residual->device().is_cpu(), "residual must be on the CPU, got ",
                     residual->device());
  }
  const bool scaled = quant == Quant::fp8_static || quant == Quant::nvfp4;
  TORCH_CHECK_VALUE((quant_scale != nullptr) == scaled,
                    "quant_scale goes with fp8_static and nvfp4 and with nothing else");
  if (quant_scale) {
    TORCH_CHECK_VALUE(quant_scale->numel() == 1 && quant_scale->scalar_type() == at::kFloat &&
                          quant_scale->device().is_cpu(),
                      "quant_scale must be one float32 on the CPU");
  }
  TORCH_CHECK_VALUE(quant != Quant::nvfp4 || hidden % kFp4Block == 0, "nvfp4 shares a scale "
                    "between 16 values, and hidden is ", hidden);
}

// All tensors are contiguous by now.
void run_fused(Workspace& workspace, const Fused& f) {
  const Element element = element_of(f.input, "input");
  const int64_t hidden = f.input.size(-1);
  const int64_t rows = hidden ? f.input.numel() / hidden : 0;
  const int64_t item = bytes_of(element);
  const int64_t row_bytes = hidden * item;
  const bool wide = f.residual && f.residual->scalar_type() == at::kFloat && element != Element::f32;
  const int64_t kept_bytes = hidden * (wide ? 4 : item);
  const int64_t quantised_bytes = f.quant == Quant::nvfp4 ? hidden / 2 : hidden;
  const int64_t scales_bytes = f.quant == Quant::nvfp4 ? hidden / kFp4Block : 4;

  Results results;
  results.add(f.norm, row_bytes);
  results.add(f.residual_out, kept_bytes);
  results.add(f.quantised, quantised_bytes);
  results.add(f.scales, scales_bytes);

  Algorithm algorithm{};
  int64_t most = 1;
  workspace.checked([&] {
    algorithm = workspace.algorithm(f.algorithm, rows * row_bytes, f.quant);
    const int64_t slot = workspace.slot_bytes();
    most = fitting(workspace, row_bytes, slot / std::max<int64_t>(1, row_bytes));
    if (algorithm == Algorithm::two_shot) {
      const int64_t shared = results.fitting(slot, workspace.ranks());
      if (shared < 1 && f.algorithm != "two_shot") {
        algorithm = Algorithm::one_shot;  // which shares no results
      } else {
        const int64_t whole = results.unit_bytes() + 64 * Results::kMost;
        most = std::min(most, fitting(workspace, whole, shared));
      }
    }
  });

  const Call call{f.only_moves ? Operation::movement : Operation::allreduce_rmsnorm,
                  algorithm, element, f.quant, f.residual != nullptr, wide, f.norm != nullptr,
                  f.residual_out != nullptr, rows, hidden, static_cast<float>(f.eps),
                  static_cast<float>(f.weight_bias)};
  const NormTable* table = kernels();
  const auto kernel = f.only_moves ? table->move : table->fused;
  const Copier copier{table, in_threads, workspace.past_caches()};
  const Chunks chunks(rows, most);

  FusedArgs args{};
  args.ranks = workspace.ranks();
  args.rank = workspace.rank();
  args.hidden = hidden;
  args.eps = call.eps;
  args.quant_scale = f.quant_scale ? *f.quant_scale->const_data_ptr<float>() : 1.0f;
  args.input = element;
  args.residual_type = wide ? Element::f32 : element;
  args.quant = f.quant;

  const auto* input = static_cast<const char*>(f.input.const_data_ptr());
  const auto* residual =
      f.residual ? static_cast<const char*>(f.residual->const_data_ptr()) : nullptr;
  const auto at_row = [](void* base, int64_t bytes) -> void* {
    return base ? static_cast<char*>(base) + bytes : nullptr;
  };

  workspace.run([&](Channel& channel) {
    const auto prepare_weight = [&] {
      if (f.only_moves) return;
      const Element type = element_of(f.weight, "weight");
      const void* from = f.weight.const_data_ptr();
      if ((type == Element::f32 || type == element) && call.weight_bias == 0) {
        args.weight = from;
        args.weight_type = type;
        return;
      }
      if (static_cast<int64_t>(workspace.weight.size()) < hidden) workspace.weight.resize(hidden);
      table->add_bias(from, type, call.weight_bias, workspace.weight.data(), hidden);
      args.weight = workspace.weight.data();
      args.weight_type = Element::f32;
    };
    // Rows begin to end of the chunk that starts at row `first`.
    const auto compute = [&](const char* const* sources, int64_t first, int64_t begin,
                             int64_t end) {
      FusedArgs a = args;
      std::copy_n(sources, a.ranks, a.sources);
      a.residual = residual ? residual + first * kept_bytes : nullptr;
      a.norm = at_row(f.norm, first * row_bytes);
      a.residual_out = at_row(f.residual_out, first * kept_bytes);
      a.quantised = static_cast<uint8_t*>(at_row(f.quantised, first * quantised_bytes));
      a.scales = at_row(f.scales, first * scales_bytes);
      kernel(a, begin, end);
    };
    if (algorithm == Algorithm::two_shot) {
      two_shot(channel, call, copier, chunks, input, row_bytes, results, prepare_weight, compute);
      return;
    }
    one_shot(
        channel, call, chunks,
        [&](char* slot, int64_t first, int64_t count) {
          copier.share(slot, input + first * row_bytes, count * row_bytes);
        },
        prepare_weight,
        [&](uint32_t chunk, int64_t first, int64_t count) {
          const char* sources[kMostRanks];
          for (int peer = 0; peer < channel.ranks(); ++peer) {
            sources[peer] = peer == channel.rank() ? input + first * row_bytes
                                                   : channel.slot(peer, Stage::inputs, chunk);
          }
          spread(in_threads, count, grain_of(row_bytes), [&](int64_t begin, int64_t end) {
            compute(sources, first, begin, end);
          });
        });
  });
}

using FusedResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

const Tensor* present(const std::optional<Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? &*tensor : nullptr;
}

Tensor contiguous_or_none(const std::optional<Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor->contiguous() : Tensor();
}

FusedResults allreduce_rmsnorm(const Tensor& input_given,
                               const std::optional<Tensor>& residual_given,
                               const Tensor& weight_given,
                               const std::optional<Tensor>& quant_scale, std::string_view group,
                               double eps, double weight_bias, std::string_view quant_name,
                               bool want_norm, bool want_residual, std::string_view algorithm) {
  const std::shared_ptr<Workspace> workspace = find_workspace(group);
  if (!workspace || algorithm == "reference") {
    if (workspace) meet_for_reference(*workspace);
    static const auto reference =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("splitpoint_reference::allreduce_rmsnorm", "")
            .typed<FusedResults(const Tensor&, const std::optional<Tensor>&, const Tensor&,
                                const std::optional<Tensor>&, std::string_view, double, double,
                                std::string_view, bool, bool, std::string_view)>();
    return reference.call(input_given, residual_given, weight_given, quant_scale, group, eps,
                          weight_bias, quant_name, want_norm, want_residual, algorithm);
  }
  Quant quant{};
  workspace->checked([&] {
    quant = quant_of(quant_name);
    check(input_given, present(residual_given), weight_given, present(quant_scale), quant);
  });
  const Tensor input = input_given.contiguous();
  const Tensor residual = contiguous_or_none(residual_given);
  const Tensor weight = weight_given.contiguous();

  const auto empty = [](at::IntArrayRef sizes, at::ScalarType dtype) {
    return at::cpu::empty(sizes, at::TensorOptions().dtype(dtype));
  };
  constexpr int64_t kNothing[1] = {0};
  const bool quantises = quant != Quant::none;
  c10::SmallVector<int64_t, 5> quantised_sizes(1, 0), scales_sizes(1, 0);
  if (quantises) quantised_sizes.assign(input.sizes().begin(), input.sizes().end());
  if (quant == Quant::nvfp4) quantised_sizes.back() /= 2;
  if (quant == Quant::fp8_token || quant == Quant::nvfp4) {
    scales_sizes.assign(input.sizes().begin(), input.sizes().end());
    scales_sizes.back() = quant == Quant::nvfp4 ? input.size(-1) / kFp4Block : 1;
  }
  FusedResults made{
      empty(want_norm ? input.sizes() : kNothing, input.scalar_type()),
      empty(want_residual ? input.sizes() : kNothing,
            residual.defined() ? residual.scalar_type() : input.scalar_type()),
      empty(quantised_sizes,
            quantises && quant != Quant::nvfp4 ? at::kFloat8_e4m3fn : at::kByte),
      empty(scales_sizes, quant == Quant::nvfp4 ? at::kFloat8_e4m3fn : at::kFloat)};
  const auto& [norm, kept, quantised, scales] = made;
  const auto target = [](const Tensor& tensor, bool wanted) {
    return wanted ? tensor.mutable_data_ptr() : nullptr;
  };
  run_fused(*workspace,
            {input, residual.defined() ? &residual : nullptr, weight, present(quant_scale), quant,
             eps, weight_bias, algorithm, target(norm, want_norm), target(kept, want_residual),
             target(quantised, quantises),
             target(scales, quant == Quant::fp8_token || quant == Quant::nvfp4)});
  return made;
}

using NormAndSum = std::tuple<Tensor, Tensor>;

NormAndSum allreduce_rmsnorm_both(const Tensor& input_given,
                                  const std::optional<Tensor>& residual_given,
                                  const Tensor& weight_given, std::string_view group, double eps,
                                  double weight_bias, std::string_view algorithm) {
  const std::shared_ptr<Workspace> workspace = find_workspace(group);
  if (!workspace || algorithm == "reference") {
    if (workspace) meet_for_reference(*workspace);
    static const auto reference =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("splitpoint_reference::allreduce_rmsnorm", "both")
            .typed<NormAndSum(const Tensor&, const std::optional<Tensor>&, const Tensor&,
                              std::string_view, double, double, std::string_view)>();
    return reference.call(input_given, residual_given, weight_given, group, eps, weight_bias,
                          algorithm);
  }
  workspace->checked([&] {
    check(input_given, present(residual_given), weight_given, nullptr, Quant::none);
  });
  const Tensor input = input_given.contiguous();
  const Tensor residual = contiguous_or_none(residual_given);
  const Tensor weight = weight_given.contiguous();
  const Tensor& like = residual.defined() ? residual : input;
  NormAndSum made{
      at::cpu::empty(input.sizes(), at::TensorOptions().dtype(input.scalar_type())),
      at::cpu::empty(input.sizes(), at::TensorOptions().dtype(like.scalar_type()))};
  run_fused(*workspace, {input, residual.defined() ? &residual : nullptr, weight, nullptr,
                         Quant::none, eps, weight_bias, algorithm,
                         std::get<0>(made).mutable_data_ptr(), std::get<1>(made).mutable_data_ptr(),
                         nullptr, nullptr});
  return made;
}

void allreduce_rmsnorm_(const Tensor& input, const std::optional<Tensor>& residual_given,
                        const Tensor& weight_given, std::string_view group, double eps,
                        double weight_bias, std::string_view algorithm) {
  const std::shared_ptr<Workspace> workspace = find_workspace(group);
  if (!workspace || algorithm == "reference") {
    if (workspace) meet_for_reference(*workspace);
    static const auto reference =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("splitpoint_reference::allreduce_rmsnorm_", "")
            .typed<void(const Tensor&, const std::optional<Tensor>&, const Tensor&,
                        std::string_view, double, double, std::string_view)>();
    reference.call(input, residual_given, weight_given, group, eps, weight_bias, algorithm);
    return;
  }
  const Tensor* residual = present(residual_given);
  workspace->checked([&] {
    check(input, residual, weight_given, nullptr, Quant::none);
    TORCH_CHECK_VALUE(input.is_contiguous() && (!residual || residual->is_contiguous()),
                      "input and residual must be contiguous to be written in place");
  });
  const Tensor weight = weight_given.contiguous();
  run_fused(*workspace, {input, residual, weight, nullptr, Quant::none, eps, weight_bias, algorithm,
                         input.mutable_data_ptr(),
                         residual ? residual->mutable_data_ptr() : nullptr, nullptr, nullptr});
}

// What allreduce_rmsnorm_ moves, one-shot, without its arithmetic: the floor of a measurement.
void move_(const Tensor& input, const std::optional<Tensor>& residual_given,
           std::string_view group) {
  const std::shared_ptr<Workspace> workspace = find_workspace(group);
  TORCH_CHECK_VALUE(workspace, "group '", group, "' has no workspace: attach one first");
  const Tensor* residual = present(residual_given);
  workspace->checked([&] {
    element_of(input, "input");
    TORCH_CHECK_VALUE(input.dim() > 0 && input.is_contiguous() &&
                          (!residual || (residual->is_contiguous() &&
                                         residual->sizes() == input.sizes() &&
                                         residual->scalar_type() == input.scalar_type())),
                      "input must be contiguous [..., hidden], and the residual the same");
  });
  Fused moved{input, residual, input, nullptr, Quant::none, 0, 0, "one_shot",
              input.mutable_data_ptr(), residual ? residual->mutable_data_ptr() : nullptr,
              nullptr, nullptr};
  moved.only_moves = true;
  run_fused(*workspace, moved);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(splitpoint, m) {
  m.def("shm_move_(Tensor(a!) input, Tensor(b!)? residual, str group) -> ()", move_);
}

// Their schemas are in ops.py, where they are served by the reference before this is loaded.
TORCH_LIBRARY_IMPL(splitpoint, CPU, m) {
  m.impl("allreduce_rmsnorm", allreduce_rmsnorm);
  m.impl("allreduce_rmsnorm.both", allreduce_rmsnorm_both);
  m.impl("allreduce_rmsnorm_", allreduce_rmsnorm_);
}

}  // namespace splitpoint
