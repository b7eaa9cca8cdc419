// What the kernels use of the standard library. A level's .cpp includes it before it switches the compiler's target, so
// that none of its functions is made for a newer processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
