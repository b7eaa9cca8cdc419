#if defined(__x86_64__)
#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define RST_SIMD_LEVEL 1
#define CPU_CAPABILITY avx2
#include "cpu/instantiate.h"

namespace rst {

const KernelTable& avx2_kernels() {
  static const KernelTable table = avx2::build_kernel_table("avx2");
  return table;
}

}  // namespace rst

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
