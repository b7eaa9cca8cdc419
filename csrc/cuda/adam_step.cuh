// restore + mix + Adam(W): reads the backup (or master, or w), g, both moments and with mixing g1; writes w and both
// moments: 28 bytes per fp32 parameter, 32 with mixing.
#pragma once

#include "cuda/restore.cuh"

namespace rst::cuda {

template <class T, bool Mixing, bool Master>
struct AdamEach {
  using A = Arithmetic<T>;
  using S = State<T, Master>;
  void *param, *source, *buffer, *buffer2;  // the source is written where it is a master
  const void *grad, *first;
  Adam<A> adam;
  Mix<A> mix;

  template <int N>
  struct In {
    Pack<S, N> w, m, v;
    Pack<T, N> g, g1;
  };
  template <int N>
  __device__ __forceinline__ In<N> load(int64_t i) const {
    In<N> in;
    in.w = cuda::load<N, S>(source, i);
    in.g = cuda::load<N, T>(grad, i);
    if constexpr (Mixing) in.g1 = cuda::load<N, T>(first, i);
    in.m = cuda::load<N, S>(buffer, i);
    in.v = cuda::load<N, S>(buffer2, i);
    return in;
  }
  template <int N>
  __device__ __forceinline__ void finish(int64_t i, const In<N>& in) const {
    Pack<T, N> out;
    Pack<S, N> master, moment, moment2;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      A w = widen(in.w.at[k]);
      A g = widen(in.g.at[k]);
      if constexpr (Mixing) g = mix(widen(in.g1.at[k]), g);
      g = adam.decayed(w, g);
      w = adam.shrunk(w);
      const A m = adam.exp_avg(widen(in.m.at[k]), g);
      const A v = adam.exp_avg_sq(widen(in.v.at[k]), g);
      moment.at[k] = narrow<S>(m);
      moment2.at[k] = narrow<S>(v);
      const A updated = adam.update(w, m, v);
      if constexpr (Master) master.at[k] = updated;
      out.at[k] = narrow<T>(updated);
    }
    store(buffer, i, moment);
    store(buffer2, i, moment2);
    if constexpr (Master) store(source, i, master);
    store(param, i, out);
  }
};

template <class T, bool Mixing, bool Master>
__device__ __forceinline__ void adam_step(const Args<kAdamOperands>& args) {
  using A = Arithmetic<T>;
  using S = State<T, Master>;
  const LaunchParams& c = args.params;
  const Piece piece = piece_of(args);
  const int t = piece.tensor;
  // One thread computes the powers, and first of all: a call spills the values that are alive around it.
  __shared__ AdamNumbers numbers;
  if (threadIdx.x == 0) {
    const int64_t row = args.row[t];
    const double step = c.device_steps == nullptr ? c.hyperparams[row][6] : c.device_steps[row];
    numbers = AdamNumbers::of(hyperparam(args, t, 0), hyperparam(args, t, 1), hyperparam(args, t, 2),
                              hyperparam(args, t, 3), hyperparam(args, t, 4), step, c.decoupled);
  }
  __syncthreads();
  T* const param = static_cast<T*>(args.data[kAdamParam][t]) + piece.begin;
  S* const source = static_cast<S*>(args.data[kAdamSource][t]) + piece.begin;
  const bool packs = aligned(args, t);
  if (overflowed(c)) {
    RestoreEach<T, Master> undo{param, source};
    for_each_pack<T, 1, 1>(packs, piece.count, undo);
    return;
  }
  AdamEach<T, Mixing, Master> op;
  op.param = param;
  op.source = source;
  op.grad = static_cast<const T*>(args.data[kAdamGrad][t]) + piece.begin;
  if constexpr (Mixing) op.first = static_cast<const T*>(args.data[kAdamFirst][t]) + piece.begin;
  op.buffer = static_cast<S*>(args.data[kAdamState0][t]) + piece.begin;
  op.buffer2 = static_cast<S*>(args.data[kAdamState1][t]) + piece.begin;
  const AdamNumbers& n = numbers;
  op.adam = {static_cast<A>(n.minus_step_size), static_cast<A>(n.one_minus_beta1), static_cast<A>(n.beta2),
             static_cast<A>(n.one_minus_beta2), static_cast<A>(n.bias2_sqrt),      static_cast<A>(n.eps),
             static_cast<A>(n.weight_decay),    static_cast<A>(n.decay),           static_cast<A>(grad_multiplier(c))};
  const double gamma = hyperparam(args, t, 5);
  op.mix = {static_cast<A>(gamma), static_cast<A>(1 - gamma)};
  // More loads in flight would spill registers.
  for_each_pack<T, Mixing || Master || sizeof(T) == 2 ? 1 : 2, 1>(packs, piece.count, op);
}

}  // namespace rst::cuda
