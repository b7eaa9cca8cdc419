// perturb over one chunk: reads w, g; writes w + e and the backup: 16 bytes per fp32 parameter.
// With a master copy: reads the master, g; writes the rounded w + e and no backup: 8 bytes per bf16 parameter.
#pragma once

#include "cpu/loop.h"

namespace rst::RST_LEVEL {

// Stores v rounded to T: to nearest, or stochastically for the 16-bit dtypes.
template <class T>
struct Rounding {
  template <class At, class V>
  static RST_INLINE V apply(const At&, V v, const ChunkCall&, RandomBits, UintV) {
    return v;
  }
};
template <class T, FloatV (*Round)(FloatV, UintV)>
struct StochasticRounding {
  template <class At>
  static RST_INLINE FloatV apply(const At& at, FloatV v, const ChunkCall& c, RandomBits random, UintV lane) {
    if (!c.call->stochastic) return v;
    const uint32_t first = static_cast<uint32_t>(c.begin + at.i);
    return Round(v, random(lane + first));
  }
};
template <>
struct Rounding<BFloat16> : StochasticRounding<BFloat16, StochasticRound<FloatV, UintV>::to_bfloat16> {};
template <>
struct Rounding<Half> : StochasticRounding<Half, StochasticRound<FloatV, UintV>::to_float16> {};

template <class T, bool Adaptive, bool Master>
void perturb_chunk(const ChunkCall& c) {
  using V = Arithmetic<T>;
  using W = typename std::conditional<Master, float, T>::type;  // where w is read
  const V scale = broadcast<V>(c.call->scales[c.tensor->row]);
  const AsamScale<V> asam_scale{broadcast<V>(c.call->eta)};
  const bool complex = c.tensor->complex;
  // A chunk never straddles a multiple of 2^32 elements: both are powers of two.
  const RandomBits random = RandomBits::of(c.call->seed, c.call->step, static_cast<uint64_t>(c.tensor->index),
                                           static_cast<uint64_t>(c.begin) >> 32);
  UintV lane;
  for (int k = 0; k < kFloatLanes; ++k) lane[k] = static_cast<uint32_t>(k);

  each<T, V>(c, Master ? c.data[kParam] : c.data[kBackup], RST_BODY(at) {
    const V w = at.template load<W>(c.data[Master ? kMaster : kParam]), g = at.template load<T>(c.data[kGrad]);
    V moved;
    if constexpr (Adaptive) {
      moved = AsamPerturb<V>{scale}(w, g, asam_scale(magnitude(w, complex)));
    } else {
      moved = Perturb<V>{scale}(w, g);
    }
    moved = Rounding<T>::apply(at, moved, c, random, lane);
    if constexpr (Master) {
      at.template store_only<T>(c.data[kParam], moved);
    } else {
      at.template copy<T>(c.data[kBackup], c.data[kParam]);
      at.template store<T>(c.data[kParam], moved);
    }
  });
}

// For a zero or non-finite norm: e = 0 whatever g is, so there is only the backup to write.
template <class T>
void backup_chunk(const ChunkCall& c) {
  if (c.data[kBackup] != nullptr) std::memcpy(c.data[kBackup], c.data[kParam], c.count * sizeof(T));
}

}  // namespace rst::RST_LEVEL
