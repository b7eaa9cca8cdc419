// What a CPU kernel is: a function over a chunk, or over several of one tensor that follow one another, in one variant
// per dtype and flag, in one table per SIMD level.
#pragma once

#include "core/chunk_table.h"
#include "core/params.h"

namespace rst {

constexpr int kNormLanes = 16;  // partial sums per chunk, the same at every SIMD level

// One chunk as its kernel sees it. data[operand] points at the chunk's first scalar, source at the w that an update
// reads, but for its remainder.
struct ChunkArgs {
  const OpParams* params;
  const Tensor* tensor;
  void* data[kOperands];
  const void* source;
  int64_t begin, count;
  bool streaming;   // the data is larger than what caches keep: write-only outputs bypass them
  bool prefetches;  // what is read, see multi_tensor_apply.h
  uint32_t key;     // RandomBits::key_of_step of this call
  double* sum;      // grad_norm: where the sum of the chunk goes: of this piece and of those before it
  double* lanes;    // grad_norm: kNormLanes running sums of a chunk that comes in pieces; else null
};

using Kernel = void (*)(const ChunkArgs&);

// All kernels of one SIMD level; null where a dtype has no such master.
struct KernelTable {
  const char* name;
  Kernel grad_norm[kDTypes][2][kMasters];  // [adaptive][master]
  Kernel perturb[kDTypes][2][kMasters];    // [adaptive][master]
  Kernel backup[kDTypes];
  Kernel restore[kDTypes][2];  // [from a master copy]
  Kernel mix[kDTypes];
  Kernel update[kRuleVariants][kDTypes][2][kMasters];  // [mix][master]
  // Those that round the first state: of float32, of bfloat16, and of 16-bit parameters with masters; else null.
  Kernel update_rounding[kRuleVariants][kDTypes][2][kMasters];
};

namespace plain {
const KernelTable& kernel_table();
}
namespace avx2 {  // only where the compiler targets x86-64
const KernelTable& kernel_table();
}
namespace avx512 {  // likewise
const KernelTable& kernel_table();
}

// The level in use: the best one that this processor has until select_kernels chooses one.
const KernelTable& kernels();
// The level for fp32 and fp64 data that is larger than all caches. The same, but on Zen 4, which executes 512-bit
// vectors in halves, that of 256 bits unless a level was chosen: its loads and stores then keep memory busier. 16-bit
// dtypes, and data in the caches, are slower with 256 bits there.
const KernelTable& kernels_from_memory();
// The levels that this processor can run, best last.
std::vector<const KernelTable*> runnable_kernels();
// Whether kernels have to prefetch what they read: the processor's own prefetchers fall behind.
bool needs_prefetching();
// Chooses a level by name for this process, "auto" by the processor; false if it is unknown or cannot run here.
bool select_kernels(const char* name);

}  // namespace rst
