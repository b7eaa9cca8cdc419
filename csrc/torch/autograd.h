// What autograd knows about a parameter, from C++ and without a Python object for each: p.grad, and p's version
// counter. The stable ABI has no calls for this, so two functions of torch are looked up by name: without them there
// are no launch plans, and every step goes through the registered ops.
#pragma once

#include <dlfcn.h>

#include <algorithm>

#include "torch/checks.h"
#include "torch/plan_api.h"

namespace rst {

// const at::Tensor& c10::TensorImpl::grad() const; a reference to a tensor is what the stable ABI calls its handle.
inline const auto torch_grad =
    reinterpret_cast<AtenTensorHandle (*)(const void*)>(dlsym(RTLD_DEFAULT, "_ZNK3c1010TensorImpl4gradEv"));
// void torch::autograd::impl::bump_version(const at::Tensor&).
inline const auto torch_bump_version = reinterpret_cast<void (*)(AtenTensorHandle)>(
    dlsym(RTLD_DEFAULT, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"));

// The TensorImpl that a handle, which is a reference to a tensor, points to.
inline const void* impl_of(AtenTensorHandle tensor) { return *reinterpret_cast<const void* const*>(tensor); }

// Undefined tensors all point to the same TensorImpl.
inline const StableTensor undefined;

// The handle of p.grad, which belongs to p, or null.
inline AtenTensorHandle grad_of(AtenTensorHandle param) {
  AtenTensorHandle grad = torch_grad(impl_of(param));
  return impl_of(grad) == impl_of(undefined.get()) ? nullptr : grad;
}

inline const int32_t strided_layout = aoti_torch_layout_strided();
inline const int32_t cpu_device = aoti_torch_device_type_cpu();
inline const int32_t cuda_device = aoti_torch_device_type_cuda();

// From which byte to which the tensor's elements are in its storage. False if they reach beyond it.
inline bool read_extent(AtenTensorHandle tensor, const TensorFacts& facts, int64_t& begin, int64_t& end) {
  int64_t offset = 0, bytes = 0, last = 0;
  if (aoti_torch_get_storage_offset(tensor, &offset) != 0 || aoti_torch_get_storage_size(tensor, &bytes) != 0) {
    return false;
  }
  const auto element = static_cast<int64_t>(aoti_torch_dtype_element_size(facts.dtype));
  begin = end = offset * element;
  for (int d = 0; d < facts.ndim; ++d) {
    if (facts.sizes[d] == 0) return true;
    last += (facts.sizes[d] - 1) * facts.strides[d];
  }
  end += (last + 1) * element;
  return end <= bytes;
}

// False if the tensor is not an ordinary strided tensor with memory on the CPU or a GPU for all of its elements.
inline bool read_facts(AtenTensorHandle tensor, TensorFacts& facts) {
  int32_t layout = 0, device = 0, dtype = 0;
  int64_t ndim = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  if (aoti_torch_get_layout(tensor, &layout) != 0 || layout != strided_layout ||
      aoti_torch_get_device_type(tensor, &device) != 0 || (device != cpu_device && device != cuda_device) ||
      aoti_torch_get_dtype(tensor, &dtype) != 0 || aoti_torch_get_dim(tensor, &ndim) != 0 ||
      aoti_torch_get_sizes(tensor, &sizes) != 0 || aoti_torch_get_strides(tensor, &strides) != 0 ||
      aoti_torch_get_data_ptr(tensor, &facts.data) != 0) {
    return false;
  }
  // A wrapper subclass and a storage that was freed have no address, though they have elements.
  if (facts.data == nullptr && std::find(sizes, sizes + ndim, 0) == sizes + ndim) return false;
  facts.device = kOnCpu;
  if (device == cuda_device && aoti_torch_get_device_index(tensor, &facts.device) != 0) return false;
  facts.dtype = dtype;
  facts.ndim = static_cast<int>(ndim);
  facts.sizes = sizes;
  facts.strides = strides;
  int64_t begin = 0, end = 0;
  return read_extent(tensor, facts, begin, end);
}

}  // namespace rst
