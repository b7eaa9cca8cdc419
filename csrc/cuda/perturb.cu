#include "cuda/perturb.cuh"

#include "cuda/kernels.h"

namespace rst::cuda {

#define RST_PERTURB(name, T, adaptive, complex, master) \
  RST_KERNEL(rst_perturb_##name, kPerturbOperands, 2) { perturb<T, adaptive, complex, master>(args); }
#define RST_WIDE(name, T)                             \
  RST_PERTURB(name, T, false, false, false)           \
  RST_PERTURB(name##_adaptive, T, true, false, false) \
  RST_PERTURB(name##_adaptive_complex, T, true, true, false)
#define RST_HALF(name, T)                             \
  RST_PERTURB(name, T, false, false, false)           \
  RST_PERTURB(name##_master, T, false, false, true)   \
  RST_PERTURB(name##_adaptive, T, true, false, false) \
  RST_PERTURB(name##_adaptive_master, T, true, false, true)

RST_WIDE(float32, float)
RST_WIDE(float64, double)
RST_HALF(bfloat16, BFloat16)
RST_HALF(float16, Half)

#define RST_OF(name) RST_ENTRY(rst_perturb_##name, kPerturbOperands)
// Without ASAM complex numbers are pairs of scalars.
// clang-format off
#define RST_WIDE_ROW(name) {{RST_OF(name), {}}, {RST_OF(name##_adaptive), RST_OF(name##_adaptive_complex)}}
#define RST_HALF_ROW(name) \
  {{RST_OF(name), RST_OF(name##_master)}, {RST_OF(name##_adaptive), RST_OF(name##_adaptive_master)}}
// clang-format on

const GpuKernel perturb_kernels[kDTypes][2][2] = {RST_WIDE_ROW(float32), RST_WIDE_ROW(float64), RST_HALF_ROW(bfloat16),
                                                  RST_HALF_ROW(float16)};

}  // namespace rst::cuda
