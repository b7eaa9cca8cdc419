// grad_norm over one chunk: reads g (and w for ASAM), 4 bytes per fp32 parameter (8 for ASAM); writes nothing.
#pragma once

#include "cpu/loop.h"

namespace rst::RST_LEVEL {

// Sums in fp64 over kNormLanes fixed lanes: element i of the chunk always goes to lane i % kNormLanes, so the result
// depends neither on the SIMD level nor on the number of threads.
template <class T, bool Adaptive, bool Master>
void grad_norm_chunk(const ChunkCall& c) {
  constexpr int kSums = kNormLanes / kDoubleLanes;
  DoubleV sums[kSums];
  std::memcpy(sums, c.lanes, sizeof(sums));
  const AsamScale<DoubleV> scale{broadcast<DoubleV>(c.call->eta)};
  const bool complex = c.tensor->complex;

  auto add = [&](auto at, DoubleV sum) __attribute__((always_inline)) {
    DoubleV g = at.template load<T>(c.data[kGrad]);
    if constexpr (Adaptive) {
      DoubleV w;
      if constexpr (Master) {
        w = at.template load<float>(c.data[kMaster]);
      } else {
        w = at.template load<T>(c.data[kParam]);
      }
      return AsamSquaredNorm<DoubleV>{}(g, scale(magnitude(w, complex)), sum);
    } else {
      return SquaredNorm<DoubleV>{}(g, sum);
    }
  };
  int64_t i = 0;
  for (; i + kNormLanes <= c.count; i += kNormLanes) {
    for (int k = 0; k < kSums; ++k) sums[k] = add(At<DoubleV, Part::Whole>{i + k * kDoubleLanes, kDoubleLanes}, sums[k]);
  }
  for (int k = 0; k < kSums && i < c.count; ++k, i += kDoubleLanes) {
    int lanes = static_cast<int>(c.count - i < kDoubleLanes ? c.count - i : kDoubleLanes);
    sums[k] = add(At<DoubleV, Part::Some>{i, lanes}, sums[k]);
  }
  std::memcpy(c.lanes, sums, sizeof(sums));
}

}  // namespace rst::RST_LEVEL
