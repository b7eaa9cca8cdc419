#if defined(__x86_64__)
#include "cpu/standard_headers.h"

// prfchw needs no test: processors without prefetchw take it for nothing.

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,prfchw"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,prfchw")
#endif
#define RST_SIMD_LEVEL 1
#define CPU_CAPABILITY avx2
#include "cpu/instantiate.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
