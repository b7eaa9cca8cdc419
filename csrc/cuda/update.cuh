// restore + mix + one step of any base optimizer: reads the backup (or master, or w), g, all state and with mixing g1;
// writes w and the state. Per fp32 parameter that is 12 bytes, 8 for each state tensor and 4 with mixing. A remainder
// is read beside the backup or w, and written beside w.
#pragma once

#include "core/params.h"
#include "cuda/fast_float.cuh"
#include "cuda/random.cuh"
#include "cuda/restore.cuh"

namespace rst::cuda {

struct NoBits {};  // nothing is rounded stochastically
template <int Count>
struct RoundedState {
  Pack<BFloat16, Count> rounded;  // the first state
};

// V: what it computes in. Bits: those by which the first state is rounded, which is bfloat16 then.
template <class Rule, int N, class T, class V, bool Mixing, Master master, class Bits>
struct UpdateEach : NothingAtEndOfTurn {
  static constexpr bool kRounds = !std::is_same_v<Bits, NoBits>;
  using A = Arithmetic<T>;
  using S = State<T, master>;
  static constexpr int kArrays = N > 0 ? N : 1;
  void *param, *source, *rest, *state[kArrays];  // the source is written where it is a master copy
  const void *grad, *first;
  PreparedRow<Rule, V> row;
  Bits random_bits;

  __device__ __forceinline__ explicit UpdateEach(const Bits& bits) : random_bits(bits) {}

  template <int Count>
  struct In : std::conditional_t<kRounds, RoundedState<Count>, NoBits> {
    Weights<T, master, Count> w;
    Pack<S, Count> state[kArrays];
    Pack<T, Count> g, g1;
  };
  template <int Count, Access access>
  __device__ __forceinline__ In<Count> load(int64_t i) const {
    In<Count> in;
    in.w = load_weights<Count, T, master, access>(source, rest, i);
    in.g = cuda::load<Count, T, access>(grad, i);
    if constexpr (Mixing) in.g1 = cuda::load<Count, T, access>(first, i);
#pragma unroll
    for (int s = kRounds; s < N; ++s) in.state[s] = cuda::load<Count, S, access>(state[s], i);
    if constexpr (kRounds) in.rounded = cuda::load<Count, BFloat16, access>(state[0], i);
    return in;
  }
  template <int Count, Access access>
  __device__ __forceinline__ void finish(int64_t i, const In<Count>& in) const {
    A updated[Count], kept[kArrays][Count];
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      V g = widen(in.g.at[k]);
      if constexpr (Mixing) g = row.mix(V(widen(in.g1.at[k])), g);
      States<V, N> states;
#pragma unroll
      for (int s = kRounds; s < N; ++s) states[s] = widen(in.state[s].at[k]);
      if constexpr (kRounds) states[0] = widen(in.rounded.at[k]);
      updated[k] = scalar(row.step(V(in.w[k]), g, states));
#pragma unroll
      for (int s = 0; s < N; ++s) kept[s][k] = scalar(states[s]);
    }
#pragma unroll
    for (int s = kRounds; s < N; ++s) store<access>(state[s], i, narrow_all<S>(kept[s]));
    if constexpr (kRounds) {
      auto bits = random_bits.template of_pack<Count>(i);
      Pack<BFloat16, Count> rounded;
#pragma unroll
      for (int k = 0; k < Count; ++k) rounded.at[k] = stochastic_round<BFloat16>(kept[0][k], bits.next(k) & 0xffffu);
      store<access>(state[0], i, rounded);
    }
    if constexpr (master == Master::Remainder) {
      store_split<access>(param, rest, i, updated);
    } else {
      if constexpr (master == Master::Copy) store<access>(source, i, narrow_all<S>(updated));
      store<access>(param, i, narrow_all<T>(updated));
    }
  }

 private:
  static __device__ __forceinline__ float scalar(FastFloat x) { return x.x; }
  static __device__ __forceinline__ A scalar(A x) { return x; }
};

// True where AMP found an overflow: the step is not taken, but the weights are restored.
__device__ __forceinline__ bool overflowed(const LaunchParams& c) {
  return c.on_device.found_inf != nullptr && *c.on_device.found_inf != 0;
}

// The row of tensor t, all of which is in the arguments.
template <class A, class Args>
__device__ __forceinline__ const auto& row_in_arguments(const Args& args, int t) {
  if constexpr (std::is_same_v<A, double>) {
    return args.rows[args.row[t]].of_double;
  } else {
    return args.rows[args.row[t]].of_float;
  }
}

// The same, where hyperparameters or step counts are in device memory. Powers take long: one thread prepares it.
template <class Rule, class A, class Args>
__device__ __forceinline__ PreparedRow<Rule, A> row_on_device(const Args& args, int t) {
  const DeviceScalars& on_device = args.params.on_device;
  const int64_t row = args.row[t];
  __shared__ PreparedRow<Rule, A> prepared;
  if (threadIdx.x == 0) {
    const double* const given = args.rows[row].given;
    const double* const hyperparams =
        on_device.hyperparams == nullptr ? given : on_device.hyperparams + row * Rule::kColumns;
    const auto number = [&](int column) {
      if (column < Rule::kColumns) return hyperparams[column];
      return on_device.steps == nullptr ? given[Rule::kColumns] : on_device.steps[row];
    };
    prepared = PreparedRow<Rule, A>::of(number, args.params.grad_multiplier, args.params.flag);
  }
  __syncthreads();
  return prepared;
}

// Blocks per multiprocessor, so many that no register spills.
#ifndef RST_CUDA_ADAM_BLOCKS
#define RST_CUDA_ADAM_BLOCKS 2
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kNeedsMoreToRound = true;  // than older GPUs, for stochastic rounding
#else
constexpr bool kNeedsMoreToRound = false;
#endif
template <Master master>
constexpr bool kHasMaster = master != Master::None;
template <int N, class T, bool Mixing, Master master>
RST_HD constexpr int update_blocks() {
  constexpr bool kSixteenBit = sizeof(T) == 2;
  if (sizeof(T) == 8 || N > 2) return 1;
  if (N == 2 && Mixing && kSixteenBit && (kHasMaster<master> || kNeedsMoreRegisters)) return 1;
  if (N == 2 && master == Master::Remainder && kNeedsMoreRegisters) return 1;
  return N == 2 ? RST_CUDA_ADAM_BLOCKS : 2;
}
// Packs in flight in every thread. Only SGD has registers left for two packs of 16-bit elements.
template <class Rule, int N, class T, bool Mixing, Master master>
RST_HD constexpr int update_packs() {
  constexpr bool kSgd = std::is_same_v<Rule, Sgd>;
  if (kHasMaster<master> || (sizeof(T) == 2 && !kSgd) || (N > 1 && Mixing)) return 1;
  return kNeedsMoreRegisters && N == 1 && !kSgd ? 1 : 2;
}

// The same where the first state is rounded stochastically, which takes a few registers more.
template <int N, class T, bool Mixing, Master master>
RST_HD constexpr int rounding_blocks() {
  if (kHasMaster<master> || kNeedsMoreRegisters) return 1;
  if (N == 2 && (kNeedsMoreToRound || (Mixing && sizeof(T) == 2))) return 1;
  return update_blocks<N, T, Mixing, master>();
}
template <class Rule, int N, class T, bool Mixing, Master master>
RST_HD constexpr int rounding_packs() {
  const bool two_blocks = rounding_blocks<N, T, Mixing, master>() > 1;
  return kNeedsMoreToRound && two_blocks ? 1 : update_packs<Rule, N, T, Mixing, master>();
}

template <class Rule, int N, class T, class V, int Packs, bool Mixing, Master master, class Args, class Row,
          class Bits = NoBits>
__device__ __forceinline__ void update_with(const Args& args, const Piece& piece, const Row& row,
                                            const Bits& bits = {}) {
  using S = State<T, master>;
  const int t = piece.tensor;
  UpdateEach<Rule, N, T, V, Mixing, master, Bits> op(bits);
  op.param = static_cast<T*>(args.data[kUpdateParam][t]) + piece.begin;
  op.source = static_cast<Stored<T, master>*>(args.data[kUpdateSource][t]) + piece.begin;
  op.rest = nullptr;
  if constexpr (Args::kRemainders) op.rest = static_cast<T*>(args.data[kUpdateState0 + N][t]) + piece.begin;
  op.grad = static_cast<const T*>(args.data[kUpdateGrad][t]) + piece.begin;
  op.first = Mixing ? static_cast<const T*>(args.data[kUpdateFirst][t]) + piece.begin : nullptr;
  constexpr int kFirst = decltype(op)::kRounds;
#pragma unroll
  for (int s = kFirst; s < N; ++s) op.state[s] = static_cast<S*>(args.data[kUpdateState0 + s][t]) + piece.begin;
  if constexpr (kFirst == 1) op.state[0] = static_cast<BFloat16*>(args.data[kUpdateState0][t]) + piece.begin;
  op.row = reinterpret<PreparedRow<Rule, V>>(row);
  if constexpr (std::is_same_v<Bits, BitsOfShard>) {
    for_each_pack_or_element<T, 1>(aligned(args, t), piece.count, op);
  } else if constexpr (Packs == 0) {
    for_each_pack_anywhere<T, 1>(piece.count, op);
  } else {
    for_each_pack<T, Packs, 1>(aligned(args, t), piece.count, op);
  }
}

// The random bits of a piece whose elements follow one another in the whole tensor, from an even position on.
struct RunOfPiece {
  bool found;
  BitsOfRun bits;
};
template <class Args>
__device__ __forceinline__ uint32_t state_key(const Args& args, const Piece& piece) {
  return random_key(args.params, RandomBits::kState + static_cast<uint64_t>(args.index[piece.tensor]));
}
template <class Args>
__device__ __forceinline__ RunOfPiece run_of(const Args& args, const Piece& piece) {
  const Shard& shard = args.shard[piece.tensor];
  const uint64_t first = shard.position(piece.begin);
  const bool found = first % 2 == 0 && shard.together(piece.begin) >= piece.count;
  return {found, {RandomBits::of(state_key(args, piece), first >> 32), static_cast<uint32_t>(first)}};
}

// Rounds the first state stochastically. Elements that do not follow one another, and exact roots, are rare: they share
// a loop.
template <class Rule, int N, class T, bool Mixing, Master master, class Args, class Row>
__device__ __forceinline__ void update_rounding(const Args& args, const Piece& piece, const RunOfPiece& run,
                                                const Row& row) {
  using V = std::conditional_t<Rule::kDivides, FastFloat, float>;
  constexpr int kPacks = rounding_packs<Rule, N, T, Mixing, master>();
  bool exact = false;
  if constexpr (Rule::kDivides) exact = !row.step.ignores_small_roots();
  if (run.found && !exact) {
    update_with<Rule, N, T, V, kPacks, Mixing, master>(args, piece, row, run.bits);
    return;
  }
  const BitsOfShard bits{state_key(args, piece), args.shard[piece.tensor], piece.begin};
  if constexpr (Rule::kDivides) {
    if (exact) {
      update_with<Rule, N, T, float, 0, Mixing, master>(args, piece, row, bits);
      return;
    }
  }
  update_with<Rule, N, T, V, 0, Mixing, master>(args, piece, row, bits);
}

template <class Rule, int N, class T, bool Mixing, Master master, class Args>
__device__ __forceinline__ void update(const Args& args) {
  using A = Arithmetic<T>;
  const LaunchParams& c = args.params;
  const Piece piece = piece_of(args, blockIdx.x);
  const int t = piece.tensor;
  if (overflowed(c)) {
    RestoreEach<T, master == Master::Copy> undo(
        static_cast<T*>(args.data[kUpdateParam][t]) + piece.begin,
        static_cast<const Stored<T, master>*>(args.data[kUpdateSource][t]) + piece.begin);
    for_each_pack_anywhere<T, 1>(piece.count, undo);
    return;
  }
  RunOfPiece run{};
  if constexpr (Args::kState) run = run_of(args, piece);  // before the row, which stays in registers
  const bool given = c.on_device.hyperparams == nullptr && c.on_device.steps == nullptr;
  PreparedRow<Rule, A> row = given ? row_in_arguments<A>(args, t) : row_on_device<Rule, A>(args, t);
  if (const float* const scale = c.on_device.grad_scale) {
    row.step.grad_multiplier = static_cast<A>(c.grad_multiplier / static_cast<double>(*scale));
  }
  constexpr int kPacks = update_packs<Rule, N, T, Mixing, master>();
  if constexpr (Args::kState) {
    update_rounding<Rule, N, T, Mixing, master>(args, piece, run, row);
  } else if constexpr (Rule::kDivides && std::is_same_v<A, float>) {
    if (row.step.ignores_small_roots()) {
      update_with<Rule, N, T, FastFloat, kPacks, Mixing, master>(args, piece, row);
    } else {
      update_with<Rule, N, T, A, 0, Mixing, master>(args, piece, row);
    }
  } else {
    update_with<Rule, N, T, A, kPacks, Mixing, master>(args, piece, row);
  }
}

}  // namespace rst::cuda
