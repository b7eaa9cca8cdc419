// What _C (the kernels, behind torch's stable ABI) offers to _host (the Python face of the eager path): the ops of the
// core on torch's threads, and tensors it holds, with their gradients. Passed as a capsule; both are built together.
#pragma once

#include "cpu/ops.h"
#include "cuda/ops.h"

namespace rst {

constexpr const char* kCoreCapsule = "rst_fused._C.core";

constexpr int32_t kOnCpu = -1;

struct TensorFacts {
  void* data;
  int32_t device;  // the index of a GPU, or kOnCpu
  int32_t dtype;  // torch's number for it
  int ndim;
  const int64_t* sizes;  // belong to the tensor
  const int64_t* strides;
};

// Where a held tensor is expected to lie. Strides are compared for the first ndim dimensions; 0: not at all.
struct Place {
  void* address;
  int ndim;
  const int64_t* strides;
};

// What to make of the gradient of the parameter at `index`, while it is in the cache; if false, it is not called again.
using SeenGrad = bool(void* context, int64_t index, const TensorFacts& grad);

// For a handful of dimensions faster than memcmp.
inline bool equal(const int64_t* a, const int64_t* b, int ndim) {
  for (int d = 0; d < ndim; ++d) {
    if (a[d] != b[d]) return false;
  }
  return true;
}

// The ops of the core, on torch's threads or on the current stream of a GPU.
struct CoreOps {
  void (*grad_norm)(const Table& table, const Call& call, double* stats, int32_t device);
  void (*perturb)(const Table& table, const Call& call, double* stats, const double* rho, int rows, int32_t device);
  void (*restore)(const Table& table, const Call& call, int32_t device);
  // `there`: the numbers of AMP, where they lie on the GPU.
  void (*sgd_step)(const Table& table, const Call& call, const cuda::DeviceNumbers& there, int32_t device);
  void (*adam_step)(const Table& table, const Call& call, const cuda::DeviceNumbers& there, int32_t device);
};

struct CoreApi {
  CoreOps cpu;
  const CoreOps* gpu;  // null where the extension was built without CUDA

  // Lists of tensors held by the op rst_fused::_hold, which returns their handle as an integer.
  bool (*held_facts)(int64_t handle, int64_t index, TensorFacts& facts);
  bool (*describe)(int32_t torch_dtype, Tensor& tensor);
  bool (*in_place)(int64_t handle, int64_t begin, int64_t end, const Place* places);  // whether these lie where expected
  void (*release)(int64_t handle);

  bool (*knows_autograd)();  // whether those below can be called
  // The gradients of the first `count`, which must be in place; false if not, if a gradient is missing or not an ordinary
  // strided tensor, or if `seen` is false of one. `grads`: their handles; before, those of the last call, or null.
  bool (*read_grads)(int64_t handle, int64_t count, const Place* places, void** grads, SeenGrad* seen, void* context);
  bool (*has_grads)(int64_t handle, int64_t begin);      // whether any from `begin` on has one
  void (*clear_grads)(void* const* grads, int64_t count);  // p.grad = None, for `grads` from read_grads
  // Room to keep gradients alive for the time of a call: a list made once costs no allocation then. fill_slots takes as
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
  bool (*knows_streams)();  // whether torch can be asked for its current CUDA stream
  // Sends the launches of ops on CPU tensors to `launch` (null: nowhere); see gpu_target.h.
  void (*simulate_gpu)(void (*launch)(const cuda::GpuKernel&, unsigned, const void*, const cuda::Launcher&),
                       bool device_numbers);
};

}  // namespace rst
