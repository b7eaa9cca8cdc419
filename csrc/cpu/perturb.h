// perturb over one chunk: reads w, g; writes w + e and the backup: 16 bytes per fp32 parameter. The backup may be g.
// With a master copy: reads the master, g; writes the rounded w + e and no backup: 8 bytes per bf16 parameter. With a
// remainder: reads w, remainder, g; writes the rounded w + e and the backup of w without its remainder: 10 bytes.
#pragma once

#include "cpu/random.h"

namespace rst::CPU_CAPABILITY {

// `bits`: those of the pairs of neighbours in v, in order. To be stored as Values::Exact, which for bfloat16 takes the
// upper halves alone.
template <class T, bool Own>
RST_INLINE Twin stochastic_round(Twin v, UintV bits) {
  using Round = StochasticRound<FloatV, UintV>;
  const Pair<UintV> random = bits_of_elements<T>(bits);
  if constexpr (std::is_same_v<T, BFloat16>) {
    if constexpr (Own) {
      return {from_bits(Round::own_upper_half(v.a, random.a)), from_bits(Round::own_upper_half(v.b, random.b))};
    }
    return {Round::to_bfloat16(v.a, random.a), Round::to_bfloat16(v.b, random.b)};
  } else if constexpr (Own) {
    return {Round::own_to_float16(v.a, random.a), Round::own_to_float16(v.b, random.b)};
  } else {
    return {Round::to_float16(v.a, random.a), Round::to_float16(v.b, random.b)};
  }
}

// StochasticFromOdd: the first element is at an odd position, so that neighbours here are not those that share bits.
enum class Rounding { Nearest, Stochastic, StochasticFromOdd };

// `random` and `position`: of the first element, and all that follow it in its block.
template <class T, bool Adaptive, Master master, Rounding rounding>
RST_INLINE void perturb_each(const ChunkArgs& c, [[maybe_unused]] RandomBits random = {0},
                             [[maybe_unused]] uint64_t position = 0) {
  constexpr bool kStochastic = rounding != Rounding::Nearest;
  constexpr bool kOwn = master == Master::None;
  using V = Arithmetic<T>;
  const Perturb<V> sam{as<V>(c.params->rhos[c.tensor->row] * c.params->stats[kInverse])};
  const AsamPerturb<V> asam{sam.scale};
  const AsamScale<V> asam_scale{as<V>(c.params->eta)};
  const bool complex = c.tensor->complex;
  // Local copies: the compiler need not fear that a store changes them.
  void* const param = c.data[kParam];
  void* const backup = c.data[kBackup];
  const void* const source = c.data[master == Master::Copy ? kMaster : kParam];
  const void* const rest = c.data[kMaster];
  const void* const grad = c.data[kGrad];
  [[maybe_unused]] UintV place{};  // of the pairs that come next
  if constexpr (kStochastic) {
    for (int k = 0; k < kFloatLanes; ++k) place[k] = static_cast<uint32_t>(position) / 2 + k;
    place = RandomBits::place(place);
  }

  // A backup that takes the place of the gradient is in the cache already.
  constexpr bool kBacksUp = master != Master::Copy;
  const void* const streamed = !kBacksUp ? param : backup == grad ? nullptr : backup;
  for_each_vector<T, V>(c, streamed, RST_BODY(at) {
    const V w = load_weights<V, T, master>(at, source, rest), g = at.template load<T>(grad);
    V moved;
    if constexpr (Adaptive) {
      moved = asam(w, g, asam_scale(magnitude(w, complex)));
    } else {
      moved = sam(w, g);
    }
    if constexpr (kBacksUp) at.template copy<T>(backup, param);
    if constexpr (kStochastic) {
      UintV bits = random.at(place);
      if constexpr (rounding == Rounding::StochasticFromOdd) {
        bits = bits >> 16 | random.at(place + RandomBits::place(1u)) << 16;
      }
      // for_each_vector begins at even elements, one vector after another.
      place += RandomBits::place(static_cast<uint32_t>(at.lanes / 2));
      moved = stochastic_round<T, kOwn>(moved, bits);
    }
    constexpr Values computed = kStochastic ? Values::Exact : kOwn ? Values::Own : Values::Any;
    if constexpr (kBacksUp) {
      at.template store<T, computed>(param, moved);
    } else {
      at.template store_only<T, computed>(param, moved);
    }
  });
}

template <class T, bool Adaptive, Master master>
void perturb_stochastically(const ChunkArgs& c) {
  const auto run = [](const ChunkArgs& piece, RandomBits random, uint64_t position) {
    if (position % 2 == 0) {
      perturb_each<T, Adaptive, master, Rounding::Stochastic>(piece, random, position);
    } else {
      perturb_each<T, Adaptive, master, Rounding::StochasticFromOdd>(piece, random, position);
    }
  };
  for_each_stretch(c, static_cast<uint64_t>(c.tensor->index), run);
}

template <class T, bool Adaptive, Master master>
void perturb_chunk(const ChunkArgs& c) {
  if constexpr (sizeof(T) == 2) {
    if (c.params->stochastic) return perturb_stochastically<T, Adaptive, master>(c);
  }
  perturb_each<T, Adaptive, master, Rounding::Nearest>(c);
}

// For a zero or non-finite norm: e = 0 whatever g is, so there is only the backup to write.
template <class T>
void backup_chunk(const ChunkArgs& c) {
  if (c.data[kBackup] != nullptr) std::memcpy(c.data[kBackup], c.data[kParam], c.count * sizeof(T));
}

}  // namespace rst::CPU_CAPABILITY
