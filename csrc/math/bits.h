// Inlining, and the bits of a value, for host and device.
#pragma once

#include <cstring>

#define RST_INLINE inline __attribute__((always_inline))
#if defined(__CUDACC__)
#define RST_HD __host__ __device__ __forceinline__
#else
#define RST_HD RST_INLINE
#endif

namespace rst {

template <class To, class From>
RST_HD To reinterpret(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "reinterpret keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace rst
