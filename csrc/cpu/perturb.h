// perturb over one chunk: reads w, g; writes w + e and the backup: 16 bytes per fp32 parameter. The backup may be g.
// With a master copy: reads the master, g; writes the rounded w + e and no backup: 8 bytes per bf16 parameter.
#pragma once

#include "cpu/multi_tensor_apply.h"

namespace rst::CPU_CAPABILITY {

// `bits`: those of the pairs of neighbours in v, in order. To be stored as Values::Exact, which for bfloat16 takes the
// upper halves alone.
template <class T, bool Own>
RST_INLINE Twin stochastic_round(Twin v, UintV bits) {
  using Round = StochasticRound<FloatV, UintV>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const UintV even = bits & 0xffffu, odd = bits >> 16;
    if constexpr (Own) {
      return {from_bits(Round::own_upper_half(v.a, even)), from_bits(Round::own_upper_half(v.b, odd))};
    }
    return {Round::to_bfloat16(v.a, even), Round::to_bfloat16(v.b, odd)};
  } else {
    Vector<uint16_t, kFloatLanes> first, second;
    std::memcpy(&first, &bits, sizeof(first));
    std::memcpy(&second, reinterpret_cast<const char*>(&bits) + sizeof(first), sizeof(second));
    return {Round::to_float16(v.a, __builtin_convertvector(first, UintV)),
            Round::to_float16(v.b, __builtin_convertvector(second, UintV))};
  }
}

// StochasticFromOdd: the first element is at an odd position, so that neighbours here are not those that share bits.
enum class Rounding { Nearest, Stochastic, StochasticFromOdd };

// `random` and `position`: of the first element, and all that follow it in its block.
template <class T, bool Adaptive, bool Master, Rounding rounding>
RST_INLINE void perturb_each(const ChunkArgs& c, [[maybe_unused]] RandomBits random = {0},
                             [[maybe_unused]] uint64_t position = 0) {
  constexpr bool kStochastic = rounding != Rounding::Nearest;
  using V = Arithmetic<T>;
  using W = State<T, Master>;  // where w is read
  const Perturb<V> sam{as<V>(c.params->rhos[c.tensor->row] * c.params->stats[kInverse])};
  const AsamPerturb<V> asam{sam.scale};
  const AsamScale<V> asam_scale{as<V>(c.params->eta)};
  const bool complex = c.tensor->complex;
  // Local copies: the compiler need not fear that a store changes them.
  void* const param = c.data[kParam];
  void* const backup = c.data[kBackup];
  const void* const source = c.data[Master ? kMaster : kParam];
  const void* const grad = c.data[kGrad];
  [[maybe_unused]] UintV place{};  // of the pairs that come next
  if constexpr (kStochastic) {
    for (int k = 0; k < kFloatLanes; ++k) place[k] = static_cast<uint32_t>(position) / 2 + k;
    place = RandomBits::place(place);
  }

  // A backup that takes the place of the gradient is in the cache already.
  const void* const streamed = Master ? param : backup == grad ? nullptr : backup;
  for_each_vector<T, V>(c, streamed, RST_BODY(at) {
    const V w = at.template load<W>(source), g = at.template load<T>(grad);
    V moved;
    if constexpr (Adaptive) {
      moved = asam(w, g, asam_scale(magnitude(w, complex)));
    } else {
      moved = sam(w, g);
    }
    if constexpr (!Master) at.template copy<T>(backup, param);
    if constexpr (kStochastic) {
      UintV bits = random.at(place);
      if constexpr (rounding == Rounding::StochasticFromOdd) {
        bits = bits >> 16 | random.at(place + RandomBits::place(1u)) << 16;
      }
      // for_each_vector begins at even elements, one vector after another.
      place += RandomBits::place(static_cast<uint32_t>(at.lanes / 2));
      moved = stochastic_round<T, !Master>(moved, bits);
    }
    constexpr Values computed = kStochastic ? Values::Exact : Master ? Values::Any : Values::Own;
    if constexpr (Master) {
      at.template store_only<T, computed>(param, moved);
    } else {
      at.template store<T, computed>(param, moved);
    }
  });
}

// One stretch of elements after another that follow one another in the whole tensor.
template <class T, bool Adaptive, bool Master>
void perturb_stochastically(const ChunkArgs& c) {
  const Shard& shard = c.tensor->shard;
  const uint32_t key = RandomBits::key_of(c.params->seed, c.params->step, static_cast<uint64_t>(c.tensor->index));
  ChunkArgs piece = c;
  for (int64_t done = 0; done < c.count; done += piece.count) {
    const uint64_t position = shard.position(c.begin + done);
    const int64_t together = shard.together(c.begin + done), left = c.count - done;
    piece.count = together < left ? together : left;
    for (int s : {kParam, kGrad, kBackup, kMaster}) {
      if (c.data[s] == nullptr) continue;
      piece.data[s] = static_cast<char*>(c.data[s]) + done * size_of(c.tensor->dtype_of(s));
    }
    const RandomBits random = RandomBits::of(key, position >> 32);
    if (position % 2 == 0) {
      perturb_each<T, Adaptive, Master, Rounding::Stochastic>(piece, random, position);
    } else {
      perturb_each<T, Adaptive, Master, Rounding::StochasticFromOdd>(piece, random, position);
    }
  }
}

template <class T, bool Adaptive, bool Master>
void perturb_chunk(const ChunkArgs& c) {
  if constexpr (sizeof(T) == 2) {
    if (c.params->stochastic) return perturb_stochastically<T, Adaptive, Master>(c);
  }
  perturb_each<T, Adaptive, Master, Rounding::Nearest>(c);
}

// For a zero or non-finite norm: e = 0 whatever g is, so there is only the backup to write.
template <class T>
void backup_chunk(const ChunkArgs& c) {
  if (c.data[kBackup] != nullptr) std::memcpy(c.data[kBackup], c.data[kParam], c.count * sizeof(T));
}

}  // namespace rst::CPU_CAPABILITY
