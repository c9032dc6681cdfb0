// The ranks' meeting, as it is in the library, with threads as ranks: what a sanitizer must find
// nothing in. Calls of random lengths and algorithms, over slots so small that most take several
// chunks; every value is checked. Prints how many were wrong.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "shm_algorithms.h"

using namespace splitpoint;

namespace {

constexpr int64_t kSlotBytes = 256;
std::atomic<long> wrong{0};

void alone(int64_t count, int64_t, void (*run)(int64_t, int64_t, void*), void* context) {
  run(0, count, context);
}

int value(int rank, int call, int64_t at) {
  return rank * 1000003 + call * 977 + static_cast<int>(at) * 31;
}

void run_rank(char* segment, int rank, int ranks, int calls) {
  Peers peers{};
  peers.rank = rank, peers.ranks = ranks;
  for (int& each : peers.pidfds) each = -1;
  // Little patience, so that all ways of waiting are met.
  Channel channel("model", segment, kSlotBytes, peers, {1000, 20000, 60'000'000'000});
  std::mt19937 alike(7), own(100 + rank);
  const auto stray = [&] {
    if (own() % 8 == 0) std::this_thread::yield();
    if (own() % 512 == 0) usleep(200);
  };
  NormTable table{};
  const Copier copier{&table, alone, false};
  for (int call_number = 0; call_number < calls; ++call_number) {
    const int64_t count = alike() % 400;
    const bool two = alike() % 2;
    std::vector<int> input(count), output(count, -1);
    for (int64_t i = 0; i < count; ++i) input[i] = value(rank, call_number, i);
    const auto* from = reinterpret_cast<const char*>(input.data());
    Call call{};
    call.operation = Operation::all_reduce;
    call.algorithm = two ? Algorithm::two_shot : Algorithm::one_shot;
    call.rows = count;
    const auto compute = [&](const char* const* sources, int64_t first, int64_t begin,
                             int64_t end) {
      stray();
      for (int64_t i = begin; i < end; ++i) {
        int sum = 0;
        for (int peer = 0; peer < ranks; ++peer) {
          sum += reinterpret_cast<const int*>(sources[peer])[i];
        }
        output[first + i] = sum;
      }
    };
    const Chunks chunks(count, 12);
    if (two) {
      Results results;
      results.add(output.data(), 4);
      two_shot(channel, call, copier, chunks, from, 4, results, stray, compute);
    } else {
      one_shot(
          channel, call, chunks,
          [&](char* slot, int64_t first, int64_t size) {
            stray();
            copier.share(slot, from + first * 4, size * 4);
          },
          stray,
          [&](uint32_t chunk, int64_t first, int64_t size) {
            const char* sources[kMostRanks];
            for (int peer = 0; peer < ranks; ++peer) {
              sources[peer] = peer == rank ? from + first * 4
                                           : channel.slot(peer, Stage::inputs, chunk);
            }
            compute(sources, first, 0, size);
          });
    }
    for (int64_t i = 0; i < count; ++i) {
      int sum = 0;
      for (int peer = 0; peer < ranks; ++peer) sum += value(peer, call_number, i);
      wrong += output[i] != sum;
    }
  }
}

}  // namespace

int main(int, char** arguments) {
  const int ranks = std::atoi(arguments[1]), calls = std::atoi(arguments[2]);
  const int64_t bytes = round_up(segment_bytes(ranks, kSlotBytes), 4096);
  auto* segment = static_cast<char*>(std::aligned_alloc(4096, bytes));
  std::memset(segment, 0, bytes);
  reinterpret_cast<Header*>(segment)->initialise();
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back(run_rank, segment, rank, ranks, calls);
  }
  for (std::thread& each : threads) each.join();
  std::printf("%d ranks, %d calls, %ld wrong values\n", ranks, calls, wrong.load());
  return wrong != 0;
}
