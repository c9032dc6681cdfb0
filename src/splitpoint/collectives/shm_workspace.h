// What the operators over shared memory have in common: workspaces, the kernels in use, threads,
// and what is checked of arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <sys/mman.h>
#include <sys/stat.h>

#include <array>
#include <atomic>
#include <charconv>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "shm_algorithms.h"

namespace splitpoint {

using at::Tensor;

// The kernels of the instruction set in use.
const NormTable* kernels();

// A Parallel in torch's own intra-op threads.
void in_threads(int64_t count, int64_t grain, void (*run)(int64_t, int64_t, void*), void* context);

// --- algorithms --------------------------------------------------------------------------

// Of "one_shot", "two_shot", or intervals of bytes such as "one_shot:16384,two_shot": up to so many,
// inclusive, and above.
inline Algorithm algorithm_of(std::string_view text, int64_t bytes) {
  std::string_view rest = text;
  while (true) {
    const size_t comma = rest.find(',');
    std::string_view name = rest.substr(0, comma);
    bool here = true;
    if (const size_t colon = name.find(':'); colon != std::string_view::npos) {
      const char* const last = name.data() + name.size();
      int64_t end = 0;
      const auto [stopped, error] = std::from_chars(name.data() + colon + 1, last, end);
      if (error != std::errc() || stopped != last || comma == std::string_view::npos) break;
      here = bytes <= end;
      name = name.substr(0, colon);
    } else if (comma != std::string_view::npos) {
      break;
    }
    if (name != "one_shot" && name != "two_shot") break;
    if (here) return name == "one_shot" ? Algorithm::one_shot : Algorithm::two_shot;
    rest = rest.substr(comma + 1);
  }
  TORCH_CHECK_VALUE(false, "algorithm must be auto, one_shot, two_shot, reference, or intervals of "
                    "bytes such as one_shot:16384,two_shot, got ", text);
}

// --- workspaces ------------------------------------------------------------------------

// What "auto" stands for, by Quant.
using Defaults = std::array<std::string, 4>;

// How often this process is the child of a fork: it shares the memory with its parent, but is no
// rank of its own.
inline std::atomic<uint32_t> forks{0};

// Raises `errors.CollectiveFailed`.
[[noreturn]] void raise_failure(const std::string& message);

class Workspace {
 public:
  Workspace(const std::string& group, int fd, const Peers& peers, int64_t slot_bytes,
            const Patience& patience, Defaults defaults)
      : defaults_(std::move(defaults)),
        bytes_(segment_bytes(peers.ranks, slot_bytes)),
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
    if (const std::optional<std::string> failure = attempt(work)) raise_failure(*failure);
  }

  // Raises an error of the caller's; the other ranks learn that this one does not make the call.
  template <class Check>
  void checked(const Check& check) {
    try {
      check();
    } catch (const c10::Error&) {
      // Where that fails the others report it; here the arguments are what matters.
      attempt([](Channel& channel) {
        Call call{};
        call.operation = Operation::refused;
        channel.meet(call);
      });
      throw;
    }
  }

  void leave() { channel_.leave(); }

  // Raises an error of the caller's for a name that is none.
  Algorithm algorithm(std::string_view name, int64_t bytes, Quant quant) const {
    return algorithm_of(name == "auto" ? defaults_[static_cast<int>(quant)] : name, bytes);
  }

  int rank() const { return peers_.rank; }
  int ranks() const { return peers_.ranks; }
  int64_t slot_bytes() const { return channel_.slot_bytes(); }

  bool past_caches() const { return past_caches_.load(std::memory_order_relaxed); }
  void set_past_caches(bool value) { past_caches_ = value; }

  std::vector<float> weight;  // with its bias added, for the call that runs

 private:
  // Why the work could not be finished, if it could not.
  template <class Work>
  std::optional<std::string> attempt(const Work& work) {
    TORCH_CHECK(born_ == forks.load(std::memory_order_relaxed),
                "splitpoint: this process was forked after its workspace was attached, and is no "
                "rank of its group: call collectives in the process that attached it");
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      work(channel_);
    } catch (const Failure& failure) {
      return failure.what();
    }
    return std::nullopt;
  }

  const Defaults defaults_;
  const int64_t bytes_;
  char* const memory_;
  const Peers peers_;
  const uint32_t born_;
  std::atomic<bool> past_caches_{false};
  std::mutex mutex_;
  Channel channel_;
};

// The group's workspace, or null.
std::shared_ptr<Workspace> find_workspace(std::string_view group);

// --- arguments -------------------------------------------------------------------------

inline Element element_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Element::f32;
    case at::kBFloat16: return Element::bf16;
    case at::kHalf: return Element::f16;
    default:
      TORCH_CHECK_TYPE(false, name, " must be bfloat16, float16 or float32, got ",
                       tensor.scalar_type());
  }
}

inline Quant quant_of(std::string_view name) {
  if (name == "none") return Quant::none;
  if (name == "fp8_static") return Quant::fp8_static;
  if (name == "fp8_token") return Quant::fp8_token;
  TORCH_CHECK_VALUE(name == "nvfp4", "quant must be none, fp8_static, fp8_token or nvfp4, got ",
                    name);
  return Quant::nvfp4;
}

// How many units go through in one piece.
inline int64_t fitting(const Workspace& workspace, int64_t slot_bytes_needed, int64_t most) {
  TORCH_CHECK_VALUE(most >= 1, "one row takes ", slot_bytes_needed,
                    " bytes of a workspace that was attached with max_bytes=",
                    workspace.slot_bytes(), ": attach one with max_bytes of at least ",
                    round_up(slot_bytes_needed, 4096));
  return most;
}

// The ranks meet, so that one that calls for shared memory is told, and then use the group's own.
inline void meet_for_reference(Workspace& workspace) {
  workspace.run([](Channel& channel) {
    Call call{};
    call.operation = Operation::reference;
    channel.meet(call);
  });
}

}  // namespace splitpoint
