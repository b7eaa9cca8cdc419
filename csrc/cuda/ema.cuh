// ema: average <- decay * average + (1 - decay) * w, 12 bytes per fp32 parameter.
#pragma once

#include "cuda/traverse.cuh"

namespace rst::cuda {

template <class T>
struct EmaEach {
  using A = Arithmetic<T>;
  void* average;
  const void* param;
  Ema<A> ema;
  template <int N>
  struct In {
    Pack<T, N> average, w;
  };
  template <int N>
  __device__ __forceinline__ In<N> load(int64_t i) const {
    return {cuda::load<N, T>(average, i), cuda::load<N, T>(param, i)};
  }
  template <int N>
  __device__ __forceinline__ void finish(int64_t i, const In<N>& in) const {
    Pack<T, N> out;
#pragma unroll
    for (int k = 0; k < N; ++k) out.at[k] = narrow<T>(ema(widen(in.average.at[k]), widen(in.w.at[k])));
    store(average, i, out);
  }
};

template <class T>
__device__ __forceinline__ void ema(const Args<kEmaStreams>& args) {
  using A = Arithmetic<T>;
  const Piece piece = piece_of(args);
  const double decay = number(args, piece.tensor, 0);
  EmaEach<T> op{static_cast<T*>(args.data[kEmaAverage][piece.tensor]) + piece.begin,
                static_cast<const T*>(args.data[kEmaParam][piece.tensor]) + piece.begin,
                {static_cast<A>(decay), static_cast<A>(1 - decay)}};
  each<T, 2, 1>(aligned(args, piece.tensor), piece.count, op);
}

}  // namespace rst::cuda
