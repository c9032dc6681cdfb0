// Workspaces by the names of their groups, and the kernels in use. Compiled without instruction set
// flags.
#include "shm_workspace.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/library.h>

#include <pthread.h>

#include <map>
#include <shared_mutex>

namespace splitpoint {
namespace {

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

// --- workspaces ------------------------------------------------------------------------

std::shared_mutex registry_mutex;
std::map<std::string, std::shared_ptr<Workspace>, std::less<>>& registry() {
  static std::map<std::string, std::shared_ptr<Workspace>, std::less<>> all;
  return all;
}

void initialise(int64_t fd, int64_t ranks, int64_t slot_bytes) {
  const int64_t bytes = segment_bytes(static_cast<int>(ranks), slot_bytes);
  char* memory = Workspace::map(static_cast<int>(fd), bytes);
  reinterpret_cast<Header*>(memory)->initialise();
  munmap(memory, bytes);
}

void attach(const std::string& group, int64_t fd, int64_t rank, const std::vector<int64_t>& pids,
            const std::vector<int64_t>& pidfds, int64_t slot_bytes, double timeout_s,
            double spin_s, double yield_s, const std::vector<std::string>& defaults) {
  Defaults by_quant;
  TORCH_CHECK_VALUE(defaults.size() == by_quant.size(), "one default for each quantisation, got ",
                    defaults.size());
  for (size_t i = 0; i < by_quant.size(); ++i) {
    algorithm_of(defaults[i], 0);  // which refuses what is none
    by_quant[i] = defaults[i];
  }
  Peers peers{};
  peers.rank = static_cast<int>(rank);
  peers.ranks = static_cast<int>(pids.size());
  for (int peer = 0; peer < peers.ranks; ++peer) {
    peers.pids[peer] = static_cast<int>(pids[peer]);
    peers.pidfds[peer] = static_cast<int>(pidfds[peer]);
  }
  const auto ns = [](double seconds) { return static_cast<int64_t>(seconds * 1e9); };
  auto made = std::make_shared<Workspace>(group, static_cast<int>(fd), peers, slot_bytes,
                                          Patience{ns(spin_s), ns(yield_s), ns(timeout_s)},
                                          std::move(by_quant));
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

bool attached(std::string_view group) { return find_workspace(group) != nullptr; }

void copy_past_caches(std::string_view group, bool value) {
  const std::shared_ptr<Workspace> workspace = find_workspace(group);
  TORCH_CHECK_VALUE(workspace, "group '", group, "' has no workspace");
  workspace->set_past_caches(value);
}

void count_anew(std::string_view group) {
  const std::shared_ptr<Workspace> workspace = find_workspace(group);
  TORCH_CHECK_VALUE(workspace, "group '", group, "' has no workspace");
  workspace->run([](Channel& channel) { channel.count_anew(); });
}

int64_t shared_bytes(int64_t ranks, int64_t slot_bytes) {
  return segment_bytes(static_cast<int>(ranks), slot_bytes);
}

}  // namespace

const NormTable* kernels() { return chosen().load(std::memory_order_relaxed); }

// Through torch's C interface: linking OpenMP here could bring a second runtime, with threads of its
// own, into the process.
void in_threads(int64_t count, int64_t grain, void (*run)(int64_t, int64_t, void*),
                void* context) {
  TORCH_CHECK(torch_parallel_for(0, count, grain, run, context) == 0,
              "splitpoint: a thread of a collective failed");
}

// The class of the error is Python's, and so is the operator that raises it.
void raise_failure(const std::string& message) {
  static const auto failed = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("splitpoint_reference::failed", "")
                                 .typed<void(std::string_view)>();
  failed.call(message);
  C10_THROW_ERROR(DistBackendError, message);  // should the operator be another one
}

std::shared_ptr<Workspace> find_workspace(std::string_view group) {
  const std::shared_lock<std::shared_mutex> lock(registry_mutex);
  const auto found = registry().find(group);
  return found == registry().end() ? nullptr : found->second;
}

TORCH_LIBRARY_FRAGMENT(splitpoint, m) {
  m.def("shm_bytes(int ranks, int slot_bytes) -> int", shared_bytes);
  m.def("shm_initialise(int fd, int ranks, int slot_bytes) -> ()", initialise);
  m.def(
      "shm_attach(str group, int fd, int rank, int[] pids, int[] pidfds, int slot_bytes, "
      "float timeout_s, float spin_s, float yield_s, str[] defaults) -> ()",
      attach);
  m.def("shm_detach(str group) -> bool", detach);
  m.def("shm_attached(str group) -> bool", attached);
  m.def("shm_count_anew(str group) -> ()", count_anew);
  m.def("shm_copy_past_caches(str group, bool value) -> ()", copy_past_caches);
  m.def("shm_instruction_sets() -> str[]", instruction_sets);
  m.def("shm_use_instruction_set(str name) -> ()", use_instruction_set);
}

}  // namespace splitpoint
