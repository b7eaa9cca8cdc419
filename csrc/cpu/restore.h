// restore over one chunk: reads the backup (or master copy), writes w: 8 bytes per fp32 parameter.
// mix over one chunk: g <- (1 - gamma) * g1 + gamma * g: 12 bytes per fp32 parameter.
#pragma once

#include "cpu/weights.h"

namespace rst::CPU_CAPABILITY {

template <class T, bool FromMaster>
void restore_chunk(const ChunkArgs& c) {
  if constexpr (FromMaster) {
    for_each_vector<T, Arithmetic<T>>(c, c.data[kParam], RST_BODY(at) {
      at.template store_only<T, Values::Any>(c.data[kParam], at.template load<State<T, Master::Copy>>(c.data[kMaster]));
    });
  } else {  // bytes, not values: a NaN's payload comes back too
    std::memcpy(c.data[kParam], c.data[kBackup], c.count * sizeof(T));
  }
}

template <class T>
void mix_chunk(const ChunkArgs& c) {
  using V = Arithmetic<T>;
  const auto mix = Mix<V>::of(c.params->gammas[c.tensor->row]);
  for_each_vector<T, V>(c, nullptr, RST_BODY(at) {
    const V g1 = at.template load<T>(c.data[kFirstGrad]), g2 = at.template load<T>(c.data[kGrad]);
    at.template store<T, Values::Own>(c.data[kGrad], mix(g1, g2));
  });
}

}  // namespace rst::CPU_CAPABILITY
