#if defined(__x86_64__)
#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define RST_SIMD_LEVEL 2
#define CPU_CAPABILITY avx512
#include "cpu/instantiate.h"

namespace rst {

const KernelTable& avx512_kernels() {
  static const KernelTable table = avx512::build_kernel_table("avx512");
  return table;
}

}  // namespace rst

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
