// The collective operators over shared memory: which workspace serves a group, what is checked,
// allocated and split into threads. Compiled without instruction set flags.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/library.h>

#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "shm_algorithms.h"

namespace splitpoint {
namespace {

using at::Tensor;

// --- the instruction set ---------------------------------------------------------------

struct Candidate {
  const NormTable* table;
  bool runs;
};

// Best first. __builtin_cpu_supports also asks whether the system saves the registers.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = [] {
    std::vector<Candidate> found;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    found.push_back({&kNormAvx512Bf16, avx512 && __builtin_cpu_supports("avx512bf16")});
    found.push_back({&kNormAvx512, avx512});
    found.push_back({&kNormAvx2, avx2});
#endif
    found.push_back({&kNormPortable, true});
    return found;
  }();
  return all;
}

std::atomic<const NormTable*>& chosen() {
  static std::atomic<const NormTable*> table{[] {
    for (const Candidate& each : candidates()) {
      if (each.runs) return each.table;
    }
    return &kNormPortable;
  }()};
  return table;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& each : candidates()) {
    if (each.runs) names.emplace_back(each.table->name);
  }
  return names;
}

void use_instruction_set(std::string_view name) {
  for (const Candidate& each : candidates()) {
    if (each.runs && (name == each.table->name || name == "best")) {
      chosen() = each.table;
      return;
    }
  }
  TORCH_CHECK_VALUE(false, "this CPU has no instruction set named '", name, "'");
}

// --- threads ---------------------------------------------------------------------------

// torch's own intra-op threads, through its C interface: linking OpenMP here could bring a
// second runtime, with threads of its own, into the process.
void in_threads(int64_t count, int64_t grain, void (*run)(int64_t, int64_t, void*),
                void* context) {
  TORCH_CHECK(torch_parallel_for(0, count, grain, run, context) == 0,
              "splitpoint: a thread of a collective failed");
}

// --- workspaces ------------------------------------------------------------------------

// How often this process is the child of a fork: it shares the memory with its parent, but is no
// rank of its own.
std::atomic<uint32_t> forks{0};

class Workspace {
 public:
  Workspace(const std::string& group, int fd, const Peers& peers, int64_t slot_bytes,
            const Patience& patience)
      : bytes_(segment_bytes(peers.ranks, slot_bytes)),
        memory_(map(fd, bytes_)),
        peers_(peers),
        born_(forks.load()),
        channel_(group, memory_, slot_bytes, peers, patience) {}

  Workspace(const Workspace&) = delete;

  ~Workspace() {
    munmap(memory_, bytes_);
    for (int peer = 0; peer < peers_.ranks; ++peer) {
      if (peers_.pidfds[peer] >= 0) close(peers_.pidfds[peer]);
    }
  }

  static char* map(int fd, int64_t bytes) {
    struct stat found {};
    TORCH_CHECK(fstat(fd, &found) == 0 && found.st_size == bytes,
                "splitpoint: the shared memory is of ", found.st_size, " bytes and should be of ",
                bytes);
    void* memory =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    TORCH_CHECK(memory != MAP_FAILED, "splitpoint: cannot map ", bytes,
                " bytes of shared memory: ", strerror(errno));
    return static_cast<char*>(memory);
  }

  // Runs work(channel), one call at a time.
  template <class Work>
  void run(const Work& work) {
    TORCH_CHECK(born_ == forks.load(std::memory_order_relaxed),
                "splitpoint: this process was forked after its workspace was attached, and is no "
                "rank of its group: call collectives in the process that attached it");
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      work(channel_);
    } catch (const Failure& failure) {
      C10_THROW_ERROR(DistBackendError, failure.what());
    }
  }

  // Raises an error of the caller's; the other ranks learn that this one does not make the call.
  template <class Check>
  void checked(const Check& check) {
    try {
      check();
    } catch (const c10::Error&) {
      try {
        run([](Channel& channel) {
          Call call{};
          call.operation = Operation::refused;
          channel.meet(call);
        });
      } catch (const c10::DistBackendError&) {
        // The others report it; here the arguments are what matters.
      }
      throw;
    }
  }

  void leave() { channel_.leave(); }

  int rank() const { return peers_.rank; }
  int ranks() const { return peers_.ranks; }
  int64_t slot_bytes() const { return channel_.slot_bytes(); }

  bool past_caches() const { return past_caches_.load(std::memory_order_relaxed); }
  void set_past_caches(bool value) { past_caches_ = value; }

  std::vector<float> weight;  // with its bias added, for the call that runs

 private:
  const int64_t bytes_;
  char* const memory_;
  const Peers peers_;
  const uint32_t born_;
  std::atomic<bool> past_caches_{false};
  std::mutex mutex_;
  Channel channel_;
};

std::shared_mutex registry_mutex;
std::map<std::string, std::shared_ptr<Workspace>, std::less<>>& registry() {
  static std::map<std::string, std::shared_ptr<Workspace>, std::less<>> all;
  return all;
}

// The group's workspace, or null.
std::shared_ptr<Workspace> find(std::string_view group) {
  const std::shared_lock<std::shared_mutex> lock(registry_mutex);
  const auto found = registry().find(group);
  return found == registry().end() ? nullptr : found->second;
}

void initialise(int64_t fd, int64_t ranks, int64_t slot_bytes) {
  const int64_t bytes = segment_bytes(static_cast<int>(ranks), slot_bytes);
  char* memory = Workspace::map(static_cast<int>(fd), bytes);
  reinterpret_cast<Header*>(memory)->initialise();
  munmap(memory, bytes);
}

void attach(const std::string& group, int64_t fd, int64_t rank, const std::vector<int64_t>& pids,
            const std::vector<int64_t>& pidfds, int64_t slot_bytes, double timeout_s,
            double spin_s, double yield_s) {
  Peers peers{};
  peers.rank = static_cast<int>(rank);
  peers.ranks = static_cast<int>(pids.size());
  for (int peer = 0; peer < peers.ranks; ++peer) {
    peers.pids[peer] = static_cast<int>(pids[peer]);
    peers.pidfds[peer] = static_cast<int>(pidfds[peer]);
  }
  const auto ns = [](double seconds) { return static_cast<int64_t>(seconds * 1e9); };
  auto made = std::make_shared<Workspace>(group, static_cast<int>(fd), peers, slot_bytes,
                                          Patience{ns(spin_s), ns(yield_s), ns(timeout_s)});
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { ++forks; }); });
  const std::unique_lock<std::shared_mutex> lock(registry_mutex);
  registry()[group] = std::move(made);
}

// False when the group had none.
bool detach(std::string_view group) {
  std::shared_ptr<Workspace> found;
  {
    const std::unique_lock<std::shared_mutex> lock(registry_mutex);
    const auto at = registry().find(group);
    if (at == registry().end()) return false;
    found = std::move(at->second);
    registry().erase(at);
  }
  found->leave();
  return true;
}

bool attached(std::string_view group) { return find(group) != nullptr; }

void copy_past_caches(std::string_view group, bool value) {
  const std::shared_ptr<Workspace> workspace = find(group);
  TORCH_CHECK_VALUE(workspace, "group '", group, "' has no workspace");
  workspace->set_past_caches(value);
}

int64_t shared_bytes(int64_t ranks, int64_t slot_bytes) {
  return segment_bytes(static_cast<int>(ranks), slot_bytes);
}

// --- arguments -------------------------------------------------------------------------

Element element_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Element::f32;
    case at::kBFloat16: return Element::bf16;
    case at::kHalf: return Element::f16;
    default:
      TORCH_CHECK_TYPE(false, name, " must be bfloat16, float16 or float32, got ",
                       tensor.scalar_type());
  }
}

Quant quant_of(std::string_view name) {
  if (name == "none") return Quant::none;
  if (name == "fp8_static") return Quant::fp8_static;
  if (name == "fp8_token") return Quant::fp8_token;
  TORCH_CHECK_VALUE(name == "nvfp4", "quant must be none, fp8_static, fp8_token or nvfp4, got ",
                    name);
  return Quant::nvfp4;
}

// From how many bytes of input on two-shot is the faster one (measured: `splitpoint bench
// collective`). One-shot repeats the norm and the quantisation on every rank.
Algorithm best_algorithm(int64_t bytes, Quant quant, int ranks) {
  const int64_t limit = quant == Quant::none ? 256 << 10 : 16 << 10;
  return bytes * (ranks - 1) <= limit ? Algorithm::one_shot : Algorithm::two_shot;
}

Algorithm algorithm_of(std::string_view name, int64_t bytes, Quant quant, int ranks) {
  if (name == "one_shot") return Algorithm::one_shot;
  if (name == "two_shot") return Algorithm::two_shot;
  TORCH_CHECK_VALUE(name == "auto",
                    "algorithm must be auto, one_shot, two_shot or reference, got ", name);
  return best_algorithm(bytes, quant, ranks);
}

// How many units go through in one piece.
int64_t fitting(const Workspace& workspace, int64_t slot_bytes_needed, int64_t most) {
  TORCH_CHECK_VALUE(most >= 1, "one row takes ", slot_bytes_needed,
                    " bytes of a workspace that was attached with max_bytes=",
                    workspace.slot_bytes(), ": attach one with max_bytes of at least ",
                    round_up(slot_bytes_needed, 4096));
  return most;
}

// The ranks meet, so that one that calls for shared memory is told, and then use the group's own.
void meet_for_reference(Workspace& workspace) {
  workspace.run([](Channel& channel) {
    Call call{};
    call.operation = Operation::reference;
    channel.meet(call);
  });
}

// --- all-reduce and RMSNorm ------------------------------------------------------------

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
    algorithm = algorithm_of(f.algorithm, rows * row_bytes, f.quant, workspace.ranks());
    const int64_t slot = workspace.slot_bytes();
    most = fitting(workspace, row_bytes, slot / std::max<int64_t>(1, row_bytes));
    if (algorithm == Algorithm::two_shot) {
      const int64_t shared = results.fitting(slot, workspace.ranks());
      if (shared < 1 && f.algorithm == "auto") {
        algorithm = Algorithm::one_shot;  // which shares no results
      } else {
        const int64_t whole = results.unit_bytes() + 64 * Results::kMost;
        most = std::min(most, fitting(workspace, whole, shared));
      }
    }
  });

  const Call call{Operation::allreduce_rmsnorm, algorithm, element, f.quant,
                  f.residual != nullptr, wide, f.norm != nullptr, f.residual_out != nullptr,
                  rows, hidden, static_cast<float>(f.eps), static_cast<float>(f.weight_bias)};
  const NormTable* table = chosen().load(std::memory_order_relaxed);
  const Copier copier{table, in_threads, workspace.past_caches()};
  const Chunks chunks(rows, most);

  FusedArgs args{};
  args.ranks = workspace.ranks();
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
      const Element type = element_of(f.weight, "weight");
      const void* from = f.weight.const_data_ptr();
      if (type == Element::f32 && call.weight_bias == 0) {
        args.weight = static_cast<const float*>(from);
        return;
      }
      if (static_cast<int64_t>(workspace.weight.size()) < hidden) workspace.weight.resize(hidden);
      table->add_bias(from, type, call.weight_bias, workspace.weight.data(), hidden);
      args.weight = workspace.weight.data();
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
      table->fused(a, begin, end);
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
  const std::shared_ptr<Workspace> workspace = find(group);
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

void allreduce_rmsnorm_(const Tensor& input, const std::optional<Tensor>& residual_given,
                        const Tensor& weight_given, std::string_view group, double eps,
                        double weight_bias, std::string_view algorithm) {
  const std::shared_ptr<Workspace> workspace = find(group);
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

// --- plain collectives -----------------------------------------------------------------

Tensor all_reduce(const Tensor& input_given, std::string_view group, std::string_view name) {
  const std::shared_ptr<Workspace> workspace = find(group);
  if (!workspace || name == "reference") {
    if (workspace) meet_for_reference(*workspace);
    static const auto reference =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("splitpoint_reference::all_reduce", "")
            .typed<Tensor(const Tensor&, std::string_view, std::string_view)>();
    return reference.call(input_given, group, name);
  }
  const int64_t count = input_given.numel();
  Call call{};
  call.operation = Operation::all_reduce;
  call.rows = count;
  workspace->checked([&] {
    call.element = element_of(input_given, "input");
    call.algorithm = algorithm_of(name, count * bytes_of(call.element), Quant::none,
                                  workspace->ranks());
  });
  const Tensor input = input_given.contiguous();
  const Tensor out = at::cpu::empty(input.sizes(), at::TensorOptions().dtype(input.scalar_type()));
  const int64_t item = bytes_of(call.element);
  const auto* from = static_cast<const char*>(input.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const NormTable* table = chosen().load(std::memory_order_relaxed);
  const Copier copier{table, in_threads, workspace->past_caches()};
  Results results;
  results.add(to, item);
  const int64_t slot = workspace->slot_bytes();
  const int64_t most = std::min(slot / item, results.fitting(slot, workspace->ranks()));
  const Chunks chunks(count, most / 64 * 64);

  workspace->run([&](Channel& channel) {
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
  return out;
}

Tensor reduce_scatter(const Tensor& input_given, std::string_view group) {
  const std::shared_ptr<Workspace> workspace = find(group);
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
  const NormTable* table = chosen().load(std::memory_order_relaxed);
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
  const std::shared_ptr<Workspace> workspace = find(group);
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
  const Copier copier{chosen().load(std::memory_order_relaxed), in_threads,
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

TORCH_LIBRARY_FRAGMENT(splitpoint, m) {
  m.def("shm_bytes(int ranks, int slot_bytes) -> int", shared_bytes);
  m.def("shm_initialise(int fd, int ranks, int slot_bytes) -> ()", initialise);
  m.def(
      "shm_attach(str group, int fd, int rank, int[] pids, int[] pidfds, int slot_bytes, "
      "float timeout_s, float spin_s, float yield_s) -> ()",
      attach);
  m.def("shm_detach(str group) -> bool", detach);
  m.def("shm_attached(str group) -> bool", attached);
  m.def("shm_copy_past_caches(str group, bool value) -> ()", copy_past_caches);
  m.def("shm_instruction_sets() -> str[]", instruction_sets);
  m.def("shm_use_instruction_set(str name) -> ()", use_instruction_set);
}

// Their schemas are in ops.py, where they are served by the reference before this is loaded.
TORCH_LIBRARY_IMPL(splitpoint, CPU, m) {
  m.impl("allreduce_rmsnorm", allreduce_rmsnorm);
  m.impl("allreduce_rmsnorm_", allreduce_rmsnorm_);
  m.impl("all_reduce", all_reduce);
  m.impl("reduce_scatter", reduce_scatter);
  m.impl("all_gather", all_gather);
}

}  // namespace splitpoint
