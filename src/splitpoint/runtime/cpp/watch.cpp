// Whether Python objects and tensors are as they were: what checking a module costs at each call.
//
// CPython 3.11 gives a dict a new version tag, never used before, whenever it changes, so that
// comparing one number tells that nothing was added, removed or replaced in it. Later versions
// of CPython have no such tag (they have watchers instead): there, renew() says it cannot.
//
// A model that has just read its weights has evicted all that is looked at here, so what counts is
// how many cache lines are touched and that none waits for another: what is expected lies in flat
// arrays, and the next lines are asked for while one is compared.
#ifdef SPLITPOINT_PYTHON
#include <Python.h>

#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace splitpoint {
namespace {

#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030C0000
constexpr bool kSupported = true;
uint64_t version_of(const PyDictObject* dict) { return dict->ma_version_tag; }
#else
constexpr bool kSupported = false;
uint64_t version_of(const PyDictObject*) { return 0; }
#endif

constexpr size_t kAhead = 12;

// --- Python ----------------------------------------------------------------------------

// A dict nothing in which may change.
struct Whole {
  const PyDictObject* dict;
  uint64_t version;
};

// A pointer that an object holds: to its type, its dict, its code, ...
struct Pointer {
  const void* const* at;
  const void* is;
};

// A dict in which some keys have to stay what they are; others may come and go.
struct Keyed {
  PyDictObject* dict;
  uint64_t version;
  size_t first, last;  // in `keys`
};

struct Key {
  PyObject* key;
  PyObject* value;  // null: absent
};

struct Element {
  const PyListObject* list;
  Py_ssize_t size, index;
  const PyObject* value;
};

// --- tensors ---------------------------------------------------------------------------

// Gives the protected members of TensorImpl their names; there is no object of this type.
struct Fields : c10::TensorImpl {
  static constexpr auto storage = &Fields::storage_;
  static constexpr auto version = &Fields::version_counter_;
  static constexpr auto extents = &Fields::sizes_and_strides_;
  static constexpr auto offset = &Fields::storage_offset_;
  static constexpr auto dtype = &Fields::data_type_;
};

struct WatchedTensor {
  const c10::TensorImpl* impl;
  const c10::StorageImpl* storage;
  const void* data;
  int64_t offset;
  caffe2::TypeMeta dtype;
  uint32_t version;
  bool versioned;
  size_t dims, first;  // in `extents`: sizes, then strides
};

struct Watch {
  std::vector<Whole> whole;
  std::vector<Pointer> pointers;
  std::vector<Keyed> keyed;
  std::vector<Key> keys;
  std::vector<Element> elements;
  std::vector<WatchedTensor> tensors;
  std::vector<int64_t> extents;
  // So that what is compared stays where it is. A storage held weakly gives its memory back.
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages;
  std::vector<c10::VariableVersion> counters;

  void add(const c10::TensorImpl* impl, bool versioned) {
    const c10::Storage& storage = impl->*Fields::storage;
    const auto& sizes = impl->*Fields::extents;
    const c10::VariableVersion& counter = impl->*Fields::version;
    storages.push_back(storage.getWeakStorageImpl());
    counters.push_back(counter);
    tensors.push_back({impl, storage.unsafeGetStorageImpl(), storage.data(),
                       impl->*Fields::offset, impl->*Fields::dtype, current(counter), versioned,
                       sizes.size(), extents.size()});
    extents.insert(extents.end(), sizes.sizes_begin(), sizes.sizes_end());
    extents.insert(extents.end(), sizes.strides_begin(), sizes.strides_end());
  }

  static uint32_t current(const c10::VariableVersion& counter) {
    return counter.enabled() ? counter.current_version() : 0;
  }

  bool same_tensors() const {
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (i + kAhead < tensors.size()) {
        const WatchedTensor& later = tensors[i + kAhead];
        for (size_t byte = 0; byte < 192; byte += 64) {
          __builtin_prefetch(reinterpret_cast<const char*>(later.impl) + byte);
        }
        __builtin_prefetch(later.storage);
      }
      const WatchedTensor& is = tensors[i];
      const auto& sizes = is.impl->*Fields::extents;
      if ((is.impl->*Fields::storage).unsafeGetStorageImpl() != is.storage ||
          is.storage->data() != is.data || is.impl->*Fields::offset != is.offset ||
          is.impl->*Fields::dtype != is.dtype || sizes.size() != is.dims) {
        return false;
      }
      const int64_t* expected = extents.data() + is.first;
      if (!std::equal(sizes.sizes_begin(), sizes.sizes_end(), expected) ||
          !std::equal(sizes.strides_begin(), sizes.strides_end(), expected + is.dims)) {
        return false;
      }
      if (is.versioned) {
        // A counter may be exchanged, too.
        static_assert(sizeof(c10::VariableVersion) == sizeof(void*));
        if (std::memcmp(&(is.impl->*Fields::version), &counters[i], sizeof(void*)) != 0 ||
            current(counters[i]) != is.version) {
          return false;
        }
      }
    }
    return true;
  }

  // 1: as it was; 0: changed; -1: a Python error is set.
  int unchanged() {
    for (size_t i = 0; i < whole.size(); ++i) {
      if (i + kAhead < whole.size()) __builtin_prefetch(&whole[i + kAhead].dict->ma_used);
      if (version_of(whole[i].dict) != whole[i].version) return 0;
    }
    for (size_t i = 0; i < pointers.size(); ++i) {
      if (i + kAhead < pointers.size()) __builtin_prefetch(pointers[i + kAhead].at);
      if (*pointers[i].at != pointers[i].is) return 0;
    }
    for (Keyed& each : keyed) {
      if (version_of(each.dict) == each.version) continue;
      const uint64_t now = version_of(each.dict);
      for (size_t i = each.first; i < each.last; ++i) {
        PyObject* found =
            PyDict_GetItemWithError(reinterpret_cast<PyObject*>(each.dict), keys[i].key);
        if (found == nullptr && PyErr_Occurred()) return -1;
        if (found != keys[i].value) return 0;
      }
      each.version = now;
    }
    for (const Element& each : elements) {
      if (PyList_GET_SIZE(each.list) != each.size) return 0;
      if (each.index >= 0 && PyList_GET_ITEM(each.list, each.index) != each.value) return 0;
    }
    return same_tensors();
  }
};

// --- the Python type -------------------------------------------------------------------

struct Object {
  PyObject_HEAD
  std::shared_ptr<Watch> watch;
  PyObject* held;  // what `watch` has the addresses of
};

void pointer(Watch& watch, const void* at) {
  const auto place = static_cast<const void* const*>(at);
  watch.pointers.push_back({place, *place});
}

bool take(Watch& watch, PyObject* whole, PyObject* objects, PyObject* keyed, PyObject* lists,
          PyObject* tensors) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(whole); ++i) {
    const auto dict = reinterpret_cast<PyDictObject*>(PyList_GET_ITEM(whole, i));
    if (!PyDict_Check(dict)) return PyErr_BadArgument(), false;
    watch.whole.push_back({dict, version_of(dict)});
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(objects); ++i) {
    PyObject* object = PyList_GET_ITEM(objects, i);
    if (PyFunction_Check(object)) {
      const auto function = reinterpret_cast<PyFunctionObject*>(object);
      pointer(watch, &function->func_code);
      pointer(watch, &function->func_defaults);
      pointer(watch, &function->func_kwdefaults);
      pointer(watch, &function->func_closure);
    } else if (PyCell_Check(object)) {
      pointer(watch, &reinterpret_cast<PyCellObject*>(object)->ob_ref);
    } else if (PyType_Check(object)) {
      pointer(watch, &object->ob_type);
      pointer(watch, &reinterpret_cast<PyTypeObject*>(object)->tp_mro);
    } else {
      pointer(watch, &object->ob_type);
      if (PyObject** dict = _PyObject_GetDictPtr(object)) pointer(watch, dict);
    }
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(keyed); ++i) {
    PyObject *dict, *wanted;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(keyed, i), "O!O!", &PyDict_Type, &dict, &PyDict_Type,
                          &wanted)) {
      return false;
    }
    const size_t first = watch.keys.size();
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(wanted, &at, &key, &value);) {
      // Absent is written as NotImplemented, which no module holds.
      watch.keys.push_back({key, value == Py_NotImplemented ? nullptr : value});
    }
    const auto typed = reinterpret_cast<PyDictObject*>(dict);
    watch.keyed.push_back({typed, version_of(typed), first, watch.keys.size()});
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(lists); ++i) {
    PyObject* list;
    Py_ssize_t index;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(lists, i), "O!n", &PyList_Type, &list, &index)) {
      return false;
    }
    if (index >= PyList_GET_SIZE(list)) return PyErr_BadArgument(), false;
    const PyObject* value = index < 0 ? nullptr : PyList_GET_ITEM(list, index);
    watch.elements.push_back(
        {reinterpret_cast<PyListObject*>(list), PyList_GET_SIZE(list), index, value});
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i) {
    PyObject* tensor;
    unsigned long long address;
    int versioned;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(tensors, i), "OKp", &tensor, &address, &versioned)) {
      return false;
    }
    watch.add(reinterpret_cast<const c10::TensorImpl*>(address), versioned != 0);
  }
  std::sort(watch.whole.begin(), watch.whole.end(),
            [](const Whole& a, const Whole& b) { return a.dict < b.dict; });
  std::sort(watch.pointers.begin(), watch.pointers.end(),
            [](const Pointer& a, const Pointer& b) { return a.at < b.at; });
  return true;
}

PyObject* renew(PyObject* self, PyObject* arguments) {
  PyObject *whole, *objects, *keyed, *lists, *tensors;
  if (!PyArg_ParseTuple(arguments, "O!O!O!O!O!", &PyList_Type, &whole, &PyList_Type, &objects,
                        &PyList_Type, &keyed, &PyList_Type, &lists, &PyList_Type, &tensors)) {
    return nullptr;
  }
  if (!kSupported) Py_RETURN_FALSE;
  const auto object = reinterpret_cast<Object*>(self);
  auto made = std::make_shared<Watch>();
  if (!take(*made, whole, objects, keyed, lists, tensors)) return nullptr;
  std::swap(object->watch, made);
  PyObject* before = object->held;
  object->held = Py_NewRef(arguments);
  made.reset();
  Py_XDECREF(before);
  Py_RETURN_TRUE;
}

PyObject* call(PyObject* self, PyObject*, PyObject*) {
  const auto object = reinterpret_cast<Object*>(self);
  if (object->watch == nullptr) Py_RETURN_FALSE;
  // Comparing keys may run Python, and that may renew this watch.
  const std::shared_ptr<Watch> watch = object->watch;
  PyObject* held = Py_NewRef(object->held);
  const int same = watch->unchanged();
  Py_DECREF(held);
  return same < 0 ? nullptr : PyBool_FromLong(same);
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(reinterpret_cast<Object*>(self)->held);
  return 0;
}

int clear(PyObject* self) {
  const auto object = reinterpret_cast<Object*>(self);
  object->watch.reset();
  Py_CLEAR(object->held);
  return 0;
}

void deallocate(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  clear(self);
  std::destroy_at(&reinterpret_cast<Object*>(self)->watch);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef methods[] = {
    {"renew", renew, METH_VARARGS,
     "renew(whole, objects, keyed, lists, tensors): take things as they are now; False when this "
     "Python has no means to watch dicts."},
    {nullptr, nullptr, 0, nullptr}};

PyObject* make(PyTypeObject* type, PyObject*, PyObject*) {
  PyObject* self = type->tp_alloc(type, 0);
  if (self != nullptr) std::construct_at(&reinterpret_cast<Object*>(self)->watch);
  return self;
}

PyType_Slot slots[] = {
    {Py_tp_doc, const_cast<char*>("Tells when called whether all is as it was at `renew`.")},
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_call, reinterpret_cast<void*>(call)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(clear)},
    {Py_tp_dealloc, reinterpret_cast<void*>(deallocate)},
    {Py_tp_methods, methods},
    {0, nullptr}};

PyType_Spec spec = {"splitpoint.kernels.Watch", sizeof(Object), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "splitpoint_watch", nullptr, -1, nullptr,
                      nullptr,               nullptr,            nullptr, nullptr};

}  // namespace
}  // namespace splitpoint

PyMODINIT_FUNC PyInit_splitpoint_watch() {
  PyObject* made = PyModule_Create(&splitpoint::module);
  if (made == nullptr) return nullptr;
  PyObject* type = PyType_FromSpec(&splitpoint::spec);
  if (type == nullptr || PyModule_AddObject(made, "Watch", type) < 0) {
    Py_XDECREF(type);
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}
#endif
