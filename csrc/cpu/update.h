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

template <class Rule, int N, class T, bool Mixing, bool Master, class... Factor>
RST_INLINE void update_with(const ChunkArgs& c, const Rule& hyperparams, double gamma) {
  using V = Arithmetic<T>;
  using S = State<T, Master>;
  const typename Rule::template Step<V, Factor...> step(hyperparams);
  const Mix<V> mix{broadcast<V>(gamma), broadcast<V>(1 - gamma)};
  // Local copies: so the compiler knows that no store changes them.
  void* const param = c.data[kParam];
  [[maybe_unused]] void* const states[] = {c.data[kState0], c.data[kState1], c.data[kState2]};
  void* const master = c.data[kMaster];
  const void* const source = c.source;
  const void* const grad = c.data[kGrad];
  const void* const first_grad = c.data[kFirstGrad];
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
      at.template store<S, !Master>(states[i], state[i]);
    });
    if constexpr (Master) at.template store<S, false>(master, updated);
    at.template store_only<T, !Master>(param, updated);
  });
}

template <class Rule, int N, class T, bool Mixing, bool Master>
void update_chunk(const ChunkArgs& c) {
  const OpParams& params = *c.params;
  const int row = c.tensor->row;
  const auto number = [&params, row](int column) {
    return column < Rule::kColumns ? params.hyperparams[row * Rule::kColumns + column] : params.steps[row];
  };
  const Rule hyperparams = Rule::prepare(number, params.grad_multiplier, params.flag);
  const double gamma = number(Rule::kGamma);
  if constexpr (Rule::kHasUnitFactors) {
    if (hyperparams.has_unit_factors()) return update_with<Rule, N, T, Mixing, Master, One>(c, hyperparams, gamma);
  }
  update_with<Rule, N, T, Mixing, Master>(c, hyperparams, gamma);
}

}  // namespace rst::CPU_CAPABILITY
