// The extension module rst_fused._plan_ext: what needs Python but no torch. Launch plans, build facts, SIMD levels.
#include <cstring>
#include <map>
#include <string>

#include "plan/plan.h"

namespace rst {

static std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const KernelTable* table : core().runnable_kernels()) names.push_back(table->name);
  return names;
}

static std::map<std::string, std::string> build_info() {
  return {{"compiler", __VERSION__},
          {"C++ standard", std::to_string(__cplusplus)},
#if defined(__x86_64__)
          {"SIMD levels compiled", "plain, avx2, avx512"},
#else
          {"SIMD levels compiled", "plain"},
#endif
          {"CUDA", core().cuda_description == nullptr ? "not built" : core().cuda_description()}};
}

// Takes the place of a GPU in tests: called as (kernel, blocks, threads per block, arguments). Never freed: Python may
// be gone when static objects are destroyed.
static py::object* simulator = nullptr;

static void simulate_gpu(py::object callback, bool scalars_on_device, bool hyperparams_by_value) {
  if (core().simulate_gpu == nullptr) throw py::value_error("the extension was built without CUDA");
  if (simulator == nullptr) simulator = new py::object;
  *simulator = callback;
  auto launch = [](const cuda::GpuKernel& kernel, unsigned blocks, const void* args, const cuda::Launcher&) {
    py::gil_scoped_acquire locked;
    try {
      (*simulator)(kernel.name, blocks, cuda::kThreads, py::bytes(static_cast<const char*>(args), kernel.bytes));
    } catch (py::error_already_set& error) {  // torch carries messages through, but no Python objects
      throw std::runtime_error(error.what());
    }
  };
  core().simulate_gpu(callback.is_none() ? nullptr : +launch, scalars_on_device, hyperparams_by_value);
}

// Takes the place of a GPU where the time of the host is measured: the arguments are copied, as a driver does, and
// nothing starts.
static void discard_gpu_launches() {
  if (core().simulate_gpu == nullptr) throw py::value_error("the extension was built without CUDA");
  static unsigned char arguments[cuda::kArgumentBytes];
  core().simulate_gpu(
      [](const cuda::GpuKernel& kernel, unsigned, const void* args, const cuda::Launcher&) {
        memcpy(arguments, args, static_cast<size_t>(kernel.bytes));
        asm volatile("" : : "r"(arguments) : "memory");  // the copy is not for nothing
      },
      false, false);
}

// nullptr before construction and after destruction.
static Plan* constructed(PyObject* self) {
  const auto held = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return held.holder_constructed() ? held.value_ptr<Plan>() : nullptr;
}

// Takes part in Python's garbage collection.
static void collect_garbage(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const Plan* plan = constructed(self);
    return plan == nullptr ? 0 : plan->visit(visit, arg);
  };
  type.tp_clear = [](PyObject* self) {
    if (Plan* plan = constructed(self)) plan->clear();
    return 0;
  };
}

}  // namespace rst

PYBIND11_MODULE(_plan_ext, m) {
  using namespace rst;
  m.doc() = "Launch plans of the eager path, and facts about the build.";
  m.def("connect", &connect, py::arg("core"));
  m.def("can_plan", &can_plan);
  m.def("knows_impl_layout", &knows_impl_layout);
  m.def("knows_references", &knows_references);
  m.def("has_weak_references", &has_weak_references);
  m.def("build_info", &build_info);
  m.def("has_stream_api", [] { return core().has_stream_api != nullptr && core().has_stream_api(); });
  m.def("driver_version", [] { return core().driver_version == nullptr ? 0 : core().driver_version(); });
  m.def("simulate_gpu", &simulate_gpu, py::arg("callback"), py::arg("scalars_on_device") = false,
        py::arg("hyperparams_by_value") = false);
  m.def("discard_gpu_launches", &discard_gpu_launches);
  m.def("cache_bytes", [] { return core().cache_bytes(); });
  m.def("core_cache_bytes", [] { return core().core_cache_bytes(); });
  m.def(
      "non_temporal_threshold", [](int threads) { return core().non_temporal_threshold(threads); }, py::arg("threads"));
  m.def(
      "set_non_temporal_threshold", [](int64_t bytes) { core().set_non_temporal_threshold(bytes); }, py::arg("bytes"));
  m.def("simd_levels", &simd_levels);
  m.def("simd_level", [] { return std::string(core().kernels().name); });
  m.def("simd_level_from_memory", [] { return std::string(core().kernels_from_memory().name); });
  m.def("select_simd", [](const std::string& name) { return core().select_kernels(name.c_str()); }, py::arg("name"));
  py::class_<KeptGrads>(m, "KeptGrads").def("as_list", &KeptGrads::as_list).def("clear", &KeptGrads::clear);
  py::class_<Plan>(m, "Plan", py::custom_type_setup(collect_garbage))
      .def(py::init<bool, py::list, py::list, py::list, py::list, std::vector<int64_t>, py::list, std::vector<py::list>,
                    py::list, py::list, std::vector<int64_t>, int, bool, bool, py::dict, py::object,
                    std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>, bool>(),
           py::arg("gpu"), py::arg("groups"), py::arg("everything"), py::arg("active"), py::arg("idle"),
           py::arg("sizes"), py::arg("masters"), py::arg("states"), py::arg("backups"), py::arg("steps"),
           py::arg("row_groups"), py::arg("rule"), py::arg("option"), py::arg("maximize"), py::arg("state"),
           py::arg("step_state"), py::arg("parts") = std::vector<int64_t>(), py::arg("shards") = std::vector<int64_t>(),
           py::arg("indices") = std::vector<int64_t>(), py::arg("swapped") = std::vector<int64_t>(),
           py::arg("lent") = false)
      .def("poll", &Plan::poll)
      .def("perturb", &Plan::perturb)
      .def("update", &Plan::update)
      .def("grad_norm", &Plan::grad_norm)
      .def("restore", &Plan::restore)
      .def("match", &Plan::match)
      .def("match_norm", &Plan::match_norm)
      .def("release", &Plan::release)
      .def("clear_grads", &Plan::clear_grads)
      .def("bump_versions", &Plan::bump_versions)
      .def("first_grads_of", &Plan::first_grads_of)
      .def_property_readonly("kept", &Plan::kept)
      .def_property_readonly("sees_references", &Plan::sees_references)
      .def("keep", &Plan::keep);
}
