// Memory that a thread keeps from call to call, at a cache line.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace splitpoint {

class KeptMemory {
 public:
  char* bytes(int64_t count) {
    if (count > size_) {
      data_.reset(static_cast<char*>(::operator new[](count, kAlignment)));
      size_ = count;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(char* data) const { ::operator delete[](data, kAlignment); }
  };
  std::unique_ptr<char[], Free> data_;
  int64_t size_ = 0;
};

}  // namespace splitpoint
