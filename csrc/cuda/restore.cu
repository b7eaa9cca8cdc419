#include "cuda/restore.cuh"

#include "cuda/kernels.h"

namespace rst::cuda {

#define RST_RESTORE(name, T, master) \
  RST_KERNEL(rst_restore_##name, 2, RestoreArgs) { restore<T, master>(args); }
#define RST_MIX(name, T) \
  RST_KERNEL(rst_mix_##name, 2, MixArgs) { mix<T>(args); }

// Bits are copied, so formats of one size share a kernel.
RST_RESTORE(16_bits, uint16_t, false)
RST_RESTORE(32_bits, uint32_t, false)
RST_RESTORE(64_bits, uint64_t, false)
RST_RESTORE(bfloat16_master, BFloat16, true)
RST_RESTORE(float16_master, Half, true)
RST_MIX(float32, float)
RST_MIX(float64, double)
RST_MIX(bfloat16, BFloat16)
RST_MIX(float16, Half)

#define RST_OF(name) RST_ENTRY(rst_restore_##name, RestoreArgs)
const GpuKernel restore_kernels[kDTypes][2] = {{RST_OF(32_bits), {}},
                                               {RST_OF(64_bits), {}},
                                               {RST_OF(16_bits), RST_OF(bfloat16_master)},
                                               {RST_OF(16_bits), RST_OF(float16_master)}};
#undef RST_OF
#define RST_OF(name) RST_ENTRY(rst_mix_##name, MixArgs)
const GpuKernel mix_kernels[kDTypes] = {RST_OF(float32), RST_OF(float64), RST_OF(bfloat16), RST_OF(float16)};

}  // namespace rst::cuda
