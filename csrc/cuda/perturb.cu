#include "cuda/perturb.cuh"

#include "cuda/kernels.h"

namespace rst::cuda {

#define RST_PERTURB(name, T, adaptive, complex, master)                                       \
  RST_KERNEL(rst_perturb_##name, (perturb_blocks<adaptive, Master::master>()), PerturbArgs) { \
    perturb<T, adaptive, complex, Master::master>(args);                                      \
  }

RST_WITH_ASAM(RST_PERTURB)
RST_PERTURB(bfloat16_master, BFloat16, false, false, Copy)
RST_PERTURB(float16_master, Half, false, false, Copy)
RST_PERTURB(bfloat16_remainder, BFloat16, false, false, Remainder)

#define RST_PERTURB_SHARD(name, T, adaptive, master)                                                             \
  RST_KERNEL(rst_perturb_##name##_shard, (perturb_blocks<adaptive, Master::master, true>()), PerturbShardArgs) { \
    perturb<T, adaptive, false, Master::master>(args);                                                           \
  }
#define RST_PERTURB_SHARDS(name, T)                 \
  RST_PERTURB_SHARD(name, T, false, None)           \
  RST_PERTURB_SHARD(name##_master, T, false, Copy)  \
  RST_PERTURB_SHARD(name##_adaptive, T, true, None) \
  RST_PERTURB_SHARD(name##_adaptive_master, T, true, Copy)

RST_PERTURB_SHARDS(bfloat16, BFloat16)
RST_PERTURB_SHARDS(float16, Half)
RST_PERTURB_SHARD(bfloat16_remainder, BFloat16, false, Remainder)
RST_PERTURB_SHARD(bfloat16_adaptive_remainder, BFloat16, true, Remainder)

#define RST_OF(name) RST_ENTRY(rst_perturb_##name, PerturbArgs)
// clang-format off
#define RST_WIDE_ROW(name) {{RST_OF(name), {}, {}}, {RST_OF(name##_adaptive), RST_OF(name##_adaptive_complex), {}}}
#define RST_BFLOAT16_ROW(name) \
  {{RST_OF(name), RST_OF(name##_master), RST_OF(name##_remainder)}, \
   {RST_OF(name##_adaptive), RST_OF(name##_adaptive_master), RST_OF(name##_adaptive_remainder)}}
#define RST_HALF_ROW(name) \
  {{RST_OF(name), RST_OF(name##_master), {}}, {RST_OF(name##_adaptive), RST_OF(name##_adaptive_master), {}}}
// clang-format on

const GpuKernel perturb_kernels[kDTypes][2][kMasters] = {RST_WIDE_ROW(float32), RST_WIDE_ROW(float64),
                                                         RST_BFLOAT16_ROW(bfloat16), RST_HALF_ROW(float16)};

#undef RST_OF
#define RST_OF(name) RST_ENTRY(rst_perturb_##name##_shard, PerturbShardArgs)
const GpuKernel perturb_shard_kernels[kDTypes][2][kMasters] = {
    {}, {}, RST_BFLOAT16_ROW(bfloat16), RST_HALF_ROW(float16)};

}  // namespace rst::cuda
