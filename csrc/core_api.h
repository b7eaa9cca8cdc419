// What _C (the kernels, behind torch's stable ABI) offers to _host (the Python face of the eager path): the ops of the
// core on torch's threads, and the addresses of tensors it holds. Passed as a capsule; both are built together.
#pragma once

#include "cpu/ops.h"

namespace rst {

constexpr const char* kCoreCapsule = "rst_fused._C.core";

struct CoreApi {
  void (*grad_norm)(const Table& table, const Call& call, double* stats);
  void (*perturb)(const Table& table, const Call& call, const double* stats, const double* rho, int rows);
  void (*restore)(const Table& table, const Call& call);
  void (*sgd_step)(const Table& table, const Call& call);
  void (*adam_step)(const Table& table, const Call& call);

  // Tensors held by the op rst_fused::_hold, which returns their handle as an integer.
  int64_t (*held_count)(int64_t handle);
  void* (*held_address)(int64_t handle, int64_t index);
  const int64_t* (*held_strides)(int64_t handle, int64_t index);
  void (*release)(int64_t handle);

  std::vector<const KernelTable*> (*runnable_kernels)();
  bool (*select_kernels)(const char* name);
  const KernelTable& (*kernels)();
};

}  // namespace rst
