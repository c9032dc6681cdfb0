// Small tensors that a program has done with, kept for its next step or call.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

namespace splitpoint {

// Tensors of a few layouts, numbered; those of a layout differ in nothing but what they hold, at
// one size. Where a step streams hundreds of megabytes of weights, all that the allocator and a
// new tensor touch has left the cache: one that is there already takes a tenth of the time.
class Pool {
 public:
  // All that is kept. Larger tensors take so long to fill that allocating them does not matter.
  static constexpr size_t kMostBytes = 1 << 20;

  // Forgets tensors of other lengths, or which inference mode made and this call must not get.
  void prepare(c10::ArrayRef<int64_t> lengths, size_t layouts) {
    const bool inference = c10::InferenceMode::is_enabled();
    if (lengths != c10::ArrayRef<int64_t>(lengths_) || inference != inference_) {
      parked_.clear();
      bytes_ = 0;
    }
    lengths_.assign(lengths.begin(), lengths.end());
    inference_ = inference;
    parked_.resize(layouts);
  }

  // A tensor of a layout, of any content; undefined where none is left.
  at::Tensor take(size_t layout) {
    std::vector<at::Tensor>& parked = parked_[layout];
    if (parked.empty()) return {};
    at::Tensor found = std::move(parked.back());  // the last one used: it may be in the cache
    parked.pop_back();
    bytes_ -= found.storage().nbytes();
    return found;
  }

  // Keeps a tensor if there is room and nobody else has it or its memory.
  void park(at::Tensor&& tensor, size_t layout) {
    if (!tensor.defined()) return;  // a collective has given it on
    const size_t bytes = tensor.storage().nbytes();
    if (tensor.use_count() == 1 && tensor.storage().use_count() == 1 &&
        bytes_ + bytes <= kMostBytes) {
      bytes_ += bytes;
      parked_[layout].push_back(std::move(tensor));
    } else {
      tensor.reset();
    }
  }

 private:
  c10::SmallVector<int64_t, 4> lengths_;
  bool inference_ = false;
  size_t bytes_ = 0;
  std::vector<std::vector<at::Tensor>> parked_;
};

// The pool of a program between its calls. Calls that run at once take one each, and one stays.
class SparePool {
 public:
  SparePool() = default;
  SparePool(const SparePool&) = delete;
  ~SparePool() { delete spare_.load(); }

  std::unique_ptr<Pool> take() {
    std::unique_ptr<Pool> found(spare_.exchange(nullptr));
    return found ? std::move(found) : std::make_unique<Pool>();
  }

  void put_back(std::unique_ptr<Pool> pool) { delete spare_.exchange(pool.release()); }

 private:
  std::atomic<Pool*> spare_{nullptr};
};

}  // namespace splitpoint
