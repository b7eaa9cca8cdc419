// One step of any base optimizer over one chunk, from the backup or the master when weights are perturbed (restore
// folded in): reads w, g, all state (and g1 for G-RST), writes w and the state. Per fp32 parameter that is 12 bytes, 8
// for each state tensor and 4 for G-RST.
#pragma once

#include "cpu/multi_tensor_apply.h"
#include "math/rules/all.h"

namespace rst::CPU_CAPABILITY {

// f(0), f(1), ... as constants: a loop might keep the vectors of an array in memory.
template <class F, int... I>
RST_INLINE void for_each_constant(std::integer_sequence<int, I...>, [[maybe_unused]] F f) {
  (f(std::integral_constant<int, I>{}), ...);
}

template <class Rule, int N, class T, bool Mixing, bool Master, class... Factor, class Row>
RST_INLINE void update_with(const ChunkArgs& c, const Row& row) {
  using V = Arithmetic<T>;
  using S = State<T, Master>;
  const auto step = Rule::template Step<V, Factor...>::prepare(row, c.params->grad_multiplier, c.params->flag);
  const auto mix = Mix<V>::of(row(Rule::kGamma));
  // Local copies: so the compiler knows that no store changes them.
  void* const param = c.data[kParam];
  [[maybe_unused]] void* const states[] = {c.data[kState0], c.data[kState1], c.data[kState2]};
  void* const master = c.data[kMaster];
  const void* const source = c.source;
  const void* const grad = c.data[kGrad];
  const void* const first_grad = c.data[kFirstGrad];
  constexpr Values computed = Master ? Values::Any : Values::Own;
  const bool write_only = Master || source != param;

  for_each_vector<T, V>(c, write_only ? param : nullptr, RST_BODY(at) {
    const V w = at.template load<S>(source);
    V g = at.template load<T>(grad);
    if constexpr (Mixing) g = mix(at.template load<T>(first_grad), g);
    States<V, N> state;
    for_each_constant(std::make_integer_sequence<int, N>(),
                      [&](auto i) __attribute__((always_inline)) { state[i] = at.template load<S>(states[i]); });
    const V updated = step(w, g, state);
    for_each_constant(std::make_integer_sequence<int, N>(), [&](auto i) __attribute__((always_inline)) {
      at.template store<S, computed>(states[i], state[i]);
    });
    if constexpr (Master) at.template store<S, Values::Any>(master, updated);
    at.template store_only<T, computed>(param, updated);
  });
}

template <class Rule, int N, class T, bool Mixing, bool Master>
void update_chunk(const ChunkArgs& c) {
  const auto row = [&params = *c.params, at = c.tensor->row](int column) {
    return column < Rule::kColumns ? params.hyperparams[at * Rule::kColumns + column] : params.steps[at];
  };
  if constexpr (Rule::kHasUnitFactors) {
    if (Rule::has_unit_factors(row, c.params->grad_multiplier)) {
      return update_with<Rule, N, T, Mixing, Master, One>(c, row);
    }
  }
  update_with<Rule, N, T, Mixing, Master>(c, row);
}

}  // namespace rst::CPU_CAPABILITY
