// One-shot and two-shot over a channel. Both move *units* (rows, or elements) in chunks that fit a
// slot; what is done with them is given as functions of
//   sources: where unit 0 of the chunk is in each rank's input, in rank order
//   first:   the chunk's first unit in the tensor
//   begin, end: the units of the chunk to work on
// The copy of the next chunk is published before the present one is read, so that the others find
// it when they come to it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "shm_protocol.h"

namespace splitpoint {

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct Chunks {
  int64_t units = 0, each = 1, count = 1;

  // As even as possible, so that the last one is not a crumb.
  Chunks(int64_t units_given, int64_t most) : units(units_given) {
    count = std::max<int64_t>(1, (units + most - 1) / most);
    each = std::max<int64_t>(1, (units + count - 1) / count);
    count = std::max<int64_t>(1, (units + each - 1) / each);
  }

  int64_t first(int64_t chunk) const { return chunk * each; }
  int64_t size(int64_t chunk) const { return std::min(each, units - chunk * each); }
};

// A rank's share of the units of a chunk.
struct Share {
  int64_t begin, end;

  Share(int64_t units, int rank, int ranks)
      : begin(units * rank / ranks), end(units * (rank + 1) / ranks) {}
};

// Runs work(begin, end) over [0, count), in as many threads as are worth it.
using Parallel = void (*)(int64_t count, int64_t grain, void (*run)(int64_t, int64_t, void*),
                          void* context);

template <class Work>
void spread(Parallel parallel, int64_t count, int64_t grain, const Work& work) {
  if (count <= grain) {
    if (count > 0) work(int64_t{0}, count);
    return;
  }
  const auto run = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Work*>(context))(begin, end);
  };
  parallel(count, grain, run, const_cast<void*>(static_cast<const void*>(&work)));
}

// What a thread must have to move before a second one is worth waking.
inline constexpr int64_t kBytesWorthAThread = 64 << 10;

inline int64_t grain_of(int64_t unit_bytes) {
  return std::max<int64_t>(1, kBytesWorthAThread / std::max<int64_t>(1, unit_bytes));
}

struct Copier {
  const NormTable* table;
  Parallel parallel;
  bool past_caches;

  // Into shared memory, for another rank to read, in this thread; fence() comes after the last.
  // memcpy, not a loop of our own: where it is one instruction for the whole block (rep movsb) the
  // processor knows that lines are overwritten, and does not fetch what the reader has of them.
  void put(char* to, const char* from, int64_t bytes) const {
    past_caches ? table->copy_past_caches(to, from, bytes)
                : static_cast<void>(std::memcpy(to, from, bytes));
  }
  void fence() const {
    if (past_caches) store_fence();
  }

  // The same in as many threads as are worth it.
  void share(char* to, const char* from, int64_t bytes) const {
    spread(parallel, bytes, kBytesWorthAThread, [&](int64_t begin, int64_t end) {
      put(to + begin, from + begin, end - begin);
      fence();
    });
  }
};

// write(slot, first, count) puts this rank's inputs of a chunk into a slot;
// compute(chunk, first, count) makes results of all ranks' inputs;
// meanwhile() is done once, while the others are still writing.
template <class Write, class Meanwhile, class Compute>
void one_shot(Channel& channel, const Call& call, const Chunks& chunks, const Write& write,
              const Meanwhile& meanwhile, const Compute& compute) {
  const uint32_t start = channel.begin(call, chunks.count);
  const auto publish = [&](int64_t k) {
    const uint32_t chunk = start + static_cast<uint32_t>(k);
    if (channel.ranks() > 1) {
      write(channel.slot(channel.rank(), Stage::inputs, chunk), chunks.first(k), chunks.size(k));
    }
    channel.publish(Stage::inputs, chunk);
  };
  publish(0);
  meanwhile();
  for (int64_t k = 0; k < chunks.count; ++k) {
    const uint32_t chunk = start + static_cast<uint32_t>(k);
    if (k + 1 < chunks.count) publish(k + 1);
    k == 0 ? channel.await_first(chunk) : channel.await(Stage::inputs, chunk);
    compute(chunk, chunks.first(k), chunks.size(k));
  }
}

// A private tensor that each rank computes a share of and gets the rest of from the others.
struct Result {
  char* base;
  int64_t unit_bytes;
};

struct Results {
  static constexpr int kMost = 4;
  Result each[kMost];
  int count = 0;

  void add(void* base, int64_t unit_bytes) {
    if (base) each[count++] = {static_cast<char*>(base), unit_bytes};
  }
  int64_t unit_bytes() const {
    int64_t bytes = 0;
    for (int i = 0; i < count; ++i) bytes += each[i].unit_bytes;
    return bytes;
  }
  // Results lie in a slot one after the other, each from a new cache line on.
  template <class F>
  void in_slot(int64_t units, const F& visit) const {
    int64_t offset = 0;
    for (int i = 0; i < count; ++i) {
      visit(each[i], offset);
      offset += round_up(units * each[i].unit_bytes, 64);
    }
  }
  // The most units of a chunk whose shares fit.
  int64_t fitting(int64_t slot_bytes, int ranks) const {
    return (slot_bytes - 64 * kMost) / std::max<int64_t>(1, unit_bytes()) * ranks;
  }
};

// compute(sources, first, begin, end) fills the results of units begin to end of a chunk.
template <class Meanwhile, class Compute>
void two_shot(Channel& channel, const Call& call, const Copier& copier, const Chunks& chunks,
              const char* input, int64_t unit_bytes, const Results& results,
              const Meanwhile& meanwhile, const Compute& compute) {
  const int rank = channel.rank(), ranks = channel.ranks();
  const uint32_t start = channel.begin(call, chunks.count);

  const auto give_inputs = [&](int64_t k) {
    const uint32_t chunk = start + static_cast<uint32_t>(k);
    const Share own(chunks.size(k), rank, ranks);
    char* slot = channel.slot(rank, Stage::inputs, chunk);
    const char* from = input + chunks.first(k) * unit_bytes;
    copier.share(slot, from, own.begin * unit_bytes);
    const int64_t after = own.end * unit_bytes;
    copier.share(slot + after, from + after, chunks.size(k) * unit_bytes - after);
    channel.publish(Stage::inputs, chunk);
  };

  const auto give_results = [&](int64_t k) {
    const uint32_t chunk = start + static_cast<uint32_t>(k);
    k == 0 ? channel.await_first(chunk) : channel.await(Stage::inputs, chunk);
    const int64_t first = chunks.first(k);
    const Share own(chunks.size(k), rank, ranks);
    const char* sources[kMostRanks];
    for (int peer = 0; peer < ranks; ++peer) {
      sources[peer] = peer == rank ? input + first * unit_bytes
                                   : channel.slot(peer, Stage::inputs, chunk);
    }
    char* slot = channel.slot(rank, Stage::results, chunk);
    const int64_t units = own.end - own.begin;
    spread(copier.parallel, units, grain_of(unit_bytes), [&](int64_t begin, int64_t end) {
      compute(sources, first, own.begin + begin, own.begin + end);
      results.in_slot(units, [&](const Result& each, int64_t offset) {
        copier.put(slot + offset + begin * each.unit_bytes,
                   each.base + (first + own.begin + begin) * each.unit_bytes,
                   (end - begin) * each.unit_bytes);
      });
      copier.fence();
    });
    channel.publish(Stage::results, chunk);
  };

  const auto take_results = [&](int64_t k) {
    const uint32_t chunk = start + static_cast<uint32_t>(k);
    channel.await(Stage::results, chunk);
    for (int step = 1; step < ranks; ++step) {
      const int peer = (rank + step) % ranks;
      const Share theirs(chunks.size(k), peer, ranks);
      const int64_t units = theirs.end - theirs.begin;
      const char* slot = channel.slot(peer, Stage::results, chunk);
      results.in_slot(units, [&](const Result& each, int64_t offset) {
        char* to = each.base + (chunks.first(k) + theirs.begin) * each.unit_bytes;
        spread(copier.parallel, units * each.unit_bytes, kBytesWorthAThread,
               [&](int64_t begin, int64_t end) {
                 std::memcpy(to + begin, slot + offset + begin, end - begin);
               });
      });
    }
  };

  give_inputs(0);
  meanwhile();
  for (int64_t k = 0; k < chunks.count; ++k) {
    if (k + 1 < chunks.count) give_inputs(k + 1);
    give_results(k);
    if (k > 0) take_results(k - 1);
  }
  take_results(chunks.count - 1);
}

}  // namespace splitpoint
