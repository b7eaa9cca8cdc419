// The loop of all elementwise kernels: one block per chunk of a tensor, 16 bytes per access where addresses allow.
#pragma once

#include <type_traits>

#include "core/dtypes.h"
#include "cuda/args.h"
#include "math/sam_math.h"

namespace rst::cuda {

// N elements that are loaded and stored together, 16 bytes at a time where there are so many.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;
// A parameter's state has its format, or is fp32 beside a master copy.
template <class T, bool Master>
using State = std::conditional_t<Master, float, T>;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widen(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T, class A>
__device__ __forceinline__ T narrow(A x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 narrow<BFloat16, float>(float x) {  // nearest even, as the CPU kernels
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : 0x7fc00000u;
  return {static_cast<uint16_t>(rounded >> 16)};
}
template <>
__device__ __forceinline__ Half narrow<Half, float>(float x) {
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const void* base, int64_t i) {
  return *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(base) + i);
}
template <class T, int N>
__device__ __forceinline__ void store(void* base, int64_t i, const Pack<T, N>& values) {
  *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(base) + i) = values;
}

// |w| of element k; for complex w, |w| of the pair that it belongs to.
template <class A, bool Complex, class T, int N>
__device__ __forceinline__ A magnitude(const Pack<T, N>& pack, int k) {
  const A w = widen(pack.at[k]);
  if constexpr (Complex) {
    const A other = widen(pack.at[k ^ 1]);
    return rst::sqrt(w * w + other * other);
  } else {
    return rst::abs(w);
  }
}

// The part of a tensor that this block works on.
struct Piece {
  int tensor;
  int64_t begin;  // in scalars
  int32_t count;
};

template <int Operands>
__device__ __forceinline__ Piece piece_of(const Args<Operands>& args) {
  const int block = static_cast<int>(blockIdx.x);
  int low = 0, high = args.params.tensors;  // the tensor is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (args.first_chunk[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t begin = static_cast<int64_t>(block - args.first_chunk[low]) * args.params.chunk;
  const int64_t left = args.numel[low] - begin;
  return {low, begin, static_cast<int32_t>(left < args.params.chunk ? left : args.params.chunk)};
}

template <int Operands>
__device__ __forceinline__ bool aligned(const Args<Operands>& args, int tensor) {
  uintptr_t all = 0;
#pragma unroll
  for (int s = 0; s < Operands; ++s) all |= reinterpret_cast<uintptr_t>(args.data[s][tensor]);
  return all % 16 == 0;
}

// For each pack of elements first op.load, which only reads, then op.finish, which computes and writes. Several loads
// are in flight in every thread before the first result is needed. `Least` elements are worked on where packs do not
// fit: 2 for complex numbers. T decides the size of a pack.
template <class T, int Unroll, int Least, class Op>
__device__ __forceinline__ void for_each_pack(bool packs, int32_t count, Op& op) {
  constexpr int kPack = 16 / sizeof(T);
  int32_t done = 0;
  if (packs) {
    const int32_t whole = count / kPack;
    int32_t i = threadIdx.x;
    for (; i + (Unroll - 1) * kThreads < whole; i += Unroll * kThreads) {
      decltype(op.template load<kPack>(0)) in[Unroll];
#pragma unroll
      for (int u = 0; u < Unroll; ++u) in[u] = op.template load<kPack>((i + u * kThreads) * kPack);
#pragma unroll
      for (int u = 0; u < Unroll; ++u) op.template finish<kPack>((i + u * kThreads) * kPack, in[u]);
    }
    for (; i < whole; i += kThreads) op.template finish<kPack>(i * kPack, op.template load<kPack>(i * kPack));
    done = whole * kPack;
  }
  for (int32_t i = done + static_cast<int32_t>(threadIdx.x) * Least; i < count; i += kThreads * Least) {
    op.template finish<Least>(i, op.template load<Least>(i));
  }
}

// A hyperparameter of the block's tensor, from the arguments or from device memory, wherever the op was given it.
template <int Columns, int Operands>
__device__ __forceinline__ double hyperparam(const Args<Operands>& args, int tensor, int column) {
  const LaunchParams& c = args.params;
  const int row = args.row[tensor];
  const double* const on_device = c.on_device.hyperparams;
  return on_device == nullptr ? c.hyperparams[row][column] : on_device[static_cast<int64_t>(row) * Columns + column];
}

// True where AMP found an overflow: the step is not taken, but the weights are restored.
__device__ __forceinline__ bool overflowed(const LaunchParams& c) {
  return c.on_device.found_inf != nullptr && *c.on_device.found_inf != 0;
}
__device__ __forceinline__ double grad_multiplier(const LaunchParams& c) {
  const float* const scale = c.on_device.grad_scale;
  return scale == nullptr ? c.grad_multiplier : c.grad_multiplier / static_cast<double>(*scale);
}

}  // namespace rst::cuda

// How a kernel gets its name, and its entry in a table of cuda/kernels.h. `blocks` of it fit into one multiprocessor:
// without that bound, the compiler would give up loads in flight for more blocks.
#define RST_KERNEL(name, operands, blocks)                                  \
  extern "C" __global__ void __launch_bounds__(rst::cuda::kThreads, blocks) \
      name(const __grid_constant__ rst::cuda::Args<rst::cuda::operands> args)
#define RST_ENTRY(name, operands) \
  {#name, reinterpret_cast<const void*>(&name), static_cast<int>(sizeof(rst::cuda::Args<rst::cuda::operands>))}

// X(name, T, adaptive, complex, master): the kernels of an op that has an ASAM form. Without ASAM complex numbers are
// pairs of scalars.
#define RST_ASAM_FORMS(X, name, T, special, complex, master) \
  X(name, T, false, false, false)                            \
  X(name##_adaptive, T, true, false, false)                  \
  X(name##_adaptive##special, T, true, complex, master)
#define RST_WITH_ASAM(X)                                      \
  RST_ASAM_FORMS(X, float32, float, _complex, true, false)    \
  RST_ASAM_FORMS(X, float64, double, _complex, true, false)   \
  RST_ASAM_FORMS(X, bfloat16, BFloat16, _master, false, true) \
  RST_ASAM_FORMS(X, float16, Half, _master, false, true)
