// Where the weights of a parameter are read and written: in its own dtype, in an fp32 master copy, or in bfloat16 and a
// remainder.
#pragma once

#include "core/chunk_table.h"
#include "cuda/pack.cuh"

namespace rst::cuda {

// The format of a parameter's state: its own, or fp32 beside a master.
template <class T, Master master>
using State = std::conditional_t<master == Master::None, T, float>;
// That of the weights where they are read, without remainders.
template <class T, Master master>
using Stored = std::conditional_t<master == Master::Copy, float, T>;

template <class T, Master master, int N>
struct Weights {
  Pack<Stored<T, master>, N> stored;

  __device__ __forceinline__ auto operator[](int k) const { return widen(stored.at[k]); }
};
template <int N>
struct Weights<BFloat16, Master::Remainder, N> {
  Pack<BFloat16, N> stored, rest;

  __device__ __forceinline__ float operator[](int k) const {
    const uint32_t upper = static_cast<uint32_t>(stored.at[k].bits) << 16;
    return Remainder<float, uint32_t>::join(upper, rest.at[k].bits);
  }
};

// `source`: of the weights; `rest`: their remainders, if there are any.
template <int N, class T, Master master, Access access>
__device__ __forceinline__ Weights<T, master, N> load_weights(const void* source, const void* rest, int64_t i) {
  if constexpr (master == Master::Remainder) {
    return {load<N, T, access>(source, i), load<N, T, access>(rest, i)};
  } else {
    return {load<N, Stored<T, master>, access>(source, i)};
  }
}

// The lower halves of two words, or their upper ones, the first one below.
__device__ __forceinline__ uint32_t lower_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x5410);
}
__device__ __forceinline__ uint32_t upper_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}

// fp32 weights as bfloat16 and remainders.
template <Access access, int N>
__device__ __forceinline__ void store_split(void* param, void* rest, int64_t i, const float (&w)[N]) {
  using Each = Remainder<float, uint32_t>;
  Pack<BFloat16, N> upper, lower;
  if constexpr (N % 2 == 0) {
    uint32_t upper_pairs[N / 2], lower_pairs[N / 2];
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
      const Each even = Each::split(w[2 * k]), odd = Each::split(w[2 * k + 1]);
      upper_pairs[k] = upper_halves(even.upper, odd.upper);
      lower_pairs[k] = lower_halves(even.lower, odd.lower);
    }
    memcpy(&upper, upper_pairs, sizeof(upper));
    memcpy(&lower, lower_pairs, sizeof(lower));
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Each each = Each::split(w[k]);
      upper.at[k].bits = static_cast<uint16_t>(each.upper >> 16);
      lower.at[k].bits = static_cast<uint16_t>(each.lower);
    }
  }
  store<access>(rest, i, lower);
  store<access>(param, i, upper);
}

// |w| of element k; for complex w, |w| of the pair that it belongs to.
template <class A, bool Complex, class W>
__device__ __forceinline__ A magnitude(const W& weights, int k) {
  const A w = weights[k];
  if constexpr (Complex) {
    const A other = weights[k ^ 1];
    return rst::sqrt(w * w + other * other);
  } else {
    return rst::abs(w);
  }
}

}  // namespace rst::cuda
