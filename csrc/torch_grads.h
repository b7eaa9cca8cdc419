// p.grad from C++, without a Python object for it. The stable ABI has no call for this, so one function of libc10 is
// looked up by its name: without it there are no launch plans, and every step goes through the registered ops.
#pragma once

#include <dlfcn.h>

#include "checks.h"
#include "core_api.h"

namespace rst {

// const at::Tensor& c10::TensorImpl::grad() const; a reference to a tensor is what the stable ABI calls its handle.
inline const auto torch_grad = reinterpret_cast<AtenTensorHandle (*)(const void*)>(dlsym(RTLD_DEFAULT, "_ZNK3c1010TensorImpl4gradEv"));

inline bool can_read_grads() { return torch_grad != nullptr; }

// The handle of p.grad, which belongs to p, or null.
inline AtenTensorHandle grad_of(const StableTensor& param) {
  AtenTensorHandle grad = torch_grad(*reinterpret_cast<void**>(param.get()));  // a handle points to a TensorImpl*
  bool defined = false;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(grad, &defined));
  return defined ? grad : nullptr;
}

inline StableTensor shared(AtenTensorHandle tensor) {
  AtenTensorHandle copy = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor, &copy));
  return StableTensor(copy);
}

// p.grad = None.
inline void clear_grad(const StableTensor& param) {
  static const StableTensor undefined;
  if (AtenTensorHandle grad = grad_of(param)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors(undefined.get(), grad));
  }
}

// False if the tensor is not an ordinary strided tensor of the CPU.
inline bool read_facts(AtenTensorHandle tensor, TensorFacts& facts) {
  int32_t layout = 0, device = 0, dtype = 0;
  int64_t ndim = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  if (aoti_torch_get_layout(tensor, &layout) != 0 || layout != aoti_torch_layout_strided() ||
      aoti_torch_get_device_type(tensor, &device) != 0 || device != aoti_torch_device_type_cpu() ||
      aoti_torch_get_dtype(tensor, &dtype) != 0 || aoti_torch_get_dim(tensor, &ndim) != 0 ||
      aoti_torch_get_sizes(tensor, &sizes) != 0 || aoti_torch_get_strides(tensor, &strides) != 0 ||
      aoti_torch_get_data_ptr(tensor, &facts.data) != 0) {
    return false;
  }
  facts.dtype = dtype;
  facts.ndim = static_cast<int>(ndim);
  facts.sizes = sizes;
  facts.strides = strides;
  return true;
}

}  // namespace rst
