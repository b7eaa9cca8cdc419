// Elements that a thread loads and stores together: 16 bytes at a time where the address allows, else word by word.
#pragma once

#include <type_traits>

#include "core/dtypes.h"
#include "math/sam_math.h"

namespace rst::cuda {

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widen(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// To the nearest, ties to even, as the CPU kernels round; a NaN becomes the one of the hardware.
template <class T, class A>
__device__ __forceinline__ T narrow(A x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 narrow<BFloat16, float>(float x) {
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ Half narrow<Half, float>(float x) {
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
// Two at once, the first one in the lower half.
template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

template <class T, class A, int N>
__device__ __forceinline__ Pack<T, N> narrow_all(const A (&x)[N]) {
  Pack<T, N> pack;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    uint32_t pairs[N / 2];
#pragma unroll
    for (int k = 0; k < N / 2; ++k) pairs[k] = narrow_pair<T>(x[2 * k], x[2 * k + 1]);
    memcpy(&pack, pairs, sizeof(pack));
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) pack.at[k] = narrow<T>(x[k]);
  }
  return pack;
}

// Whether all operands of a tensor are on 16 bytes, so that nobody has to ask again.
enum class Access { kAligned, kAny };

template <class Word, class P>
__device__ __forceinline__ P load_words(const void* at) {
  Word words[sizeof(P) / sizeof(Word)];
#pragma unroll
  for (size_t k = 0; k < sizeof(P) / sizeof(Word); ++k) words[k] = static_cast<const Word*>(at)[k];
  return reinterpret<P>(words);
}
template <class Word, class P>
__device__ __forceinline__ void store_words(void* at, const P& pack) {
  Word words[sizeof(P) / sizeof(Word)];
  memcpy(words, &pack, sizeof(P));
#pragma unroll
  for (size_t k = 0; k < sizeof(P) / sizeof(Word); ++k) static_cast<Word*>(at)[k] = words[k];
}

__device__ __forceinline__ bool is_multiple(const void* address, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// The pack that begins at element i of `base`. Packs begin at multiples of their size from there.
template <int N, class T, Access access>
__device__ __forceinline__ Pack<T, N> load(const void* base, int64_t i) {
  using P = Pack<T, N>;
  const T* const at = static_cast<const T*>(base) + i;
  if constexpr (access == Access::kAny && sizeof(P) >= 8) {
    if (!is_multiple(base, alignof(P))) {
      if constexpr (sizeof(T) == 2) {
        if (!is_multiple(base, 4)) return load_words<uint16_t, P>(at);
        return load_words<uint32_t, P>(at);
      } else {
        return load_words<T, P>(at);
      }
    }
  }
  return *reinterpret_cast<const P*>(at);
}
template <Access access, class T, int N>
__device__ __forceinline__ void store(void* base, int64_t i, const Pack<T, N>& values) {
  using P = Pack<T, N>;
  T* const at = static_cast<T*>(base) + i;
  if constexpr (access == Access::kAny && sizeof(P) >= 8) {
    if (!is_multiple(base, alignof(P))) {
      if constexpr (sizeof(T) == 2) {
        if (!is_multiple(base, 4)) return store_words<uint16_t>(at, values);
        return store_words<uint32_t>(at, values);
      } else {
        return store_words<T>(at, values);
      }
    }
  }
  *reinterpret_cast<P*>(at) = values;
}

}  // namespace rst::cuda
