#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define RST_SIMD_LEVEL 1
#define RST_LEVEL avx2
#include "cpu/level.h"

namespace rst {

const KernelTable& avx2_kernels() {
  static const KernelTable table = avx2::make_table("avx2");
  return table;
}

}  // namespace rst

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
