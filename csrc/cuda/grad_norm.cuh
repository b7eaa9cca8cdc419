// grad_norm: reads g (and w for ASAM), 4 bytes per fp32 parameter (8 for ASAM). One sum in fp64 per chunk; the last
// block to finish adds them up in order, so that two runs agree bit for bit.
#pragma once

#include "core/params.h"
#include "cuda/multi_tensor_apply.cuh"

namespace rst::cuda {

template <class T, bool Adaptive, bool Complex, bool Master>
struct GradNorm {
  const void *grad, *weight;
  AsamScale<double> scale;
  double sum = 0;

  template <int N>
  struct In {
    Pack<T, N> g;
    Pack<State<T, Master>, N> w;
  };
  template <int N>
  __device__ __forceinline__ In<N> load(int64_t i) const {
    In<N> in;
    in.g = cuda::load<N, T>(grad, i);
    if constexpr (Adaptive) in.w = cuda::load<N, State<T, Master>>(weight, i);
    return in;
  }
  template <int N>
  __device__ __forceinline__ void finish(int64_t, const In<N>& in) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const double g = widen(in.g.at[k]);
      if constexpr (Adaptive) {
        sum = AsamSquaredNorm<double>{}(g, scale(magnitude<double, Complex>(in.w, k)), sum);
      } else {
        sum = SquaredNorm<double>{}(g, sum);
      }
    }
  }
};

// The sum over a block, in thread 0; halves are added to halves.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double of_warp[kThreads / 32];
  for (int half = 16; half > 0; half /= 2) x += __shfl_down_sync(0xffffffffu, x, half);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x < 32) {
    x = threadIdx.x < kThreads / 32 ? of_warp[threadIdx.x] : 0;
    for (int half = kThreads / 64; half > 0; half /= 2) x += __shfl_down_sync(0xffffffffu, x, half);
  }
  return x;
}

__device__ __forceinline__ void finish_norm(const LaunchParams& c) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < c.all_partials; i += kThreads) sum += __ldcg(c.partials + i);
  sum = block_sum(sum);
  if (threadIdx.x == 0) write_stats(sum, c.stats);
}

template <class T, bool Adaptive, bool Complex, bool Master>
__device__ __forceinline__ void grad_norm(const Args<kNormOperands>& args) {
  const LaunchParams& c = args.params;
  GradNorm<T, Adaptive, Complex, Master> op{};
  if (c.tensors > 0) {
    const Piece piece = piece_of(args);
    op.grad = static_cast<const T*>(args.data[kNormGrad][piece.tensor]) + piece.begin;
    if constexpr (Adaptive) {
      op.weight = static_cast<const State<T, Master>*>(args.data[kNormWeight][piece.tensor]) + piece.begin;
    }
    op.scale = {c.eta};
    for_each_pack<T, Adaptive ? 2 : 4, Complex ? 2 : 1>(aligned(args, piece.tensor), piece.count, op);
  }
  const double sum = block_sum(op.sum);
  __shared__ bool last;
  if (threadIdx.x == 0) {
    if (c.tensors > 0) c.partials[c.first_partial + blockIdx.x] = sum;
    __threadfence();  // the sum must be seen before the ticket is
    // Counts up to the number of blocks and starts again from 0: the next call needs no memset.
    unsigned* ticket = reinterpret_cast<unsigned*>(c.stats + kTicket);
    last = c.last && atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last) finish_norm(c);
}

}  // namespace rst::cuda
