// perturb: reads w, g; writes w + e and the backup, 16 bytes per fp32 parameter; the backup may be g. With a master
// copy it reads that and g and writes the rounded w + e, 8 bytes per bf16 parameter. With a remainder it reads w,
// remainder and g, and writes the rounded w + e and the backup of w without its remainder, 10 bytes.
#pragma once

#include "core/params.h"
#include "cuda/random.cuh"
#include "cuda/restore.cuh"

namespace rst::cuda {

template <class T, bool Adaptive, bool Complex, Master master, class Bits>
struct PerturbEach : NothingAtEndOfTurn {
  using A = Arithmetic<T>;
  void *param, *copy;  // the backup, or the master copy, which is only read
  const void *grad, *rest;
  Perturb<A> sam;
  AsamPerturb<A> asam;
  AsamScale<A> scale;
  bool stochastic;
  Bits random_bits;

  template <int N>
  struct In {
    Weights<T, master, N> w;
    Pack<T, N> g;
  };
  template <int N, Access access>
  __device__ __forceinline__ In<N> load(int64_t i) const {
    return {load_weights<N, T, master, access>(master == Master::Copy ? copy : param, rest, i),
            cuda::load<N, T, access>(grad, i)};
  }
  template <int N>
  __device__ __forceinline__ A moved(const In<N>& in, int k) const {
    const A w = in.w[k], g = widen(in.g.at[k]);
    if constexpr (Adaptive) {
      return asam(w, g, scale(magnitude<A, Complex>(in.w, k)));
    } else {
      return sam(w, g);
    }
  }
  template <int N, Access access>
  __device__ __forceinline__ void finish(int64_t i, const In<N>& in) const {
    if constexpr (master != Master::Copy) store<access>(copy, i, in.w.stored);
    if constexpr (sizeof(T) == 2) {
      if (stochastic) {
        auto bits = random_bits.template of_pack<N>(i);
        Pack<T, N> out;
#pragma unroll
        for (int k = 0; k < N; ++k) out.at[k] = stochastic_round<T>(moved(in, k), bits.next(k) & 0xffffu);
        store<access>(param, i, out);
        return;
      }
    }
    A out[N];
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = moved(in, k);
    store<access>(param, i, narrow_all<T>(out));
  }
};

// Blocks per multiprocessor, so many that no register spills.
template <bool Adaptive, Master master, bool Shards = false>
RST_HD constexpr int perturb_blocks() {
  return master == Master::Remainder && (Adaptive || Shards) && kNeedsMoreRegisters ? 1 : 2;
}

template <class T, bool Adaptive, bool Complex, Master master, class Args>
__device__ __forceinline__ void perturb(const Args& args) {
  using A = Arithmetic<T>;
  const LaunchParams& c = args.params;
  // The norm has read the last gradients last: they are still in the L2 cache.
  const Piece piece = piece_of(args, gridDim.x - 1 - blockIdx.x);
  T* const param = static_cast<T*>(args.data[kPerturbParam][piece.tensor]) + piece.begin;
  auto* const copy = static_cast<Stored<T, master>*>(args.data[kPerturbCopy][piece.tensor]) + piece.begin;
  const T* const grad = static_cast<const T*>(args.data[kPerturbGrad][piece.tensor]) + piece.begin;
  const T* const rest = static_cast<const T*>(args.data[kPerturbRest][piece.tensor]) + piece.begin;
  const bool packs = aligned(args, piece.tensor);
  const double inverse = c.stats[kInverse];
  if (inverse == 0) {  // e = 0 whatever g is, and 0 * inf would be NaN: there is only the backup to write
    if constexpr (master != Master::Copy) {
      RestoreEach<T, false> keep(copy, param);
      for_each_pack_anywhere<T, 1>(piece.count, keep);
    }
    return;
  }
  const A factor = static_cast<A>(hyperparam(args, piece.tensor) * inverse);
  uint32_t key = 0;
  if constexpr (sizeof(T) == 2) {
    if (c.stochastic) key = random_key(c, static_cast<uint64_t>(args.index[piece.tensor]));
  }
  const auto op_with = [&](const auto& bits) {
    return PerturbEach<T, Adaptive, Complex, master, std::decay_t<decltype(bits)>>{
        {}, param, copy, grad, rest, {factor}, {factor}, {static_cast<A>(c.eta)}, c.stochastic, bits};
  };
  // A chunk of a whole tensor never straddles a multiple of 2^32 elements: both are powers of two.
  uint64_t first = static_cast<uint64_t>(piece.begin);
  if constexpr (Args::kShards) {
    const Shard& shard = args.shard[piece.tensor];
    first = shard.position(piece.begin);
    if (c.stochastic && (first % 2 != 0 || shard.together(piece.begin) < piece.count)) {
      auto op = op_with(BitsOfShard{key, shard, piece.begin});
      for_each_pack_or_element<T, 1>(packs, piece.count, op);
      return;
    }
  }
  RandomBits random{0};
  if constexpr (sizeof(T) == 2) {
    if (c.stochastic) random = RandomBits::of(key, first >> 32);
  }
  auto op = op_with(BitsOfRun{random, static_cast<uint32_t>(first)});
  for_each_pack<T, master == Master::None ? 2 : 1, Complex ? 2 : 1>(packs, piece.count, op);
}

}  // namespace rst::cuda
