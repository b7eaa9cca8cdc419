// restore + mix + SGD: reads the backup (or master, or w), g, and with them the momentum and g1; writes w and the
// momentum: 20 bytes per fp32 parameter with momentum, 24 with mixing.
#pragma once

#include "cuda/restore.cuh"

namespace rst::cuda {

template <class T, bool Momentum, bool Mixing, bool Master>
struct SgdEach {
  using A = Arithmetic<T>;
  using S = State<T, Master>;
  void *param, *source, *buffer;  // the source is written where it is a master
  const void *grad, *first;
  Sgd<A> sgd;
  Mix<A> mix;
  bool nesterov;

  template <int N>
  struct In {
    Pack<S, N> w, buffer;
    Pack<T, N> g, g1;
  };
  template <int N>
  __device__ __forceinline__ In<N> load(int64_t i) const {
    In<N> in;
    in.w = cuda::load<N, S>(source, i);
    in.g = cuda::load<N, T>(grad, i);
    if constexpr (Mixing) in.g1 = cuda::load<N, T>(first, i);
    if constexpr (Momentum) in.buffer = cuda::load<N, S>(buffer, i);
    return in;
  }
  template <int N>
  __device__ __forceinline__ void finish(int64_t i, const In<N>& in) const {
    Pack<T, N> out;
    Pack<S, N> kept, master;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A w = widen(in.w.at[k]);
      A g = widen(in.g.at[k]);
      if constexpr (Mixing) g = mix(widen(in.g1.at[k]), g);
      A d = sgd.decayed(w, g);
      if constexpr (Momentum) {
        const A buf = sgd.buffer(widen(in.buffer.at[k]), d);
        kept.at[k] = narrow<S>(buf);
        d = nesterov ? sgd.nesterov(buf, d) : buf;
      }
      const A updated = sgd.update(w, d);
      if constexpr (Master) master.at[k] = updated;
      out.at[k] = narrow<T>(updated);
    }
    if constexpr (Momentum) store(buffer, i, kept);
    if constexpr (Master) store(source, i, master);
    store(param, i, out);
  }
};

template <class T, bool Momentum, bool Mixing, bool Master>
__device__ __forceinline__ void sgd_step(const Args<kSgdOperands>& args) {
  using A = Arithmetic<T>;
  using S = State<T, Master>;
  const LaunchParams& c = args.params;
  const Piece piece = piece_of(args);
  const int t = piece.tensor;
  T* const param = static_cast<T*>(args.data[kSgdParam][t]) + piece.begin;
  S* const source = static_cast<S*>(args.data[kSgdSource][t]) + piece.begin;
  const bool packs = aligned(args, t);
  if (overflowed(c)) {
    RestoreEach<T, Master> undo{param, source};
    for_each_pack<T, 1, 1>(packs, piece.count, undo);
    return;
  }
  SgdEach<T, Momentum, Mixing, Master> op;
  op.param = param;
  op.source = source;
  op.grad = static_cast<const T*>(args.data[kSgdGrad][t]) + piece.begin;
  if constexpr (Mixing) op.first = static_cast<const T*>(args.data[kSgdFirst][t]) + piece.begin;
  if constexpr (Momentum) op.buffer = static_cast<S*>(args.data[kSgdState0][t]) + piece.begin;
  const double lr = hyperparam(args, t, 0), momentum = hyperparam(args, t, 1), dampening = hyperparam(args, t, 2);
  const double weight_decay = hyperparam(args, t, 3), gamma = hyperparam(args, t, 4);
  op.sgd = {static_cast<A>(-lr), static_cast<A>(momentum), static_cast<A>(1 - dampening), static_cast<A>(weight_decay),
            static_cast<A>(grad_multiplier(c))};
  op.mix = {static_cast<A>(gamma), static_cast<A>(1 - gamma)};
  op.nesterov = c.nesterov;
  for_each_pack<T, Master ? 1 : 2, 1>(packs, piece.count, op);
}

}  // namespace rst::cuda
