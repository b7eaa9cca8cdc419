// The extension module rst_fused._C. Importing it registers the ops; its attribute `core` is the capsule of core_api.h.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#ifdef RST_CUDA_VERSION
#include "gpu_target.h"
#endif
#include "torch_autograd.h"
#include "torch_threads.h"

namespace rst {

namespace {

// Tensors that stay the same while they are held, their pointers side by side: torch's own handles lie all over memory.
struct Held {
  TensorList tensors;
  std::vector<const void*> impls;

  explicit Held(TensorList given) : tensors(std::move(given)) {
    for (const StableTensor& t : tensors) impls.push_back(impl_of(t.get()));
  }
  AtenTensorHandle operator[](int64_t i) const { return handle_at(&impls[i]); }
  int64_t size() const { return static_cast<int64_t>(tensors.size()); }
};

int64_t hold(TensorList tensors) { return reinterpret_cast<int64_t>(new Held(std::move(tensors))); }
Held& held(int64_t handle) { return *reinterpret_cast<Held*>(handle); }
void release(int64_t handle) { delete &held(handle); }

TensorList unhold(int64_t handle) {
  TensorList tensors = std::move(held(handle).tensors);
  release(handle);
  return tensors;
}

// Undefined until they are filled: so only held(slots).tensors says what is in them.
int64_t make_slots(int64_t count) { return hold(TensorList(count)); }

bool lies_at(AtenTensorHandle tensor, const Place& place) {
  void* address = nullptr;
  int64_t* strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &address));
  if (address != place.address || place.ndim == 0) return address == place.address;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  return equal(strides, place.strides, place.ndim);
}

// What torch keeps of a tensor lies all over memory, and a look at it would wait for each piece: for the tensor, its
// storage, what autograd knows of it, its gradient and that one's storage. So what will be looked at is fetched ahead, each
// of these so many tensors before the next.
constexpr int64_t kAhead = 4;

// All lines of an object, which may begin anywhere in the first.
void fetch(const void* object, int bytes = 1) {
  constexpr int kLine = 64;
  const char* p = static_cast<const char*>(object);
  for (int i = 0; i < bytes - 1; i += kLine) __builtin_prefetch(p + i);
  __builtin_prefetch(p + bytes - 1);
}

// Guesses, and only that: so long are these objects as far as they are read, and these words of a tensor point to its
// storage, to what autograd knows of it and to its version counter, in the versions of torch that this is for.
void fetch_tensor(AtenTensorHandle tensor) { fetch(impl_of(tensor), 0xb0); }
constexpr int kStorage = 2, kAutograd = 3, kVersion = 5;
const void* word_of(AtenTensorHandle tensor, int word) { return static_cast<const void* const*>(impl_of(tensor))[word]; }
void fetch_storage(AtenTensorHandle tensor) { fetch(word_of(tensor, kStorage), 0x40); }

// Calls last(i) for every i of [begin, end), and before it each of `steps`, the first one for an i that is furthest ahead.
template <class Last, class... Steps>
void visit(int64_t begin, int64_t end, Last last, Steps... steps) {
  constexpr int64_t kLead = sizeof...(steps) * kAhead;
  for (int64_t i = begin - kLead; i < end; ++i) {
    int64_t ahead = i + kLead;
    const auto turn = [&](auto step) {
      if (ahead >= begin && ahead < end) step(ahead);
      ahead -= kAhead;
    };
    (turn(steps), ...);
    turn(last);
  }
}

bool read_grads(int64_t handle, int64_t count, const Place* places, void** grads, SeenGrad* seen, void* context) {
  const Held& list = held(handle);
  const auto grad = [&](int64_t i) { return static_cast<AtenTensorHandle>(grads[i]); };
  bool fine = true;
  visit(
      0, count,
      [&](int64_t i) {
        TensorFacts facts;
        fine = fine && lies_at(list[i], places[i]) && read_facts(grad(i), facts) && seen(context, i, facts);
      },
      [&](int64_t i) {
        fetch_tensor(list[i]);
        fetch(grads[i]);  // where p.grad was at the last call
      },
      [&](int64_t i) {
        fetch_storage(list[i]);
        fetch(word_of(list[i], kAutograd));
        fetch(word_of(list[i], kVersion));  // for bump_versions
      },
      [&](int64_t i) {
        grads[i] = grad_of(list[i]);
        if (grads[i] == nullptr) {
          fine = false;
        } else {
          fetch_tensor(grad(i));
        }
      },
      [&](int64_t i) {
        if (fine) fetch_storage(grad(i));
      });
  return fine;
}

bool in_place(int64_t handle, int64_t begin, int64_t end, const Place* places) {
  const Held& list = held(handle);
  bool fine = true;
  visit(
      begin, end, [&](int64_t i) { fine = fine && lies_at(list[i], places[i]); },
      [&](int64_t i) { fetch_tensor(list[i]); }, [&](int64_t i) { fetch_storage(list[i]); });
  return fine;
}

bool has_grads(int64_t handle, int64_t begin) {
  const Held& list = held(handle);
  for (int64_t i = begin; i < list.size(); ++i) {
    if (grad_of(list[i]) != nullptr) return true;
  }
  return false;
}

void clear(AtenTensorHandle tensor) { TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors(undefined.get(), tensor)); }

void clear_grads(void* const* grads, int64_t count) {
  const auto grad = [&](int64_t i) { return static_cast<AtenTensorHandle>(grads[i]); };
  visit(0, count, [&](int64_t i) { clear(grad(i)); }, [&](int64_t i) { fetch(grad(i)); },
        [&](int64_t i) { fetch(impl_of(grad(i))); });
}

void fill_slots(int64_t slots, void* const* grads) {
  void* const* grad = grads;
  for (const StableTensor& slot : held(slots).tensors) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors(static_cast<AtenTensorHandle>(*grad++), slot.get()));
  }
}

void empty_slots(int64_t slots) {
  const TensorList& tensors = held(slots).tensors;
  const auto slot = [&](int64_t i) { return tensors[i].get(); };
  visit(0, static_cast<int64_t>(tensors.size()), [&](int64_t i) { clear(slot(i)); },
        [&](int64_t i) { fetch(slot(i)); }, [&](int64_t i) { fetch(impl_of(slot(i))); });
}

void bump_versions(int64_t handle, int64_t count) {
  for (int64_t i = 0; i < count; ++i) torch_bump_version(held(handle)[i]);
}

CoreApi make_api() {
  CoreApi api{};
  api.cpu.grad_norm = [](const Table& t, const Call& c, double* stats, int32_t) {
    grad_norm(t, c, torch_threads(), stats);
  };
  api.cpu.perturb = [](const Table& t, const Call& c, double* stats, const double* rho, int rows, int32_t) {
    perturb(t, c, torch_threads(), stats, rho, rows);
  };
  api.cpu.restore = [](const Table& t, const Call& c, int32_t) { restore(t, c, torch_threads()); };
  api.cpu.sgd_step = [](const Table& t, const Call& c, const cuda::DeviceNumbers&, int32_t) { sgd_step(t, c, torch_threads()); };
  api.cpu.adam_step = [](const Table& t, const Call& c, const cuda::DeviceNumbers&, int32_t) { adam_step(t, c, torch_threads()); };
  api.held_facts = [](int64_t handle, int64_t i, TensorFacts& facts) {
    return read_facts(held(handle).tensors[i].get(), facts);  // of slots, too
  };
  api.describe = [](int32_t dtype, Tensor& t) { return describe(torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype)), t); };
  api.in_place = &in_place;
  api.knows_autograd = &knows_autograd;
  api.read_grads = &read_grads;
  api.has_grads = &has_grads;
  api.clear_grads = &clear_grads;
  api.make_slots = &make_slots;
  api.fill_slots = &fill_slots;
  api.empty_slots = &empty_slots;
  api.bump_versions = &bump_versions;
  api.release = &release;
  api.runnable_kernels = &runnable_kernels;
  api.cache_bytes = &cache_bytes;
  api.select_kernels = &select_kernels;
  api.kernels = &kernels;
#ifdef RST_CUDA_VERSION
  api.gpu = &gpu_ops();
  api.cuda_description = &cuda::build_description;
  api.knows_streams = &knows_streams;
  api.simulate_gpu = [](auto* launch, bool device_numbers) {
    simulation().launcher.launch = launch;
    simulation().device_numbers = device_numbers;
  };
#endif
  return api;
}

STABLE_TORCH_LIBRARY_FRAGMENT(rst_fused, m) {
  m.def("_hold(Tensor[] tensors) -> int");
  m.def("_unhold(int handle) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(rst_fused, CompositeExplicitAutograd, m) {
  m.impl("_hold", TORCH_BOX(&hold));
  m.impl("_unhold", TORCH_BOX(&unhold));
}

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
