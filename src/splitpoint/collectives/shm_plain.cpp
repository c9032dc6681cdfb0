// All-reduce, reduce-scatter and all-gather over shared memory, as torch operators. Compiled
// without instruction set flags.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/library.h>

#include <optional>
#include <string_view>

#include "shm_workspace.h"

namespace splitpoint {
namespace {

// The sum of a contiguous tensor over the ranks, into one that may be the same.
void run_all_reduce(Workspace& workspace, const Tensor& input, const Tensor& out,
                    std::string_view name) {
  const int64_t count = input.numel();
  Call call{};
  call.operation = Operation::all_reduce;
  call.rows = count;
  workspace.checked([&] {
    call.element = element_of(input, "input");
    call.algorithm = workspace.algorithm(name, count * bytes_of(call.element), Quant::none);
  });
  const int64_t item = bytes_of(call.element);
  const auto* from = static_cast<const char*>(input.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const NormTable* table = kernels();
  const Copier copier{table, in_threads, workspace.past_caches()};
  Results results;
  results.add(to, item);
  const int64_t slot = workspace.slot_bytes();
  const int64_t most = std::min(slot / item, results.fitting(slot, workspace.ranks()));
  const Chunks chunks(count, most / 64 * 64);

  workspace.run([&](Channel& channel) {
    const auto compute = [&](const char* const* sources, int64_t first, int64_t begin,
                             int64_t end) {
      SumArgs args{};
      std::copy_n(sources, channel.ranks(), args.sources);
      args.ranks = channel.ranks();
      args.out = to + first * item;
      args.element = call.element;
      table->sum(args, begin, end);
    };
    if (call.algorithm == Algorithm::two_shot) {
      two_shot(channel, call, copier, chunks, from, item, results, [] {}, compute);
      return;
    }
    one_shot(
        channel, call, chunks,
        [&](char* slot_of_rank, int64_t first, int64_t size) {
          copier.share(slot_of_rank, from + first * item, size * item);
        },
        [] {},
        [&](uint32_t chunk, int64_t first, int64_t size) {
          const char* sources[kMostRanks];
          for (int peer = 0; peer < channel.ranks(); ++peer) {
            sources[peer] = peer == channel.rank() ? from + first * item
                                                   : channel.slot(peer, Stage::inputs, chunk);
          }
          spread(in_threads, size, grain_of(item), [&](int64_t begin, int64_t end) {
            compute(sources, first, begin, end);
          });
        });
  });
}

Tensor all_reduce(const Tensor& input_given, std::string_view group, std::string_view name) {
  const std::shared_ptr<Workspace> workspace = find_workspace(group);
  if (!workspace || name == "reference") {
    if (workspace) meet_for_reference(*workspace);
    static const auto reference =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("splitpoint_reference::all_reduce", "")
            .typed<Tensor(const Tensor&, std::string_view, std::string_view)>();
    return reference.call(input_given, group, name);
  }
  workspace->checked([&] { element_of(input_given, "input"); });
  const Tensor input = input_given.contiguous();
  const Tensor out = at::cpu::empty(input.sizes(), at::TensorOptions().dtype(input.scalar_type()));
  run_all_reduce(*workspace, input, out, name);
  return out;
}

void all_reduce_(const Tensor& input, std::string_view group, std::string_view name) {
  const std::shared_ptr<Workspace> workspace = find_workspace(group);
  if (!workspace || name == "reference") {
    if (workspace) meet_for_reference(*workspace);
    static const auto reference =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("splitpoint_reference::all_reduce_", "")
            .typed<void(const Tensor&, std::string_view, std::string_view)>();
    reference.call(input, group, name);
    return;
  }
  workspace->checked([&] {
    TORCH_CHECK_VALUE(input.is_contiguous(), "input must be contiguous to be written in place");
  });
  run_all_reduce(*workspace, input, input, name);
}

Tensor reduce_scatter(const Tensor& input_given, std::string_view group) {
  const std::shared_ptr<Workspace> workspace = find_workspace(group);
  if (!workspace) {
    static const auto reference =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("splitpoint_reference::reduce_scatter", "")
            .typed<Tensor(const Tensor&, std::string_view)>();
    return reference.call(input_given, group);
  }
  const int ranks = workspace->ranks();
  Call call{};
  call.operation = Operation::reduce_scatter;
  call.rows = input_given.numel();
  workspace->checked([&] {
    call.element = element_of(input_given, "input");
    TORCH_CHECK_VALUE(input_given.dim() > 0 && input_given.size(0) % ranks == 0,
                      "reduce_scatter splits dimension 0 evenly over ", ranks,
                      " ranks, and the input's shape is ", input_given.sizes(),
                      ": pad it to a multiple of ", ranks);
  });
  const Tensor input = input_given.contiguous();
  c10::SmallVector<int64_t, 5> sizes(input.sizes().begin(), input.sizes().end());
  sizes[0] /= ranks;
  const Tensor out = at::cpu::empty(sizes, at::TensorOptions().dtype(input.scalar_type()));
  const int64_t item = bytes_of(call.element), count = out.numel();
  const auto* from = static_cast<const char*>(input.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const NormTable* table = kernels();
  const Copier copier{table, in_threads, workspace->past_caches()};
  // A slot holds a chunk of each rank's share, one after the other.
  const int64_t part = workspace->slot_bytes() / ranks / 64 * 64;
  const Chunks chunks(count, part / item);

  workspace->run([&](Channel& channel) {
    const int rank = channel.rank();
    one_shot(
        channel, call, chunks,
        [&](char* slot, int64_t first, int64_t size) {
          for (int peer = 0; peer < ranks; ++peer) {
            if (peer == rank) continue;
            copier.share(slot + peer * part, from + (peer * count + first) * item, size * item);
          }
        },
        [] {},
        [&](uint32_t chunk, int64_t first, int64_t size) {
          SumArgs args{};
          for (int peer = 0; peer < ranks; ++peer) {
            args.sources[peer] = peer == rank
                                     ? from + (rank * count + first) * item
                                     : channel.slot(peer, Stage::inputs, chunk) + rank * part;
          }
          args.ranks = ranks;
          args.out = to + first * item;
          args.element = call.element;
          spread(in_threads, size, grain_of(item),
                 [&](int64_t begin, int64_t end) { table->sum(args, begin, end); });
        });
  });
  return out;
}

Tensor all_gather(const Tensor& input_given, std::string_view group) {
  const std::shared_ptr<Workspace> workspace = find_workspace(group);
  if (!workspace) {
    static const auto reference = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow("splitpoint_reference::all_gather", "")
                                      .typed<Tensor(const Tensor&, std::string_view)>();
    return reference.call(input_given, group);
  }
  const int ranks = workspace->ranks();
  const Tensor input = input_given.contiguous();
  const int64_t bytes = static_cast<int64_t>(input.nbytes());
  Call call{};
  call.operation = Operation::all_gather;
  call.rows = bytes;
  workspace->checked([&] {
    TORCH_CHECK_VALUE(input.dim() > 0,
                      "all_gather joins along dimension 0, and the input is a scalar");
  });
  c10::SmallVector<int64_t, 5> sizes(input.sizes().begin(), input.sizes().end());
  sizes[0] *= ranks;
  const Tensor out = at::cpu::empty(sizes, at::TensorOptions().dtype(input.scalar_type()));
  const auto* from = static_cast<const char*>(input.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const Copier copier{kernels(), in_threads,
                      workspace->past_caches()};
  const Chunks chunks(bytes, workspace->slot_bytes());

  workspace->run([&](Channel& channel) {
    one_shot(
        channel, call, chunks,
        [&](char* slot, int64_t first, int64_t size) { copier.share(slot, from + first, size); },
        [] {},
        [&](uint32_t chunk, int64_t first, int64_t size) {
          for (int peer = 0; peer < ranks; ++peer) {
            const char* source = peer == channel.rank()
                                     ? from + first
                                     : channel.slot(peer, Stage::inputs, chunk);
            char* target = to + peer * bytes + first;
            spread(in_threads, size, kBytesWorthAThread, [&](int64_t begin, int64_t end) {
              std::memcpy(target + begin, source + begin, end - begin);
            });
          }
        });
  });
  return out;
}

}  // namespace

// Their schemas are in ops.py, where they are served by the reference before this is loaded.
TORCH_LIBRARY_IMPL(splitpoint, CPU, m) {
  m.impl("all_reduce", all_reduce);
  m.impl("all_reduce_", all_reduce_);
  m.impl("reduce_scatter", reduce_scatter);
  m.impl("all_gather", all_gather);
}

}  // namespace splitpoint
