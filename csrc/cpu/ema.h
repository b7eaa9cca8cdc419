// ema over one chunk: average <- decay * average + (1 - decay) * w: 12 bytes per fp32 parameter.
#pragma once

#include "cpu/loop.h"

namespace rst::RST_LEVEL {

template <class T>
void ema_chunk(const ChunkCall& c) {
  using V = Arithmetic<T>;
  const double decay = c.call->decay;
  const Ema<V> ema{broadcast<V>(decay), broadcast<V>(1 - decay)};
  each<T, V>(c, nullptr, RST_BODY(at) {
    const V average = at.template load<T>(c.data[kBuffer]), w = at.template load<T>(c.data[kParam]);
    at.template store<T>(c.data[kBuffer], ema(average, w));
  });
}

}  // namespace rst::RST_LEVEL
