// What a CPU kernel is: a function over one chunk, in one variant per dtype and flag, in one table per SIMD level.
#pragma once

#include "cpu/table.h"

namespace rst {

constexpr int kNormLanes = 16;  // partial sums per chunk, the same at every SIMD level

struct SgdRow {
  double lr, momentum, dampening, weight_decay, gamma;
};
struct AdamRow {
  double lr, beta1, beta2, eps, weight_decay, gamma, step;
};

// The numbers of one call that are the same for all its tensors.
struct Call {
  bool adaptive = false, stochastic = false, nesterov = false, decoupled = false;
  bool restoring = true;  // updates read w from the backup, where there is one
  double eta = 0;
  double direction = 1;             // -1 to maximize; divided by the gradient scale of AMP
  const double* scales = nullptr;   // perturb: per row, rho / (norm + eps)
  const double* gammas = nullptr;   // restore with mixing: per row
  const SgdRow* sgd = nullptr;
  const AdamRow* adam = nullptr;
  uint64_t seed = 0, step = 0;
};

// One chunk as its kernel sees it. data[s] points at the chunk's first scalar; source is where the update reads w.
struct ChunkCall {
  const Call* call;
  const Tensor* tensor;
  void* data[kStreams];
  const void* source;
  int64_t begin, count;
  bool streaming;  // write-only outputs bypass the cache
  double* sum;     // grad_norm: where the sum of the chunk goes, of this piece and those before
  double* lanes;   // grad_norm: kNormLanes running sums of a chunk that comes in pieces; else null
};

using Kernel = void (*)(const ChunkCall&);

// [dtype] first; Master: an fp32 master copy beside 16-bit parameters (null for 32- and 64-bit dtypes).
struct KernelTable {
  const char* name;
  Kernel grad_norm[kDTypes][2][2];      // [adaptive][master]
  Kernel perturb[kDTypes][2][2];        // [adaptive][master]
  Kernel backup[kDTypes];
  Kernel restore[kDTypes][2];           // [master]
  Kernel mix[kDTypes];
  Kernel sgd_step[kDTypes][2][2][2];    // [momentum][mix][master]
  Kernel adam_step[kDTypes][2][2];      // [mix][master]
};

const KernelTable& plain_kernels();
const KernelTable& avx2_kernels();    // only where the compiler targets x86-64
const KernelTable& avx512_kernels();  // likewise

// The level in use: the best one that this processor has until select_kernels chooses another.
const KernelTable& kernels();
// The levels that this processor can run, best last.
std::vector<const KernelTable*> runnable_kernels();
// Chooses a level by name for this process; false if it is unknown or cannot run here.
bool select_kernels(const char* name);

}  // namespace rst
