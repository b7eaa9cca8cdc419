#include "cuda/sgd_step.cuh"

#include "cuda/kernels.h"

namespace rst::cuda {

#define RST_SGD(name, T, momentum, mixing, master) \
  RST_KERNEL(rst_sgd_step_##name, kSgdOperands, sizeof(T) == 8 ? 1 : 2) { sgd_step<T, momentum, mixing, master>(args); }
#define RST_ALL(name, T, master)                   \
  RST_SGD(name, T, false, false, master)           \
  RST_SGD(name##_mixing, T, false, true, master)   \
  RST_SGD(name##_momentum, T, true, false, master) \
  RST_SGD(name##_momentum_mixing, T, true, true, master)

RST_ALL(float32, float, false)
RST_ALL(float64, double, false)
RST_ALL(bfloat16, BFloat16, false)
RST_ALL(float16, Half, false)
RST_ALL(bfloat16_master, BFloat16, true)
RST_ALL(float16_master, Half, true)

#define RST_OF(name) RST_ENTRY(rst_sgd_step_##name, kSgdOperands)
#define RST_WIDE_ROW(name)                               \
  {                                                      \
    {{RST_OF(name), {}}, {RST_OF(name##_mixing), {}}}, { \
      {RST_OF(name##_momentum), {}}, {                   \
        RST_OF(name##_momentum_mixing), {}               \
      }                                                  \
    }                                                    \
  }
#define RST_HALF_ROW(name)                                                                            \
  {                                                                                                   \
    {{RST_OF(name), RST_OF(name##_master)}, {RST_OF(name##_mixing), RST_OF(name##_master_mixing)}}, { \
      {RST_OF(name##_momentum), RST_OF(name##_master_momentum)}, {                                    \
        RST_OF(name##_momentum_mixing), RST_OF(name##_master_momentum_mixing)                         \
      }                                                                                               \
    }                                                                                                 \
  }

const GpuKernel sgd_step_kernels[kDTypes][2][2][2] = {RST_WIDE_ROW(float32), RST_WIDE_ROW(float64),
                                                      RST_HALF_ROW(bfloat16), RST_HALF_ROW(float16)};

}  // namespace rst::cuda
