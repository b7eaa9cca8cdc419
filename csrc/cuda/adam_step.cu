#include "cuda/adam_step.cuh"

#include "cuda/kernels.h"

namespace rst::cuda {

#define RST_ADAM(name, T, mixing, master) \
  RST_KERNEL(rst_adam_step_##name, kAdamOperands, 1) { adam_step<T, mixing, master>(args); }
#define RST_ALL(name, T, master)   \
  RST_ADAM(name, T, false, master) \
  RST_ADAM(name##_mixing, T, true, master)

RST_ALL(float32, float, false)
RST_ALL(float64, double, false)
RST_ALL(bfloat16, BFloat16, false)
RST_ALL(float16, Half, false)
RST_ALL(bfloat16_master, BFloat16, true)
RST_ALL(float16_master, Half, true)

#define RST_OF(name) RST_ENTRY(rst_adam_step_##name, kAdamOperands)
#define RST_WIDE_ROW(name)      \
  {                             \
    {RST_OF(name), {}}, {       \
      RST_OF(name##_mixing), {} \
    }                           \
  }
#define RST_HALF_ROW(name)                                                                         \
  {                                                                                                \
    {RST_OF(name), RST_OF(name##_master)}, { RST_OF(name##_mixing), RST_OF(name##_master_mixing) } \
  }

const GpuKernel adam_step_kernels[kDTypes][2][2] = {RST_WIDE_ROW(float32), RST_WIDE_ROW(float64),
                                                    RST_HALF_ROW(bfloat16), RST_HALF_ROW(float16)};

}  // namespace rst::cuda
