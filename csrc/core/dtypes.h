// Element types of the kernels, and the scalar float16 conversions that the plain SIMD level needs.
#pragma once

#include <cstdint>

#include "math/bits.h"

namespace rst {

enum class DType : int { Float = 0, Double = 1, BFloat16 = 2, Half = 3 };
constexpr int kDTypes = 4;
inline int64_t size_of(DType t) { return t == DType::Float ? 4 : t == DType::Double ? 8 : 2; }

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

RST_INLINE float half_bits_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu, bits;
  if (exponent == 0) {  // zero or subnormal: the mantissa counts quanta of 2^-24
    bits = sign | reinterpret<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f);
  } else if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13) | (mantissa != 0 ? 0x400000u : 0u);
  } else {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  }
  return reinterpret<float>(bits);
}

RST_INLINE uint16_t float_to_half_bits(float value) {  // nearest even
  const uint32_t bits = reinterpret<uint32_t>(value);
  uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the count of 2^-24 quanta in the low bits
    const uint32_t quanta = reinterpret<uint32_t>(reinterpret<float>(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (quanta - 0x3f000000u));
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace rst
