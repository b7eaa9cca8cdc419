// Adam and AdamW over one chunk, from the backup or the master when weights are perturbed (restore folded in): reads
// w, g, m, v (and g1 for G-RST), writes w, m, v: 28 bytes per fp32 parameter (32 for G-RST).
#pragma once

#include "cpu/multi_tensor_apply.h"

namespace rst::CPU_CAPABILITY {

template <class T, bool Mixing, bool Master>
void adam_step_chunk(const ChunkArgs& c) {
  using V = Arithmetic<T>;
  using S = State<T, Master>;
  const AdamRow& row = c.params->adam[c.tensor->row];
  const AdamNumbers n =
      AdamNumbers::of(row.lr, row.beta1, row.beta2, row.eps, row.weight_decay, row.step, c.params->decoupled);
  const Adam<V> adam{
      broadcast<V>(n.minus_step_size), broadcast<V>(n.one_minus_beta1), broadcast<V>(n.beta2),
      broadcast<V>(n.one_minus_beta2), broadcast<V>(n.bias2_sqrt),      broadcast<V>(n.eps),
      broadcast<V>(n.weight_decay),    broadcast<V>(n.decay),           broadcast<V>(c.params->grad_multiplier)};
  const Mix<V> mix{broadcast<V>(row.gamma), broadcast<V>(1 - row.gamma)};
  // Local copies: the compiler need not fear that a store changes them.
  void* const param = c.data[kParam];
  void* const buffer = c.data[kState0];
  void* const buffer2 = c.data[kState1];
  void* const master = c.data[kMaster];
  const void* const source = c.source;
  const void* const grad = c.data[kGrad];
  const void* const first_grad = c.data[kFirstGrad];
  const bool write_only = Master || source != param;

  for_each_vector<T, V>(c, write_only ? param : nullptr, RST_BODY(at) {
    V w = at.template load<S>(source);
    V g = at.template load<T>(grad);
    if constexpr (Mixing) g = mix(at.template load<T>(first_grad), g);
    g = adam.decayed(w, g);
    w = adam.shrunk(w);
    const V m = adam.exp_avg(at.template load<S>(buffer), g);
    const V v = adam.exp_avg_sq(at.template load<S>(buffer2), g);
    at.template store<S, !Master>(buffer, m);
    at.template store<S, !Master>(buffer2, v);
    const V updated = adam.update(w, m, v);
    if constexpr (Master) at.template store<S, false>(master, updated);
    at.template store_only<T, !Master>(param, updated);
  });
}

}  // namespace rst::CPU_CAPABILITY
