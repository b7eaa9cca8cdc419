// restore: param <- backup, bit for bit, or the rounded master: 8 bytes per fp32 parameter.
// mix: g <- (1 - gamma) g1 + gamma g, 12 bytes per fp32 parameter.
#pragma once

#include "cuda/multi_tensor_apply.cuh"

namespace rst::cuda {

template <class T, bool Master>
struct RestoreEach {
  using W = State<T, Master>;
  void* param;
  const void* source;
  template <int N>
  __device__ __forceinline__ Pack<W, N> load(int64_t i) const {
    return cuda::load<N, W>(source, i);
  }
  template <int N>
  __device__ __forceinline__ void finish(int64_t i, const Pack<W, N>& in) const {
    if constexpr (Master) {
      Pack<T, N> out;
#pragma unroll
      for (int k = 0; k < N; ++k) out.at[k] = narrow<T>(widen(in.at[k]));
      store(param, i, out);
    } else {
      store(param, i, in);
    }
  }
};

template <class T, bool Master>
__device__ __forceinline__ void restore(const Args<kRestoreOperands>& args) {
  const Piece piece = piece_of(args);
  RestoreEach<T, Master> op{
      static_cast<T*>(args.data[kRestoreParam][piece.tensor]) + piece.begin,
      static_cast<const State<T, Master>*>(args.data[kRestoreSource][piece.tensor]) + piece.begin};
  for_each_pack<T, 4, 1>(aligned(args, piece.tensor), piece.count, op);
}

template <class T>
struct MixEach {
  using A = Arithmetic<T>;
  void* grad;
  const void* first;
  Mix<A> mix;
  template <int N>
  struct In {
    Pack<T, N> g, g1;
  };
  template <int N>
  __device__ __forceinline__ In<N> load(int64_t i) const {
    return {cuda::load<N, T>(grad, i), cuda::load<N, T>(first, i)};
  }
  template <int N>
  __device__ __forceinline__ void finish(int64_t i, const In<N>& in) const {
    Pack<T, N> out;
#pragma unroll
    for (int k = 0; k < N; ++k) out.at[k] = narrow<T>(mix(widen(in.g1.at[k]), widen(in.g.at[k])));
    store(grad, i, out);
  }
};

template <class T>
__device__ __forceinline__ void mix(const Args<kMixOperands>& args) {
  const Piece piece = piece_of(args);
  MixEach<T> op{static_cast<T*>(args.data[kMixGrad][piece.tensor]) + piece.begin,
                static_cast<const T*>(args.data[kMixFirst][piece.tensor]) + piece.begin,
                Mix<Arithmetic<T>>::of(hyperparam<1>(args, piece.tensor, 0))};
  for_each_pack<T, 2, 1>(aligned(args, piece.tensor), piece.count, op);
}

}  // namespace rst::cuda
