#if defined(__x86_64__)
#include "cpu/standard_headers.h"

// prfchw needs no test: processors without prefetchw take it for nothing.

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw")
#endif
#define RST_SIMD_LEVEL 2
#define CPU_CAPABILITY avx512
#include "cpu/instantiate.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
