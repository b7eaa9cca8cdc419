#include "cpu/standard_headers.h"

#define RST_SIMD_LEVEL 0
#define CPU_CAPABILITY plain
#include "cpu/instantiate.h"
