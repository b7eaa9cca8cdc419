// restore over one chunk: reads the backup (or master), writes w: 8 bytes per fp32 parameter.
// mix over one chunk: g <- (1 - gamma) * g1 + gamma * g: 12 bytes per fp32 parameter.
#pragma once

#include "cpu/loop.h"

namespace rst::RST_LEVEL {

template <class T, bool Master>
void restore_chunk(const ChunkCall& c) {
  if constexpr (Master) {
    each<T, Arithmetic<T>>(c, c.data[kParam], RST_BODY(at) {
      at.template store_only<T, false>(c.data[kParam], at.template load<State<T, true>>(c.data[kMaster]));
    });
  } else {  // bytes, not values: a NaN's payload comes back too
    std::memcpy(c.data[kParam], c.data[kBackup], c.count * sizeof(T));
  }
}

template <class T>
void mix_chunk(const ChunkCall& c) {
  using V = Arithmetic<T>;
  const double gamma = c.call->gammas[c.tensor->row];
  const Mix<V> mix{broadcast<V>(gamma), broadcast<V>(1 - gamma)};
  each<T, V>(c, nullptr, RST_BODY(at) {
    const V g1 = at.template load<T>(c.data[kFirstGrad]), g2 = at.template load<T>(c.data[kGrad]);
    at.template store<T, true>(c.data[kGrad], mix(g1, g2));
  });
}

}  // namespace rst::RST_LEVEL
