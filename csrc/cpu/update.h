// One step of any base optimizer over one chunk, from the backup or the master when weights are perturbed (restore
// folded in): reads w, g, all state (and g1 for G-RST), writes w and the state. Per fp32 parameter that is 12 bytes, 8
// for each state tensor and 4 for G-RST; 4 less where the first state is bfloat16.
#pragma once

#include "cpu/random.h"
#include "math/rules/all.h"

namespace rst::CPU_CAPABILITY {

// f(0), f(1), ... as constants: a loop might keep the vectors of an array in memory.
template <class F, int... I>
RST_INLINE void for_each_constant(std::integer_sequence<int, I...>, [[maybe_unused]] F f) {
  (f(std::integral_constant<int, I>{}), ...);
}

// How an update computes. Where it rounds the first state, which is bfloat16 then, it works on Twins throughout, since
// two neighbours share their random bits.
template <class T, Master master, bool Rounds>
struct UpdateFormats {
  using V = Arithmetic<T>;
  using Param = T;
  using S = State<T, master>;
  using First = S;
};
template <class T, Master master>
struct UpdateFormats<T, master, true> {
  using V = Twin;
  using Order = std::conditional_t<std::is_same_v<T, float>, Half, T>;  // that of an fp32 Twin is up to us
  using Param = std::conditional_t<std::is_same_v<T, float>, Float32Beside<Half>, T>;
  using S = State<Param, master>;
  using First = BFloat16Beside<Order>;
};

// `Own`: what was computed only from bfloat16.
template <class T, bool Own>
RST_INLINE Twin round_to_bfloat16(Twin v, UintV bits) {
  using Round = StochasticRound<FloatV, UintV>;
  const Pair<UintV> random = bits_of_elements<T>(bits);
  if constexpr (Own) {
    return {from_bits(Round::own_upper_half(v.a, random.a)), from_bits(Round::own_upper_half(v.b, random.b))};
  }
  return {Round::to_bfloat16(v.a, random.a), Round::to_bfloat16(v.b, random.b)};
}

template <class Rule, int N, class T, bool Mixing, Master master, bool Rounds, class... Factor, class Row>
RST_INLINE void update_with(const ChunkArgs& c, const Row& row, [[maybe_unused]] BitsOfStretch bits = {}) {
  using Formats = UpdateFormats<T, master, Rounds>;
  using V = typename Formats::V;
  using P = typename Formats::Param;
  using S = typename Formats::S;
  const auto step = Rule::template Step<V, Factor...>::prepare(row, c.params->grad_multiplier, c.params->flag);
  const auto mix = Mix<V>::of(row(Rule::kGamma));
  // Local copies: so the compiler knows that no store changes them.
  void* const param = c.data[kParam];
  [[maybe_unused]] void* const states[] = {c.data[kState0], c.data[kState1], c.data[kState2]};
  void* const rest = c.data[kMaster];
  const void* const source = c.source;
  const void* const grad = c.data[kGrad];
  const void* const first_grad = c.data[kFirstGrad];
  constexpr bool kOwn = master == Master::None && !(Rounds && std::is_same_v<T, float>);
  constexpr Values computed = kOwn ? Values::Own : Values::Any;
  const bool write_only = source != param;

  for_each_vector<P, V>(c, write_only ? param : nullptr, RST_BODY(at) {
    const V w = load_weights<V, P, master>(at, source, rest);
    V g = at.template load<P>(grad);
    if constexpr (Mixing) g = mix(at.template load<P>(first_grad), g);
    States<V, N> state;
    for_each_constant(std::make_integer_sequence<int, N>(), [&](auto i) __attribute__((always_inline)) {
      using Stored = std::conditional_t<i == 0, typename Formats::First, S>;
      state[i] = at.template load<Stored>(states[i]);
    });
    const V updated = step(w, g, state);
    for_each_constant(std::make_integer_sequence<int, N>(), [&](auto i) __attribute__((always_inline)) {
      if constexpr (Rounds && i == 0) {
        const V rounded = round_to_bfloat16<typename Formats::Order, kOwn>(state[0], bits.next(at.lanes));
        at.template store<typename Formats::First, Values::Exact>(states[0], rounded);
      } else {
        at.template store<S, computed>(states[i], state[i]);
      }
    });
    store_weights<P, master, computed>(at, param, rest, updated);
  });
}

// Rounds: the first state is bfloat16, beside whatever the others are, and is rounded stochastically.
template <class Rule, int N, class T, bool Mixing, Master master, bool Rounds>
void update_chunk(const ChunkArgs& c) {
  const auto row = [&params = *c.params, at = c.tensor->row](int column) {
    return column < Rule::kColumns ? params.hyperparams[at * Rule::kColumns + column] : params.steps[at];
  };
  if constexpr (Rounds) {
    const auto run = [&row](const ChunkArgs& piece, RandomBits random, uint64_t position) {
      update_with<Rule, N, T, Mixing, master, true>(piece, row, BitsOfStretch::of(random, position));
    };
    return for_each_stretch(c, RandomBits::kState + static_cast<uint64_t>(c.tensor->state_index), run);
  } else if constexpr (Rule::kHasUnitFactors) {
    if (Rule::has_unit_factors(row, c.params->grad_multiplier)) {
      return update_with<Rule, N, T, Mixing, master, false, One>(c, row);
    }
  }
  update_with<Rule, N, T, Mixing, master, false>(c, row);
}

}  // namespace rst::CPU_CAPABILITY
