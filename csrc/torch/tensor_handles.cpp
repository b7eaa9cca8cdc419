#include "torch/tensor_handles.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "torch/autograd.h"

namespace rst {

namespace {

// Tensors that stay the same while the handle lives. Their pointers are stored side by side, since torch's own handles
// are scattered over memory.
struct HeldTensors {
  TensorList tensors;
  std::vector<const void*> impls;

  explicit HeldTensors(TensorList given) : tensors(std::move(given)) {
    for (const StableTensor& t : tensors) impls.push_back(impl_of(t.get()));
  }
  AtenTensorHandle operator[](int64_t i) const { return handle_at(&impls[i]); }
  int64_t size() const { return static_cast<int64_t>(tensors.size()); }
};

HeldTensors& held(int64_t handle) { return *reinterpret_cast<HeldTensors*>(handle); }

int64_t hold(TensorList tensors) { return reinterpret_cast<int64_t>(new HeldTensors(std::move(tensors))); }

TensorList unhold(int64_t handle) {
  TensorList tensors = std::move(held(handle).tensors);
  release(handle);
  return tensors;
}

bool is_at(AtenTensorHandle tensor, const ExpectedLayout& layout) {
  void* address = nullptr;
  int64_t* strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &address));
  if (address != layout.address || layout.ndim == 0) return address == layout.address;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  return equal(strides, layout.strides, layout.ndim);
}

// The objects that torch keeps for a tensor are scattered over memory, and reading each would wait for it: the tensor,
// its storage, what autograd knows about it, its gradient and the gradient's storage. So they are prefetched, each of
// them this many tensors before the next.
constexpr int64_t kPrefetchDistance = 4;

// All lines of an object, which may begin anywhere in the first.
void prefetch(const void* object, int bytes = 1) {
  constexpr int kLine = 64;
  const char* p = static_cast<const char*>(object);
  for (int i = 0; i < bytes - 1; i += kLine) __builtin_prefetch(p + i);
  __builtin_prefetch(p + bytes - 1);
}

// Guesses, which cost time but no correctness if they are wrong: the size of these objects as far as they are read, and
// which words of a tensor point to its storage, to what autograd knows about it and to its version counter, in the
// versions of torch that this is written for.
void prefetch_tensor(AtenTensorHandle tensor) { prefetch(impl_of(tensor), 0xb0); }
constexpr int kStorage = 2, kAutograd = 3, kVersion = 5;
const void* word_of(AtenTensorHandle tensor, int word) {
  return static_cast<const void* const*>(impl_of(tensor))[word];
}
void prefetch_storage(AtenTensorHandle tensor) { prefetch(word_of(tensor, kStorage), 0x40); }

// Calls last(i) for every i of [begin, end), and before it each of `steps`, the first one for an i that is furthest
// ahead.
template <class Last, class... Steps>
void visit(int64_t begin, int64_t end, Last last, Steps... steps) {
  constexpr int64_t kLead = sizeof...(steps) * kPrefetchDistance;
  for (int64_t i = begin - kLead; i < end; ++i) {
    int64_t ahead = i + kLead;
    const auto turn = [&](auto step) {
      if (ahead >= begin && ahead < end) step(ahead);
      ahead -= kPrefetchDistance;
    };
    (turn(steps), ...);
    turn(last);
  }
}

void clear(AtenTensorHandle tensor) { TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors(undefined.get(), tensor)); }

}  // namespace

bool facts_of(int64_t handle, int64_t index, TensorFacts& facts) {
  return read_facts(held(handle).tensors[index].get(), facts);  // slots too, whose impls change
}

void release(int64_t handle) { delete &held(handle); }

bool read_grads(int64_t handle, int64_t count, const ExpectedLayout* layouts, void** grads, SeenGrad* seen,
                void* context) {
  const HeldTensors& list = held(handle);
  const auto grad = [&](int64_t i) { return static_cast<AtenTensorHandle>(grads[i]); };
  bool fine = true;
  visit(
      0, count,
      [&](int64_t i) {
        TensorFacts facts;
        fine = fine && is_at(list[i], layouts[i]) && read_facts(grad(i), facts) && seen(context, i, facts);
      },
      [&](int64_t i) {
        prefetch_tensor(list[i]);
        prefetch(grads[i]);  // where p.grad was at the last call
      },
      [&](int64_t i) {
        prefetch_storage(list[i]);
        prefetch(word_of(list[i], kAutograd));
        prefetch(word_of(list[i], kVersion));  // for bump_versions
      },
      [&](int64_t i) {
        grads[i] = grad_of(list[i]);
        if (grads[i] == nullptr) {
          fine = false;
        } else {
          prefetch_tensor(grad(i));
        }
      },
      [&](int64_t i) {
        if (fine) prefetch_storage(grad(i));
      });
  return fine;
}

bool in_place(int64_t handle, int64_t begin, int64_t end, const ExpectedLayout* layouts) {
  const HeldTensors& list = held(handle);
  bool fine = true;
  visit(
      begin, end, [&](int64_t i) { fine = fine && is_at(list[i], layouts[i]); },
      [&](int64_t i) { prefetch_tensor(list[i]); }, [&](int64_t i) { prefetch_storage(list[i]); });
  return fine;
}

bool has_grads(int64_t handle, int64_t begin) {
  const HeldTensors& list = held(handle);
  for (int64_t i = begin; i < list.size(); ++i) {
    if (grad_of(list[i]) != nullptr) return true;
  }
  return false;
}

void clear_grads(void* const* grads, int64_t count) {
  const auto grad = [&](int64_t i) { return static_cast<AtenTensorHandle>(grads[i]); };
  visit(
      0, count, [&](int64_t i) { clear(grad(i)); }, [&](int64_t i) { prefetch(grad(i)); },
      [&](int64_t i) { prefetch(impl_of(grad(i))); });
}

// Undefined until they are filled, so only the tensors of their list say what is in them, not its impls.
int64_t make_slots(int64_t count) { return hold(TensorList(count)); }

void fill_slots(int64_t slots, void* const* grads) {
  void* const* grad = grads;
  for (const StableTensor& slot : held(slots).tensors) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors(static_cast<AtenTensorHandle>(*grad++), slot.get()));
  }
}

void empty_slots(int64_t slots) {
  const TensorList& tensors = held(slots).tensors;
  const auto slot = [&](int64_t i) { return tensors[i].get(); };
  visit(
      0, static_cast<int64_t>(tensors.size()), [&](int64_t i) { clear(slot(i)); },
      [&](int64_t i) { prefetch(slot(i)); }, [&](int64_t i) { prefetch(impl_of(slot(i))); });
}

void bump_versions(int64_t handle, int64_t count) {
  for (int64_t i = 0; i < count; ++i) torch_bump_version(held(handle)[i]);
}

STABLE_TORCH_LIBRARY_FRAGMENT(rst_fused, m) {
  m.def("_hold(Tensor[] tensors) -> int");
  m.def("_unhold(int handle) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(rst_fused, CompositeExplicitAutograd, m) {
  m.impl("_hold", TORCH_BOX(&hold));
  m.impl("_unhold", TORCH_BOX(&unhold));
}

}  // namespace rst
