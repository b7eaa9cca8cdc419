// restore: param <- backup, bit for bit, or the rounded master: 8 bytes per fp32 parameter.
// mix: g <- (1 - gamma) g1 + gamma g, 12 bytes per fp32 parameter.
#pragma once

#include "cuda/multi_tensor_apply.cuh"

namespace rst::cuda {

template <class T, bool FromMaster>
struct RestoreEach : NothingAtEndOfTurn {
  using W = std::conditional_t<FromMaster, float, T>;
  void* param;
  const void* source;

  __device__ __forceinline__ RestoreEach(void* param, const void* source) : param(param), source(source) {}
  template <int N, Access access>
  __device__ __forceinline__ Pack<W, N> load(int64_t i) const {
    return cuda::load<N, W, access>(source, i);
  }
  template <int N, Access access>
  __device__ __forceinline__ void finish(int64_t i, const Pack<W, N>& in) const {
    if constexpr (FromMaster) {
      store<access>(param, i, narrow_all<T>(in.at));
    } else {
      store<access>(param, i, in);
    }
  }
};

template <class T, bool FromMaster>
__device__ __forceinline__ void restore(const RestoreArgs& args) {
  const Piece piece = piece_of(args, blockIdx.x);
  using Op = RestoreEach<T, FromMaster>;
  Op op(static_cast<T*>(args.data[kRestoreParam][piece.tensor]) + piece.begin,
        static_cast<const typename Op::W*>(args.data[kRestoreSource][piece.tensor]) + piece.begin);
  for_each_pack<T, 4, 1>(aligned(args, piece.tensor), piece.count, op);
}

template <class T>
struct MixEach : NothingAtEndOfTurn {
  using A = Arithmetic<T>;
  void* grad;
  const void* first;
  Mix<A> mix;

  template <int N>
  struct In {
    Pack<T, N> g, g1;
  };
  template <int N, Access access>
  __device__ __forceinline__ In<N> load(int64_t i) const {
    return {cuda::load<N, T, access>(grad, i), cuda::load<N, T, access>(first, i)};
  }
  template <int N, Access access>
  __device__ __forceinline__ void finish(int64_t i, const In<N>& in) const {
    A mixed[N];
#pragma unroll
    for (int k = 0; k < N; ++k) mixed[k] = mix(widen(in.g1.at[k]), widen(in.g.at[k]));
    store<access>(grad, i, narrow_all<T>(mixed));
  }
};

template <class T>
__device__ __forceinline__ void mix(const MixArgs& args) {
  const Piece piece = piece_of(args, blockIdx.x);
  MixEach<T> op;
  op.grad = static_cast<T*>(args.data[kMixGrad][piece.tensor]) + piece.begin;
  op.first = static_cast<const T*>(args.data[kMixFirst][piece.tensor]) + piece.begin;
  op.mix = Mix<Arithmetic<T>>::of(hyperparam(args, piece.tensor));
  for_each_pack<T, 2, 1>(aligned(args, piece.tensor), piece.count, op);
}

}  // namespace rst::cuda
