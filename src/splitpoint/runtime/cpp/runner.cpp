// Runs the steps of a compiled model without Python: allocate, view, call a kernel, call an
// operator. The steps come as Python lists (compilers/native_steps.py, runtime/native.py); they become one
// flat list over a frame of tensors (runner_reader.h), and a call of the program is one call from
// Python, which holds the GIL only to take the arguments and to give back the results.
#ifdef SPLITPOINT_PYTHON
#include "runner_program.h"  // first: it includes Python.h

#include <torch/csrc/utils/object_ptr.h>

#include <memory>
#include <utility>
#include <vector>

namespace splitpoint::runner {
namespace {

struct PyProgram {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  std::unique_ptr<Program> program;
  std::shared_ptr<const Binding> binding;
};

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

// program(*lengths, *tensors) -> tuple of tensors
PyObject* program_call(PyObject* self, PyObject* const* args, size_t nargsf, PyObject* names) {
  HANDLE_TH_ERRORS
  const auto* me = reinterpret_cast<PyProgram*>(self);
  const size_t count = PyVectorcall_NARGS(nargsf);
  Program& program = *me->program;
  TORCH_CHECK_TYPE(count >= program.inputs() + program.lengths() && names == nullptr,
                   "a program takes ", program.lengths(), " lengths and ", program.inputs(),
                   " tensors");
  const size_t first = count - program.inputs();
  Lengths lengths;
  for (size_t i = 0; i < first; ++i) {
    lengths.push_back(PyLong_AsLongLong(args[i]));
    if (lengths.back() == -1 && PyErr_Occurred()) throw python_error();
  }
  c10::SmallVector<Tensor, 8> tensors;
  for (size_t i = first; i < count; ++i) {
    TORCH_CHECK_TYPE(THPVariable_Check(args[i]), "a program takes tensors, got ",
                     Py_TYPE(args[i])->tp_name);
    tensors.push_back(THPVariable_Unpack(args[i]));
  }
  // A call that runs while another thread binds anew goes on with what it has.
  const std::shared_ptr<const Binding> binding = me->binding;
  TORCH_CHECK(binding != nullptr, "a program is called before its tensors are bound");
  c10::SmallVector<Tensor, 8> results;
  {
    const WithoutGil without;
    Program::Frame frame(program.frame_size());
    program.run(lengths, frame, *binding, tensors.data());
    for (const Operand each : program.outputs()) {
      results.push_back(program.at(each, frame, *binding, tensors.data()));
    }
  }
  auto made = THPObjectPtr(PyTuple_New(static_cast<Py_ssize_t>(results.size())));
  if (!made) throw python_error();
  for (size_t i = 0; i < results.size(); ++i) {
    PyObject* wrapped = THPVariable_Wrap(std::move(results[i]));
    if (!wrapped) throw python_error();
    PyTuple_SET_ITEM(made.get(), static_cast<Py_ssize_t>(i), wrapped);
  }
  return made.release();
  END_HANDLE_TH_ERRORS
}

PyObject* program_bind(PyObject* self, PyObject* given) {
  HANDLE_TH_ERRORS
  auto* me = reinterpret_cast<PyProgram*>(self);
  TORCH_CHECK_TYPE(PyList_Check(given), "bind takes a list of tensors");
  TORCH_CHECK_VALUE(static_cast<size_t>(PyList_GET_SIZE(given)) == me->program->bound(),
                    "a program reads ", me->program->bound(), " tensors of the module, got ",
                    PyList_GET_SIZE(given));
  std::vector<Tensor> tensors;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(given); ++i) {
    PyObject* each = PyList_GET_ITEM(given, i);
    TORCH_CHECK_TYPE(THPVariable_Check(each), "bind takes tensors, got ", Py_TYPE(each)->tp_name);
    tensors.push_back(THPVariable_Unpack(each));
  }
  const std::shared_ptr<const Binding> before =
      std::exchange(me->binding, me->program->bind(std::move(tensors)));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* program_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  PyObject *pieces, *steps, *outputs;
  Py_ssize_t inputs, bound;
  static const char* const names[] = {"pieces", "steps", "inputs", "bound", "outputs", nullptr};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!nnO!", const_cast<char**>(names),
                                   &PyList_Type, &pieces, &PyList_Type, &steps, &inputs, &bound,
                                   &PyList_Type, &outputs)) {
    return nullptr;
  }
  auto program = std::make_unique<Program>(py::reinterpret_borrow<py::list>(pieces),
                                           py::reinterpret_borrow<py::list>(steps), inputs, bound,
                                           py::reinterpret_borrow<py::list>(outputs));
  PyObject* self = type->tp_alloc(type, 0);
  if (!self) return nullptr;
  auto* me = reinterpret_cast<PyProgram*>(self);
  me->vectorcall = program_call;
  new (&me->program) std::unique_ptr<Program>(std::move(program));
  new (&me->binding) std::shared_ptr<const Binding>();
  return self;
  END_HANDLE_TH_ERRORS
}

void program_dealloc(PyObject* self) {
  auto* me = reinterpret_cast<PyProgram*>(self);
  me->program.~unique_ptr();
  me->binding.~shared_ptr();
  Py_TYPE(self)->tp_free(self);
}

PyMethodDef program_methods[] = {
    {"bind", program_bind, METH_O, "Give it the tensors of the module that it reads, in order."},
    {nullptr, nullptr, 0, nullptr},
};

PyTypeObject program_type = {PyVarObject_HEAD_INIT(nullptr, 0) "splitpoint.Program"};

PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "runner", nullptr, -1, nullptr};

}  // namespace
}  // namespace splitpoint::runner

PyMODINIT_FUNC PyInit_runner() {
  using namespace splitpoint::runner;
  program_type.tp_basicsize = sizeof(PyProgram);
  program_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  program_type.tp_doc = "Steps of a compiled model: call with the lengths of the dynamic dimensions,"
                        " then the tensors.";
  program_type.tp_vectorcall_offset = offsetof(PyProgram, vectorcall);
  program_type.tp_call = PyVectorcall_Call;
  program_type.tp_new = program_new;
  program_type.tp_dealloc = program_dealloc;
  program_type.tp_methods = program_methods;
  if (PyType_Ready(&program_type) < 0) return nullptr;
  PyObject* made = PyModule_Create(&module_definition);
  if (!made) return nullptr;
  if (PyModule_AddObjectRef(made, "Program", reinterpret_cast<PyObject*>(&program_type)) < 0) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}
#endif
