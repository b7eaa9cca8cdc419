// The extension module rst_fused._C. Importing it registers the ops; its attribute `core` is the capsule of core_api.h.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "core_api.h"
#include "torch_threads.h"

namespace rst {

namespace {

int64_t hold(TensorList tensors) { return reinterpret_cast<int64_t>(new TensorList(std::move(tensors))); }
TensorList& held(int64_t handle) { return *reinterpret_cast<TensorList*>(handle); }

CoreApi make_api() {
  CoreApi api{};
  api.grad_norm = [](const Table& t, const Call& c, double* stats) { grad_norm(t, c, torch_threads(), stats); };
  api.perturb = [](const Table& t, const Call& c, const double* stats, const double* rho, int rows) {
    perturb(t, c, torch_threads(), stats, rho, rows);
  };
  api.restore = [](const Table& t, const Call& c) { restore(t, c, torch_threads()); };
  api.sgd_step = [](const Table& t, const Call& c) { sgd_step(t, c, torch_threads()); };
  api.adam_step = [](const Table& t, const Call& c) { adam_step(t, c, torch_threads()); };
  api.held_count = [](int64_t handle) { return static_cast<int64_t>(held(handle).size()); };
  api.held_address = [](int64_t handle, int64_t index) { return held(handle)[index].data_ptr(); };
  api.held_strides = [](int64_t handle, int64_t index) { return held(handle)[index].strides().data(); };
  api.release = [](int64_t handle) { delete &held(handle); };
  api.runnable_kernels = &runnable_kernels;
  api.select_kernels = &select_kernels;
  api.kernels = &kernels;
  return api;
}

STABLE_TORCH_LIBRARY_FRAGMENT(rst_fused, m) { m.def("_hold(Tensor[] tensors) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(rst_fused, CompositeExplicitAutograd, m) { m.impl("_hold", TORCH_BOX(&hold)); }

}  // namespace

}  // namespace rst

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  static rst::CoreApi api = rst::make_api();
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyObject* capsule = PyCapsule_New(&api, rst::kCoreCapsule, nullptr);
  if (capsule == nullptr || PyModule_AddObject(module, "core", capsule) < 0) {
    Py_XDECREF(capsule);
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
