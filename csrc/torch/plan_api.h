// What _C (the kernels, behind torch's stable ABI) offers to _plan_ext (launch plans of the eager path): the ops on
// torch's threads, and lists of tensors with their gradients. Passed as a capsule; both modules are built together.
#pragma once

#include "cpu/run.h"
#include "cuda/launch.h"

namespace rst {

constexpr const char* kCoreCapsule = "rst_fused._C.core";

constexpr int32_t kOnCpu = -1;

struct TensorFacts {
  void* data;
  int32_t device;  // the index of a GPU, or kOnCpu
  int32_t dtype;   // torch's number for it
  int ndim;
  const int64_t* sizes;  // belong to the tensor
  const int64_t* strides;
};

// Where a tensor is expected to be stored. Strides are compared for the first ndim dimensions; 0: not at all.
struct ExpectedLayout {
  void* address;
  int ndim;
  const int64_t* strides;
};

// Called with the gradient of the parameter at `index` while it is in the cache; after false it is not called again.
using SeenGrad = bool(void* context, int64_t index, const TensorFacts& grad);

// For a handful of dimensions faster than memcmp.
inline bool equal(const int64_t* a, const int64_t* b, int ndim) {
  for (int d = 0; d < ndim; ++d) {
    if (a[d] != b[d]) return false;
  }
  return true;
}

// The ops, on torch's threads or on the current stream of a GPU.
struct CoreOps {
  void (*grad_norm)(const Table& table, const OpParams& params, double* stats, int32_t device);
  void (*perturb)(const Table& table, const OpParams& params, double* stats, const double* rho, int rows,
                  int32_t device);
  void (*restore)(const Table& table, const OpParams& params, int32_t device);
  // `on_device`: the numbers of AMP, where they are in GPU memory.
  void (*update)(const Table& table, const OpParams& params, const cuda::DeviceScalars& on_device, int32_t device);
};

struct CoreApi {
  CoreOps cpu;
  const CoreOps* gpu;  // null where the extension was built without CUDA

  // Lists of tensors held by the op rst_fused::_hold, which returns their handle as an integer.
  bool (*facts_of)(int64_t handle, int64_t index, TensorFacts& facts);
  bool (*describe)(int32_t torch_dtype, Tensor& tensor);
  // Whether tensors [begin, end) are stored where `layouts` says.
  bool (*in_place)(int64_t handle, int64_t begin, int64_t end, const ExpectedLayout* layouts);
  void (*release)(int64_t handle);

  bool (*has_autograd_symbols)();  // whether the functions below can be called
  // Reads the gradients of the first `count` tensors. False if a tensor is not in place, if a gradient is missing or is
  // not an ordinary strided tensor, or if `seen` returns false. `grads` receives their handles; it must hold those of
  // the last call, or null.
  bool (*read_grads)(int64_t handle, int64_t count, const ExpectedLayout* layouts, void** grads, SeenGrad* seen,
                     void* context);
  bool (*has_grads)(int64_t handle, int64_t begin);        // whether any from `begin` on has one
  void (*clear_grads)(void* const* grads, int64_t count);  // p.grad = None, for `grads` from read_grads
  // Slots keep gradients alive during a call: a list that is made once costs no allocation later. fill_slots takes as
  // many gradients as there are slots, none of them null.
  int64_t (*make_slots)(int64_t count);
  void (*fill_slots)(int64_t slots, void* const* grads);
  void (*empty_slots)(int64_t slots);
  void (*bump_versions)(int64_t handle, int64_t count);  // tells autograd that the first `count` change

  std::vector<const KernelTable*> (*runnable_kernels)();
  bool (*select_kernels)(const char* name);
  const KernelTable& (*kernels)();
  int64_t (*cache_bytes)();

  // Null where the extension was built without CUDA.
  const char* (*cuda_description)();
  bool (*has_stream_api)();  // whether torch can be asked for its current CUDA stream
  // Sends the launches of GPU ops on CPU tensors to `launch` (null: nowhere); see cuda_target.h.
  void (*simulate_gpu)(void (*launch)(const cuda::GpuKernel&, unsigned, const void*, const cuda::Launcher&),
                       bool scalars_on_device);
};

}  // namespace rst
