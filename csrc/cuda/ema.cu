#include "cuda/ema.cuh"

#include "cuda/kernels.h"

namespace rst::cuda {

#define RST_EMA(name, T) \
  RST_KERNEL(rst_ema_##name, kEmaStreams, 2) { ema<T>(args); }

RST_EMA(float32, float)
RST_EMA(float64, double)
RST_EMA(bfloat16, BFloat16)
RST_EMA(float16, Half)

#define RST_OF(name) RST_ENTRY(rst_ema_##name, kEmaStreams)
const GpuKernel ema_kernels[kDTypes] = {RST_OF(float32), RST_OF(float64), RST_OF(bfloat16), RST_OF(float16)};

}  // namespace rst::cuda
