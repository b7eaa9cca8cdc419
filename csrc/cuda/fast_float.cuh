// A float whose division and square root take no branch: an approximation of the hardware, at most one unit in the last
// place off, and a correction. Results are those of IEEE 754, or in rare cases the number next to them: about one
// square root in a million, and quotients that lie nearly halfway between two numbers.
//
// Not served, and up to the caller: divisors below 2^-126 or above 2^126 but for inf; dividends below 2^-100, whose
// last digit may be off; roots of -0, and of less than 2^-126, which come out as 2^-63.
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
  // Where a or b is infinite the correction is NaN, and the first quotient right. That of 0 has lost its sign.
  return better == better ? copysign(better, quotient) : quotient;
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
