// grad_norm: reads g (and w for ASAM), 4 bytes per fp32 parameter (8 for ASAM). The squares of a few packs are added in
// fp32, those sums in fp64, one per chunk; the last block to finish adds the chunks up in order, so that two runs agree
// bit for bit. A chunk whose squares leave the range of fp32 is added again in fp64.
#pragma once

#include "core/params.h"
#include "cuda/multi_tensor_apply.cuh"

namespace rst::cuda {

// V: in which the squares of one turn are added.
template <class T, class V, bool Adaptive, bool Complex, Master master>
struct GradNorm {
  const void *grad, *weight, *rest;
  AsamScale<V> scale;
  V of_turn{};
  double sum = 0;
  uint32_t seen = 0;  // the bits of all gradients, one over another

  template <int N>
  struct In {
    Pack<T, N> g;
    Weights<T, master, N> w;
  };
  template <int N, Access access>
  __device__ __forceinline__ In<N> load(int64_t i) const {
    In<N> in;
    in.g = cuda::load<N, T, access>(grad, i);
    if constexpr (Adaptive) in.w = load_weights<N, T, master, access>(weight, rest, i);
    return in;
  }
  template <int N, Access access>
  __device__ __forceinline__ void finish(int64_t, const In<N>& in) {
    V of_pack{};
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const V g = widen(in.g.at[k]);
      if constexpr (Adaptive) {
        of_pack = AsamSquaredNorm<V>{}(g, scale(magnitude<V, Complex>(in.w, k)), of_pack);
      } else {
        of_pack = SquaredNorm<V>{}(g, of_pack);
      }
    }
    of_turn += of_pack;
    see(in.g);
  }
  __device__ __forceinline__ void end_turn() {
    sum += of_turn;
    of_turn = 0;
  }

 private:
  template <int N>
  __device__ __forceinline__ void see(const Pack<T, N>& g) {
    if constexpr (sizeof(g) % 4 == 0) {
      uint32_t words[sizeof(g) / 4];
      memcpy(words, &g, sizeof(g));
#pragma unroll
      for (const uint32_t word : words) seen |= word;
    } else {
      static_assert(sizeof(g) == 2, "one 16-bit element");
      seen |= g.at[0].bits;
    }
  }
};

// All but the signs, of numbers of type T.
template <class T>
constexpr uint32_t kMagnitudeBits = sizeof(T) == 2 ? 0x7fff7fffu : 0x7fffffffu;

struct BlockSum {
  double sum;  // in thread 0; halves are added to halves
  bool any;    // whether `any` is true in some thread
};
__device__ __forceinline__ BlockSum block_sum(double x, bool any) {
  __shared__ double of_warp[kThreads / 32];
  for (int half = 16; half > 0; half /= 2) x += __shfl_down_sync(0xffffffffu, x, half);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  any = __syncthreads_or(any);
  if (threadIdx.x < 32) {
    x = threadIdx.x < kThreads / 32 ? of_warp[threadIdx.x] : 0;
    for (int half = kThreads / 64; half > 0; half /= 2) x += __shfl_down_sync(0xffffffffu, x, half);
  }
  return {x, any};
}

// Counts up to `last` and then starts again from 0, so that the next call needs no memset. Acquire and release: what
// other blocks wrote before they took their tickets is seen after this one, by the whole block from its next barrier
// on.
__device__ __forceinline__ unsigned take_ticket(double* ticket, unsigned last) {
  unsigned taken;
  asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;" : "=r"(taken) : "l"(ticket), "r"(last) : "memory");
  return taken;
}

// By one thread: the sum of its block, and whether it is the last one of the op.
__device__ __forceinline__ bool publish(const LaunchParams& c, double sum) {
  if (c.tensors > 0) c.partials[c.first_partial + blockIdx.x] = sum;
  return c.last && take_ticket(c.stats + kTicket, gridDim.x - 1) == gridDim.x - 1;
}

__device__ __forceinline__ void add_partials(const LaunchParams& c) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < c.all_partials; i += kThreads) sum += __ldcg(c.partials + i);
  sum = block_sum(sum, false).sum;
  if (threadIdx.x == 0) write_stats(sum, c.stats);
}

// The sum of this thread's part of the chunk, and whether a gradient was not 0.
template <class T, class V, int Packs, bool Adaptive, bool Complex, Master master>
__device__ __forceinline__ BlockSum sum_of(const NormArgs& args, const Piece& piece) {
  GradNorm<T, V, Adaptive, Complex, master> op{};
  op.grad = static_cast<const T*>(args.data[kNormGrad][piece.tensor]) + piece.begin;
  if constexpr (Adaptive) {
    op.weight = static_cast<const Stored<T, master>*>(args.data[kNormWeight][piece.tensor]) + piece.begin;
  }
  if constexpr (Adaptive && master == Master::Remainder) {
    op.rest = static_cast<const T*>(args.data[kNormRest][piece.tensor]) + piece.begin;
  }
  op.scale = {static_cast<V>(args.params.eta)};
  const bool packs = Adaptive ? aligned(args, piece.tensor) : is_multiple(args.data[kNormGrad][piece.tensor], 16);
  if constexpr (Packs == 0) {
    for_each_pack_anywhere<T, Complex ? 2 : 1>(piece.count, op);
  } else {
    for_each_pack<T, Packs, Complex ? 2 : 1>(packs, piece.count, op);
  }
  return {op.sum, (op.seen & kMagnitudeBits<T>) != 0};
}

template <class T, bool Adaptive, bool Complex, Master master>
__device__ __forceinline__ void grad_norm(const NormArgs& args) {
  using V = Arithmetic<T>;
  const LaunchParams& c = args.params;
  Piece piece{};
  BlockSum found{};
  if (c.tensors > 0) {
    piece = piece_of(args, blockIdx.x);
    found = sum_of<T, V, Adaptive ? 2 : 4, Adaptive, Complex, master>(args, piece);
  }
  found = block_sum(found.sum, found.any);
  __shared__ bool again, last;
  if (threadIdx.x == 0) {
    // Above 2^-60 what fp32 lost to squares below 2^-126 is less than its rounding.
    again = std::is_same_v<V, float> && found.any && !(found.sum >= 0x1p-60 && found.sum < INFINITY);
    if (!again) last = publish(c, found.sum);
  }
  __syncthreads();
  if constexpr (std::is_same_v<V, float>) {
    if (again) {
      found = sum_of<T, double, 0, Adaptive, Complex, master>(args, piece);
      found = block_sum(found.sum, false);
      if (threadIdx.x == 0) last = publish(c, found.sum);
      __syncthreads();
    }
  }
  if (last) add_partials(c);
}

}  // namespace rst::cuda
