// restore + mix + one step of any base optimizer: reads the backup (or master, or w), g, all state and with mixing g1;
// writes w and the state. Per fp32 parameter that is 12 bytes, 8 for each state tensor and 4 with mixing.
#pragma once

#include "core/params.h"
#include "cuda/restore.cuh"

namespace rst::cuda {

template <class Rule, int N, class T, bool Mixing, bool Master>
struct UpdateEach {
  using A = Arithmetic<T>;
  using S = State<T, Master>;
  static constexpr int kArrays = N > 0 ? N : 1;
  void *param, *source, *state[kArrays];  // the source is written where it is a master
  const void *grad, *first;
  typename Rule::template Step<A> step;
  Mix<A> mix;

  template <int Count>
  struct In {
    Pack<S, Count> w, state[kArrays];
    Pack<T, Count> g, g1;
  };
  template <int Count>
  __device__ __forceinline__ In<Count> load(int64_t i) const {
    In<Count> in;
    in.w = cuda::load<Count, S>(source, i);
    in.g = cuda::load<Count, T>(grad, i);
    if constexpr (Mixing) in.g1 = cuda::load<Count, T>(first, i);
#pragma unroll
    for (int s = 0; s < N; ++s) in.state[s] = cuda::load<Count, S>(state[s], i);
    return in;
  }
  template <int Count>
  __device__ __forceinline__ void finish(int64_t i, const In<Count>& in) const {
    Pack<T, Count> out;
    Pack<S, Count> kept[kArrays], master;
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      A g = widen(in.g.at[k]);
      if constexpr (Mixing) g = mix(widen(in.g1.at[k]), g);
      States<A, N> states;
#pragma unroll
      for (int s = 0; s < N; ++s) states[s] = widen(in.state[s].at[k]);
      const A updated = step(widen(in.w.at[k]), g, states);
#pragma unroll
      for (int s = 0; s < N; ++s) kept[s].at[k] = narrow<S>(states[s]);
      if constexpr (Master) master.at[k] = updated;
      out.at[k] = narrow<T>(updated);
    }
#pragma unroll
    for (int s = 0; s < N; ++s) store(state[s], i, kept[s]);
    if constexpr (Master) store(source, i, master);
    store(param, i, out);
  }
};

// What the rule makes of the hyperparameters of tensor t.
template <class Rule, class Step, int Operands>
__device__ __forceinline__ Step prepared(const Args<Operands>& args, int t) {
  const LaunchParams& c = args.params;
  const auto row = [&](int column) {
    if (column < Rule::kColumns) return hyperparam<Rule::kColumns>(args, t, column);
    const int64_t row = args.row[t];
    return c.on_device.steps == nullptr ? c.steps[row] : c.on_device.steps[row];
  };
  return Step::prepare(row, grad_multiplier(c), c.flag);
}

// Blocks per multiprocessor, and packs in flight in every thread: with more, registers would spill. Only SGD has
// registers left for two packs of 16-bit elements.
template <int N, class T>
constexpr int kUpdateBlocks = N > 1 || sizeof(T) == 8 ? 1 : 2;
template <class Rule, int N, class T, bool Mixing, bool Master>
constexpr int kUpdateUnroll = Master || (sizeof(T) == 2 && !std::is_same_v<Rule, Sgd>) || (N > 1 && Mixing) ? 1 : 2;

template <class Rule>
constexpr int kUpdateOperands = kUpdateState0 + Rule::kMostStates;

template <class Rule, int N, class T, bool Mixing, bool Master>
__device__ __forceinline__ void update(const Args<kUpdateOperands<Rule>>& args) {
  using A = Arithmetic<T>;
  using S = State<T, Master>;
  using Step = typename Rule::template Step<A>;
  const LaunchParams& c = args.params;
  const Piece piece = piece_of(args);
  const int t = piece.tensor;
  // Where preparing takes a call, for powers, one thread does it, before all else: a call spills the live values.
  __shared__ Step shared;
  if constexpr (Rule::kCountsSteps) {
    if (threadIdx.x == 0) shared = prepared<Rule, Step>(args, t);
    __syncthreads();
  }
  T* const param = static_cast<T*>(args.data[kUpdateParam][t]) + piece.begin;
  S* const source = static_cast<S*>(args.data[kUpdateSource][t]) + piece.begin;
  const bool packs = aligned(args, t);
  if (overflowed(c)) {
    RestoreEach<T, Master> undo{param, source};
    for_each_pack<T, 1, 1>(packs, piece.count, undo);
    return;
  }
  UpdateEach<Rule, N, T, Mixing, Master> op{
      param,
      source,
      {},
      static_cast<const T*>(args.data[kUpdateGrad][t]) + piece.begin,
      Mixing ? static_cast<const T*>(args.data[kUpdateFirst][t]) + piece.begin : nullptr,
      Rule::kCountsSteps ? shared : prepared<Rule, Step>(args, t),
      Mix<A>::of(hyperparam<Rule::kColumns>(args, t, Rule::kGamma))};
#pragma unroll
  for (int s = 0; s < N; ++s) op.state[s] = static_cast<S*>(args.data[kUpdateState0 + s][t]) + piece.begin;
  for_each_pack<T, kUpdateUnroll<Rule, N, T, Mixing, Master>, 1>(packs, piece.count, op);
}

}  // namespace rst::cuda
