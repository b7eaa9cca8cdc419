// A float whose division and square root take no branch: an approximation of the hardware and two corrections. They
// round to the nearest as IEEE 754 asks, but for about one square root in a million, which is next to it.
//
// Not served, and up to the caller: divisors below 2^-126 or above 2^126 other than 0, inf and NaN, and square roots of
// less than 2^-126, which come out as 2^-63.
#pragma once

#include "math/sam_math.h"

namespace rst::cuda {

struct FastFloat {
  float x;
  FastFloat() = default;
  RST_HD FastFloat(float x) : x(x) {}
};

RST_HD FastFloat operator+(FastFloat a, FastFloat b) { return a.x + b.x; }
RST_HD FastFloat operator-(FastFloat a, FastFloat b) { return a.x - b.x; }
RST_HD FastFloat operator*(FastFloat a, FastFloat b) { return a.x * b.x; }
RST_HD bool operator>(FastFloat a, FastFloat b) { return a.x > b.x; }
RST_HD bool operator!=(FastFloat a, FastFloat b) { return a.x != b.x; }
RST_HD FastFloat fma(FastFloat a, FastFloat b, FastFloat c) { return ::fmaf(a.x, b.x, c.x); }
RST_HD void assign(FastFloat& to, double x) { to.x = static_cast<float>(x); }

// a / b, from an approximation of 1 / b.
RST_HD float corrected_quotient(float a, float b, float inverse) {
  const float quotient = a * inverse;
  const float better = ::fmaf(::fmaf(-b, quotient, a), inverse, quotient);
  return better == better ? better : quotient;  // where 0, inf or NaN went in, the first quotient is exact
}
// sqrt(x), from an approximation of 1 / sqrt(x); of a normal number.
RST_HD float corrected_root(float x, float inverse) {
  const float root = x * inverse;
  return ::fmaf(::fmaf(-root, root, x), 0.5f * inverse, root);
}

#if defined(__CUDACC__)
__device__ __forceinline__ FastFloat operator/(FastFloat a, FastFloat b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b.x));
  return corrected_quotient(a.x, b.x, inverse);
}
__device__ __forceinline__ FastFloat sqrt(FastFloat a) {
  // By their bits: negative numbers and NaN are larger than any other, and stay.
  const float normal = from_bits(::max(to_bits(a.x), 0x00800000u));
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(normal));
  return a.x == INFINITY ? a.x : corrected_root(normal, inverse);
}
#endif

}  // namespace rst::cuda
