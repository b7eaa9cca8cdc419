// The loop of all elementwise kernels: one block per chunk of a tensor, 16 bytes per access where addresses allow.
#pragma once

#include "cuda/args.h"
#include "cuda/weights.cuh"

namespace rst::cuda {

// The part of a tensor that this block works on.
struct Piece {
  int tensor;
  int64_t begin;  // in scalars
  int32_t count;
};

// `block` counts from 0 to the number of blocks in the launch.
template <class Args>
__device__ __forceinline__ Piece piece_of(const Args& args, unsigned block_index) {
  const int block = static_cast<int>(block_index);
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

template <class Args>
__device__ __forceinline__ bool aligned(const Args& args, int tensor) {
  uintptr_t all = 0;
#pragma unroll
  for (int s = 0; s < Args::kOperands; ++s) all |= reinterpret_cast<uintptr_t>(args.data[s][tensor]);
  return all % 16 == 0;
}

// One turn of a thread: `Packs` packs, a block of packs apart, `Batch` of them at a time. First op.load, which only
// reads, for all of a batch, so that several loads are in flight before the first result is needed; then op.finish,
// which computes and writes.
template <class T, Access access, int Packs, int Batch, class Op>
__device__ __forceinline__ void turn(int32_t i, Op& op) {
  constexpr int kPack = 16 / sizeof(T);
  static_assert(Packs % Batch == 0, "a turn is made of whole batches");
#pragma unroll
  for (int first = 0; first < Packs; first += Batch) {
    decltype(op.template load<kPack, access>(0)) in[Batch];
#pragma unroll
    for (int u = 0; u < Batch; ++u) in[u] = op.template load<kPack, access>((i + (first + u) * kThreads) * kPack);
#pragma unroll
    for (int u = 0; u < Batch; ++u) op.template finish<kPack, access>((i + (first + u) * kThreads) * kPack, in[u]);
  }
  op.end_turn();
}

template <class T, Access access, int Packs, int Batch, class Op>
__device__ __forceinline__ void whole_packs(int32_t packs, Op& op) {
  int32_t i = threadIdx.x;
  for (; i + (Packs - 1) * kThreads < packs; i += Packs * kThreads) turn<T, access, Packs, Batch>(i, op);
  if constexpr (Packs > 1) {
    for (; i < packs; i += kThreads) turn<T, access, 1, 1>(i, op);
  }
}

// Those after the last whole pack.
template <class T, int Least, class Op>
__device__ __forceinline__ void single_elements(int32_t packs, int32_t count, Op& op) {
  constexpr int kPack = 16 / sizeof(T);
  for (int32_t i = packs * kPack + static_cast<int32_t>(threadIdx.x) * Least; i < count; i += kThreads * Least) {
    op.template finish<Least, Access::kAligned>(i, op.template load<Least, Access::kAligned>(i));
    op.end_turn();
  }
}

// All elements of a chunk, in turns of `Packs` packs. T decides the size of a pack. Aligned: all operands are on 16
// bytes. Otherwise the one that is not is accessed by smaller words, and the packs of a turn follow one another, which
// needs fewer registers; turns are the same, so that what is added up in turns does not depend on addresses. `Least`
// elements are worked on where packs do not fit: 2 for complex numbers.
template <class T, int Packs, int Least, class Op>
__device__ __forceinline__ void for_each_pack(bool aligned, int32_t count, Op& op) {
  const int32_t packs = count / static_cast<int32_t>(16 / sizeof(T));
  if (aligned) {
    whole_packs<T, Access::kAligned, Packs, Packs>(packs, op);
  } else {
    whole_packs<T, Access::kAny, Packs, 1>(packs, op);
  }
  single_elements<T, Least>(packs, count, op);
}
// The same with the second loop alone, for what is rare.
template <class T, int Least, class Op>
__device__ __forceinline__ void for_each_pack_anywhere(int32_t count, Op& op) {
  const int32_t packs = count / static_cast<int32_t>(16 / sizeof(T));
  whole_packs<T, Access::kAny, 1, 1>(packs, op);
  single_elements<T, Least>(packs, count, op);
}

// One pack at a time, or where an operand is not on 16 bytes one element, for what needs many registers.
template <class T, int Least, class Op>
__device__ __forceinline__ void for_each_pack_or_element(bool aligned, int32_t count, Op& op) {
  const int32_t packs = aligned ? count / static_cast<int32_t>(16 / sizeof(T)) : 0;
  whole_packs<T, Access::kAligned, 1, 1>(packs, op);
  single_elements<T, Least>(packs, count, op);
}

// What most ops do at the end of a turn.
struct NothingAtEndOfTurn {
  __device__ __forceinline__ void end_turn() const {}
};

// rho or gamma of the block's tensor, from the arguments or from device memory, wherever the op was given it.
template <class Args>
__device__ __forceinline__ double hyperparam(const Args& args, int tensor) {
  const int row = args.row[tensor];
  const double* const on_device = args.params.on_device.hyperparams;
  return on_device == nullptr ? args.rows[row] : on_device[row];
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr bool kNeedsMoreRegisters = true;  // than the same code does for older GPUs
#else
constexpr bool kNeedsMoreRegisters = false;
#endif

}  // namespace rst::cuda

// How a kernel gets its name, and its entry in a table of cuda/kernels.h. `blocks` of it fit into one multiprocessor:
// without that bound, the compiler would give up loads in flight for more blocks.
#define RST_KERNEL(name, blocks, ...)                                       \
  extern "C" __global__ void __launch_bounds__(rst::cuda::kThreads, blocks) \
      name(const __grid_constant__ rst::cuda::__VA_ARGS__ args)
#define RST_ENTRY(name, ...) \
  {#name, reinterpret_cast<const void*>(&name), static_cast<int>(sizeof(rst::cuda::__VA_ARGS__))}

// X(name, T, adaptive, complex, master): the kernels of an op that has an ASAM form. Without ASAM complex numbers are
// pairs of scalars.
#define RST_ASAM_FORMS(X, name, T, special, complex, master) \
  X(name, T, false, false, None)                             \
  X(name##_adaptive, T, true, false, None)                   \
  X(name##_adaptive##special, T, true, complex, master)
#define RST_WITH_ASAM(X)                                      \
  RST_ASAM_FORMS(X, float32, float, _complex, true, None)     \
  RST_ASAM_FORMS(X, float64, double, _complex, true, None)    \
  RST_ASAM_FORMS(X, bfloat16, BFloat16, _master, false, Copy) \
  RST_ASAM_FORMS(X, float16, Half, _master, false, Copy)      \
  X(bfloat16_adaptive_remainder, BFloat16, true, false, Remainder)
