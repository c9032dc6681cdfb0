// Whether Python dicts and tensors are as they were: what checking a module costs at each call.
//
// CPython 3.11 gives a dict a new version tag, never used before, whenever it changes, so that
// comparing one number tells that nothing was added, removed or replaced in it. Later versions
// of CPython have no such tag (they have watchers instead): there, watch() says it cannot.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

#ifdef SPLITPOINT_PYTHON
#include <Python.h>
#endif

namespace splitpoint {
namespace {

#if defined(SPLITPOINT_PYTHON) && PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030C0000
constexpr bool kSupported = true;
uint64_t version_of(int64_t dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }
#else
constexpr bool kSupported = false;
uint64_t version_of(int64_t) { return 0; }
#endif

struct WatchedTensor {
  at::Tensor tensor;
  const void* data;
  at::ScalarType dtype;
  std::vector<int64_t> sizes, strides;
  bool versioned;
  uint32_t version;

  static uint32_t current(const at::Tensor& tensor) {
    const auto& counter = tensor.unsafeGetTensorImpl()->version_counter();
    return counter.enabled() ? counter.current_version() : 0;
  }

  WatchedTensor(const at::Tensor& given, bool with_version)
      : tensor(given),
        data(given.const_data_ptr()),
        dtype(given.scalar_type()),
        sizes(given.sizes().vec()),
        strides(given.strides().vec()),
        versioned(with_version),
        version(current(given)) {}

  bool same() const {
    return tensor.scalar_type() == dtype && tensor.const_data_ptr() == data &&
           tensor.sizes() == at::IntArrayRef(sizes) &&
           tensor.strides() == at::IntArrayRef(strides) &&
           (!versioned || current(tensor) == version);
  }
};

struct Watch {
  std::vector<int64_t> dicts;
  std::vector<uint64_t> versions;
  std::vector<WatchedTensor> tensors;
};

// Handles, not pointers, cross into Python, so that one that was dropped is an error there.
std::mutex mutex;
std::unordered_map<int64_t, Watch> watches;
int64_t next_handle = 0;

int64_t watch(int64_t handle, const std::vector<int64_t>& dicts,
              const std::vector<at::Tensor>& tensors, const std::vector<int64_t>& versioned) {
  if (!kSupported) return -1;
  Watch made;
  made.dicts = dicts;
  for (const int64_t dict : dicts) made.versions.push_back(version_of(dict));
  for (size_t index = 0; index < tensors.size(); ++index) {
    made.tensors.emplace_back(tensors[index], versioned[index] != 0);
  }
  const std::lock_guard<std::mutex> lock(mutex);
  if (handle < 0) handle = next_handle++;
  watches[handle] = std::move(made);
  return handle;
}

bool unchanged(int64_t handle) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = watches.find(handle);
  TORCH_CHECK_VALUE(found != watches.end(), "no watch has the handle ", handle);
  const Watch& one = found->second;
  for (size_t index = 0; index < one.dicts.size(); ++index) {
    if (version_of(one.dicts[index]) != one.versions[index]) return false;
  }
  for (const WatchedTensor& each : one.tensors) {
    if (!each.same()) return false;
  }
  return true;
}

void unwatch(int64_t handle) {
  const std::lock_guard<std::mutex> lock(mutex);
  watches.erase(handle);
}

TORCH_LIBRARY_FRAGMENT(splitpoint, m) {
  m.def("watch(int handle, int[] dicts, Tensor[] tensors, int[] versioned) -> int", watch);
  m.def("unchanged(int handle) -> bool", unchanged);
  m.def("unwatch(int handle) -> ()", unwatch);
}

}  // namespace
}  // namespace splitpoint
