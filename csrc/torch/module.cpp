// The extension module rst_fused._C. Importing it registers the ops; its attribute `core` is the capsule of plan_api.h.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#ifdef RST_CUDA_VERSION
#include "torch/cuda_target.h"
#endif
#include "torch/plan_api.h"
#include "torch/threads.h"

namespace rst {

namespace {

CoreApi make_api() {
  CoreApi api{};
  api.cpu = kCpuOps;
  api.tensors = &tensor_api();
  api.runnable_kernels = &runnable_kernels;
  api.select_kernels = &select_kernels;
  api.kernels = &kernels;
  api.kernels_from_memory = &kernels_from_memory;
  api.cache_bytes = &cache_bytes;
  api.core_cache_bytes = &core_cache_bytes;
  api.non_temporal_threshold = &non_temporal_threshold;
  api.set_non_temporal_threshold = &set_non_temporal_threshold;
#ifdef RST_CUDA_VERSION
  api.gpu = &cuda_ops();
  api.cuda_description = &cuda::build_description;
  api.driver_version = &cuda::driver_version;
  api.has_stream_api = &has_stream_api;
  api.simulate_gpu = [](auto* launch, bool scalars_on_device, bool hyperparams_by_value) {
    simulation().launcher.launch = launch;
    simulation().scalars_on_device = scalars_on_device;
    simulation().hyperparams_by_value = hyperparams_by_value;
  };
#endif
  return api;
}

}  // namespace

}  // namespace rst

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
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
