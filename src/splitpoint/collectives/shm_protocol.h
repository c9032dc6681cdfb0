// How the ranks of one host meet in shared memory: who has written what, and who waits for whom.
//
// Each rank has kSlots slots for its inputs and as many for its results. A call moves its tensor in
// chunks; chunks are numbered through all calls, alike on every rank, and chunk c uses slot
// c % kSlots. A rank writes its inputs of a chunk and publishes the chunk's number, waits until
// every other rank has published it, and reads. In two-shot calls the same happens once more with
// results. Every chunk waits for all ranks, so nobody is ever more than a few chunks ahead, and a
// slot is written again only after all have read it: a rank may publish inputs of chunk c + 1
// before it has read those of c, which takes it at most 3 chunks ahead of the slowest reader.
//
// Needs no torch, so that it can be run under a sanitizer by itself.
#pragma once

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "norm_types.h"

namespace splitpoint {

inline constexpr int kSlots = 4;

// Close below 2^32, so that every process soon passes the place where the numbers start again.
inline constexpr uint32_t kFirstChunk = 0u - 256u;

enum class Stage : int { inputs = 0, results = 1 };

enum class Operation : uint8_t {
  allreduce_rmsnorm,
  all_reduce,
  reduce_scatter,
  all_gather,
  movement,   // what allreduce_rmsnorm moves, for measurements
  reference,  // served by the group's own collective, after the ranks have met here
  refused,    // arguments without a meaning: the rank that got them raises an error
};

enum class Algorithm : uint8_t { one_shot, two_shot };

// What a rank calls. All ranks must call the same: it is compared before anything is read.
struct Call {
  Operation operation;
  Algorithm algorithm;
  Element element;
  Quant quant;
  bool residual, wide_residual, norm, kept;
  int64_t rows, hidden;
  float eps, weight_bias;

  using Words = std::array<uint64_t, 4>;

  Words words() const {
    uint32_t floats[2];
    std::memcpy(&floats[0], &eps, 4);
    std::memcpy(&floats[1], &weight_bias, 4);
    const auto byte = [](auto value, int at) { return static_cast<uint64_t>(value) << (8 * at); };
    return {byte(operation, 0) | byte(algorithm, 1) | byte(element, 2) | byte(quant, 3) |
                byte(residual, 4) | byte(wide_residual, 5) | byte(norm, 6) | byte(kept, 7),
            static_cast<uint64_t>(rows), static_cast<uint64_t>(hidden),
            static_cast<uint64_t>(floats[0]) << 32 | floats[1]};
  }

  static Call from(const Words& words) {
    const auto byte = [&](int at) { return static_cast<uint8_t>(words[0] >> (8 * at)); };
    Call call{Operation(byte(0)), Algorithm(byte(1)), Element(byte(2)), Quant(byte(3)),
              byte(4) != 0,       byte(5) != 0,       byte(6) != 0,     byte(7) != 0,
              int64_t(words[1]),  int64_t(words[2]),  0,                0};
    const uint32_t floats[2] = {static_cast<uint32_t>(words[3] >> 32),
                                static_cast<uint32_t>(words[3])};
    std::memcpy(&call.eps, &floats[0], 4);
    std::memcpy(&call.weight_bias, &floats[1], 4);
    return call;
  }

  std::string text() const {
    static const char* const operations[] = {"allreduce_rmsnorm", "all_reduce", "reduce_scatter",
                                             "all_gather", "the data movement of allreduce_rmsnorm",
                                             "the reference of a collective",
                                             "a collective with arguments it refused"};
    static const char* const elements[] = {"float32", "bfloat16", "float16"};
    static const char* const quants[] = {"none", "fp8_static", "fp8_token", "nvfp4"};
    std::string said = operations[int(operation)];
    if (operation >= Operation::reference) return said;
    char line[160];
    if (operation == Operation::all_gather) {
      std::snprintf(line, sizeof line, " of %lld bytes", static_cast<long long>(rows));
      return said + line;
    }
    if (operation != Operation::allreduce_rmsnorm && operation != Operation::movement) {
      std::snprintf(line, sizeof line, " of %lld %s", static_cast<long long>(rows),
                    elements[int(element)]);
      said += line;
      return operation == Operation::all_reduce ? said + shots() : said;
    }
    std::snprintf(line, sizeof line, " of [%lld, %lld] %s, %s residual, quant %s, eps %g",
                  static_cast<long long>(rows), static_cast<long long>(hidden),
                  elements[int(element)],
                  !residual ? "no" : wide_residual ? "float32" : elements[int(element)],
                  quants[int(quant)], eps);
    said += line;
    if (weight_bias != 0) {
      std::snprintf(line, sizeof line, ", weight_bias %g", weight_bias);
      said += line;
    }
    return said + shots() + (norm ? "" : ", no norm") + (kept ? "" : ", sum not kept");
  }

 private:
  const char* shots() const {
    return algorithm == Algorithm::one_shot ? ", one_shot" : ", two_shot";
  }
};

// What its owner writes and the others wait for: one cache line a rank.
struct alignas(64) Progress {
  std::atomic<uint32_t> chunk[2];             // by Stage: the last chunk that was published
  std::atomic<uint32_t> left;                 // the rank gave its workspace up
  std::atomic<uint64_t> signature[kSlots];    // of the call that began with a slot's chunk
};

// How many ranks sleep until this one publishes: it calls the kernel only for them.
struct alignas(64) Sleepers {
  std::atomic<uint32_t> count;
};

// What a rank called last, for messages only.
struct alignas(64) LastCall {
  std::atomic<uint64_t> number;
  std::atomic<uint64_t> words[4];
};

struct alignas(4096) Header {
  Progress progress[kMostRanks];
  Sleepers sleepers[kMostRanks];
  LastCall calls[kMostRanks];
  alignas(64) std::atomic<uint32_t> failure;  // 0: none, 1: the message is being written, 2: it is
  char message[1000];

  void initialise() {
    for (Progress& each : progress) {
      for (auto& chunk : each.chunk) chunk.store(kFirstChunk - 1);
    }
  }
};

inline int64_t segment_bytes(int ranks, int64_t slot_bytes) {
  return static_cast<int64_t>(sizeof(Header)) + int64_t{2} * kSlots * ranks * slot_bytes;
}

// A collective that cannot be finished; its message says why.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Peers {
  int rank, ranks;
  int pids[kMostRanks];
  int pidfds[kMostRanks];  // readable when the process has ended; -1: not watched
};

struct Patience {
  int64_t spin_ns;     // look again and again
  int64_t yield_ns;    // let others run between looks
  int64_t timeout_ns;  // then sleep between looks, until it is an error
};

inline int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * int64_t{1000000000} + time.tv_nsec;
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One rank's end of a segment. Calls on it must not overlap.
class Channel {
 public:
  Channel(std::string group, char* segment, int64_t slot_bytes, const Peers& peers,
          const Patience& patience)
      : group_(std::move(group)),
        header_(reinterpret_cast<Header*>(segment)),
        slots_(segment + sizeof(Header)),
        slot_bytes_(slot_bytes),
        peers_(peers),
        patience_(patience) {}

  int rank() const { return peers_.rank; }
  int ranks() const { return peers_.ranks; }
  int64_t slot_bytes() const { return slot_bytes_; }

  char* slot(int rank, Stage stage, uint32_t chunk) const {
    const int64_t index = (int64_t{2} * rank + static_cast<int>(stage)) * kSlots + chunk % kSlots;
    return slots_ + index * slot_bytes_;
  }

  // Starts a call of so many chunks and returns the first one's number.
  uint32_t begin(const Call& call, int64_t chunks) {
    ++calls_;
    if (header_->failure.load(std::memory_order_relaxed)) throw_failure();
    const Call::Words words = call.words();
    LastCall& last = header_->calls[rank()];
    last.number.store(calls_, std::memory_order_relaxed);
    for (size_t i = 0; i < words.size(); ++i) {
      last.words[i].store(words[i], std::memory_order_relaxed);
    }
    signature_ = calls_;
    for (const uint64_t word : words) signature_ = mixed(signature_ ^ word);
    const uint32_t first = next_;
    header_->progress[rank()].signature[first % kSlots].store(signature_,
                                                              std::memory_order_relaxed);
    next_ += static_cast<uint32_t>(chunks);
    return first;
  }

  // Tells the others that this rank's part of a chunk can be read.
  void publish(Stage stage, uint32_t chunk) {
    std::atomic<uint32_t>& word = header_->progress[rank()].chunk[static_cast<int>(stage)];
    // Sequentially consistent, as are a sleeper's count and look: either it is seen here, or it
    // sees the chunk.
    word.store(chunk);
    if (header_->sleepers[rank()].count.load()) futex(word, FUTEX_WAKE, INT32_MAX, nullptr);
  }

  // Waits until all others have published a chunk.
  void await(Stage stage, uint32_t chunk) {
    for (int step = 1; step < ranks(); ++step) await_rank((rank() + step) % ranks(), stage, chunk);
  }

  // As await, for the first chunk of a call: finds out too whether all call the same.
  void await_first(uint32_t chunk) {
    await(Stage::inputs, chunk);
    for (int peer = 0; peer < ranks(); ++peer) {
      const auto& signatures = header_->progress[peer].signature;
      if (signatures[chunk % kSlots].load(std::memory_order_relaxed) != signature_) disagree(peer);
    }
  }

  // Meets the others without data.
  void meet(const Call& call) {
    const uint32_t chunk = begin(call, 1);
    publish(Stage::inputs, chunk);
    await_first(chunk);
  }

  // Counts calls from 1 again; all ranks must do so between the same calls.
  void count_anew() {
    calls_ = 0;
    header_->calls[rank()].number.store(0);
  }

  // Tells the others not to wait for this rank any more.
  void leave() { header_->progress[rank()].left.store(1); }

 private:
  static uint64_t mixed(uint64_t x) {  // the finaliser of SplitMix64
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }

  static bool reached(uint32_t value, uint32_t chunk) {
    return static_cast<int32_t>(value - chunk) >= 0;  // right where numbers start again too
  }

  static long futex(std::atomic<uint32_t>& word, int operation, uint32_t value,
                    const timespec* timeout) {
    return syscall(SYS_futex, &word, operation, value, timeout, nullptr, 0);
  }

  bool published(int peer, Stage stage, uint32_t chunk) const {
    const auto& word = header_->progress[peer].chunk[static_cast<int>(stage)];
    return reached(word.load(std::memory_order_acquire), chunk);
  }

  void await_rank(int peer, Stage stage, uint32_t chunk) {
    for (int look = 0; look < 64; ++look) {
      if (published(peer, stage, chunk)) return;
      relax();
    }
    await_long(peer, stage, chunk);
  }

  __attribute__((noinline)) void await_long(int peer, Stage stage, uint32_t chunk) {
    const int64_t start = now_ns();
    while (now_ns() - start < patience_.spin_ns) {
      for (int look = 0; look < 32; ++look) {
        if (published(peer, stage, chunk)) return;
        relax();
      }
    }
    while (now_ns() - start < patience_.spin_ns + patience_.yield_ns) {
      if (published(peer, stage, chunk)) return;
      if (header_->failure.load(std::memory_order_relaxed)) throw_failure();
      sched_yield();
    }
    sleep_until(peer, stage, chunk, start);
  }

  void sleep_until(int peer, Stage stage, uint32_t chunk, int64_t start) {
    struct Counted {
      std::atomic<uint32_t>& count;
      explicit Counted(std::atomic<uint32_t>& given) : count(given) { count.fetch_add(1); }
      ~Counted() { count.fetch_sub(1); }
    } counted(header_->sleepers[peer].count);
    std::atomic<uint32_t>& word = header_->progress[peer].chunk[static_cast<int>(stage)];
    // Short enough for a death to be noticed soon.
    const timespec nap{0, 20'000'000};
    while (true) {
      const uint32_t value = word.load();
      if (reached(value, chunk)) return;
      futex(word, FUTEX_WAIT, value, &nap);
      if (published(peer, stage, chunk)) return;
      if (header_->failure.load()) throw_failure();
      look_for_the_gone(stage, chunk);
      if (now_ns() - start > patience_.timeout_ns) time_out(peer);
    }
  }

  // A rank that is gone is an error unless it had done its part of the chunk before.
  void look_for_the_gone(Stage stage, uint32_t chunk) {
    for (int peer = 0; peer < ranks(); ++peer) {
      if (peer == rank()) continue;
      pollfd watched{peers_.pidfds[peer], POLLIN, 0};
      const bool died = peers_.pidfds[peer] >= 0 && poll(&watched, 1, 0) > 0;
      const bool left = header_->progress[peer].left.load();
      if ((died || left) && !published(peer, stage, chunk)) {
        fail(name(peer) + (left ? " detached its workspace before " : " died before or during ") +
             current());
      }
    }
  }

  [[noreturn]] void time_out(int peer) {
    fail(name(peer) + " did not take part in " + current() + " within " +
         seconds(patience_.timeout_ns) + " s; " + last_of(peer));
  }

  [[noreturn]] void disagree(int peer) {
    fail("the ranks disagree: " + name(rank()) + " makes " + current() + ", but " + last_of(peer));
  }

  // The first failure is the one that all ranks report.
  [[noreturn]] void fail(const std::string& message) {
    uint32_t none = 0;
    if (header_->failure.compare_exchange_strong(none, 1)) {
      std::snprintf(header_->message, sizeof header_->message, "%s", message.c_str());
      header_->failure.store(2);
    }
    throw_failure();
  }

  [[noreturn]] void throw_failure() {
    // Written within microseconds, unless its writer died over it.
    for (int look = 0; look < 1000 && header_->failure.load() != 2; ++look) usleep(1000);
    const std::string message =
        header_->failure.load() == 2 ? header_->message : "a rank died while it reported a failure";
    throw Failure("group '" + group_ + "': " + message +
                  ". No further collective of this group is possible until all ranks have detached "
                  "their workspaces and attached new ones");
  }

  static std::string seconds(int64_t ns) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(ns) * 1e-9);
    return text;
  }

  std::string name(int peer) const {
    return "rank " + std::to_string(peer) + " (process " + std::to_string(peers_.pids[peer]) + ")";
  }

  std::string current() const { return called(rank()); }

  std::string called(int peer) const {
    const LastCall& last = header_->calls[peer];
    Call::Words words;
    for (size_t i = 0; i < words.size(); ++i) words[i] = last.words[i].load();
    return "call " + std::to_string(last.number.load()) + ", " + Call::from(words).text();
  }

  std::string last_of(int peer) const {
    const LastCall& last = header_->calls[peer];
    const std::string who = "rank " + std::to_string(peer);
    if (last.number.load() == 0) return who + " has made no call yet";
    return who + " makes " + called(peer);
  }

  const std::string group_;
  Header* const header_;
  char* const slots_;
  const int64_t slot_bytes_;
  const Peers peers_;
  const Patience patience_;
  uint32_t next_ = kFirstChunk;
  uint64_t calls_ = 0;
  uint64_t signature_ = 0;
};

}  // namespace splitpoint
