// Every GPU kernel, as the launch code finds it.
#pragma once

#include "core/chunk_table.h"
#include "core/params.h"
#include "cuda/args.h"

namespace rst::cuda {

// By dtype, then by the flags and by the kind of master. A name of null: there is no such kernel. Only 16-bit dtypes
// have masters, and only others can be complex: for ASAM these have the place of master copies.
extern const GpuKernel grad_norm_kernels[kDTypes][2][kMasters];  // adaptive, master or complex
extern const GpuKernel finish_norm_kernel;
extern const GpuKernel perturb_kernels[kDTypes][2][kMasters];        // adaptive, master or complex
extern const GpuKernel perturb_shard_kernels[kDTypes][2][kMasters];  // of 16-bit dtypes alone: adaptive, master
extern const GpuKernel restore_kernels[kDTypes][2];                  // from a master copy
extern const GpuKernel mix_kernels[kDTypes];
extern const GpuKernel update_kernels[kRuleVariants][kDTypes][2][kMasters];  // mixing, master
// Those that round the first state: of float32, of bfloat16, and of 16-bit dtypes with masters.
extern const GpuKernel update_rounding_kernels[kRuleVariants][kDTypes][2][kMasters];

}  // namespace rst::cuda
