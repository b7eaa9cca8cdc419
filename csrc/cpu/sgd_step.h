// SGD over one chunk, from the backup or the master when weights are perturbed (restore folded in): reads w, g, m
// (and g1 for G-RST), writes w, m: 20 bytes per fp32 parameter (24 for G-RST).
#pragma once

#include "cpu/multi_tensor_apply.h"

namespace rst::CPU_CAPABILITY {

template <class T, bool Momentum, bool Mixing, bool Master, class Factor>
RST_INLINE void sgd_step_with(const ChunkArgs& c, Factor one_minus_dampening, Factor grad_multiplier) {
  using V = Arithmetic<T>;
  using S = State<T, Master>;
  const SgdRow& row = c.params->sgd[c.tensor->row];
  const Sgd<V, Factor> sgd{broadcast<V>(-row.lr), broadcast<V>(row.momentum), one_minus_dampening,
                           broadcast<V>(row.weight_decay), grad_multiplier};
  const Mix<V> mix{broadcast<V>(row.gamma), broadcast<V>(1 - row.gamma)};
  const bool nesterov = c.params->nesterov;
  // Local copies: the compiler need not fear that a store changes them.
  void* const param = c.data[kParam];
  void* const buffer = c.data[kState0];
  void* const master = c.data[kMaster];
  const void* const source = c.source;
  const void* const grad = c.data[kGrad];
  const void* const first_grad = c.data[kFirstGrad];
  const bool write_only = Master || source != param;

  for_each_vector<T, V>(c, write_only ? param : nullptr, RST_BODY(at) {
    const V w = at.template load<S>(source);
    V g = at.template load<T>(grad);
    if constexpr (Mixing) g = mix(at.template load<T>(first_grad), g);
    V d = sgd.decayed(w, g);
    if constexpr (Momentum) {
      const V buf = sgd.buffer(at.template load<S>(buffer), d);
      at.template store<S, !Master>(buffer, buf);
      d = nesterov ? sgd.nesterov(buf, d) : buf;
    }
    const V updated = sgd.update(w, d);
    if constexpr (Master) at.template store<S, false>(master, updated);
    at.template store_only<T, !Master>(param, updated);
  });
}

template <class T, bool Momentum, bool Mixing, bool Master>
void sgd_step_chunk(const ChunkArgs& c) {
  const double one_minus_dampening = 1 - c.params->sgd[c.tensor->row].dampening;
  const double grad_multiplier = c.params->grad_multiplier;
  if (one_minus_dampening == 1 && grad_multiplier == 1) {
    return sgd_step_with<T, Momentum, Mixing, Master>(c, One{}, One{});
  }
  using V = Arithmetic<T>;
  sgd_step_with<T, Momentum, Mixing, Master>(c, broadcast<V>(one_minus_dampening), broadcast<V>(grad_multiplier));
}

}  // namespace rst::CPU_CAPABILITY
