#include "cuda/grad_norm.cuh"

#include "cuda/kernels.h"

namespace rst::cuda {

// Without ASAM there are registers for a third block, which reads while others add up.
#ifndef RST_CUDA_NORM_BLOCKS
#define RST_CUDA_NORM_BLOCKS 3
#endif
#define RST_GRAD_NORM(name, T, adaptive, complex, master)                             \
  RST_KERNEL(rst_grad_norm_##name, (adaptive ? 2 : RST_CUDA_NORM_BLOCKS), NormArgs) { \
    grad_norm<T, adaptive, complex, Master::master>(args);                            \
  }

RST_WITH_ASAM(RST_GRAD_NORM)

RST_KERNEL(rst_finish_norm_float64, 1, FinishArgs) {
  if (threadIdx.x == 0) rst::finish_norm(args.squares, args.count, args.stats);
}

#define RST_OF(name) RST_ENTRY(rst_grad_norm_##name, NormArgs)
// Without ASAM masters are not read.
// clang-format off
#define RST_ROW(name, special, ...) \
  {{RST_OF(name), {}, {}}, {RST_OF(name##_adaptive), RST_OF(name##_adaptive##special), __VA_ARGS__}}
// clang-format on

const GpuKernel finish_norm_kernel = RST_ENTRY(rst_finish_norm_float64, FinishArgs);
const GpuKernel grad_norm_kernels[kDTypes][2][kMasters] = {
    RST_ROW(float32, _complex, {}), RST_ROW(float64, _complex, {}),
    RST_ROW(bfloat16, _master, RST_OF(bfloat16_adaptive_remainder)), RST_ROW(float16, _master, {})};

}  // namespace rst::cuda
