// grad_norm over one chunk: reads g (and w for ASAM), 4 bytes per fp32 parameter (8 for ASAM); writes nothing.
#pragma once

#include "cpu/loop.h"

namespace rst::RST_LEVEL {

// Squares of 16-bit numbers are exact in fp32 (8 + 8 and 11 + 11 bits of significand). Eight are added there, each time with
// an error of at most 2^-24, before their sum is widened: converting to fp64 would cost more than all the rest. A block is
// 32 elements, and pair k of four blocks in a row goes to lane k at every SIMD level.
constexpr int kPairBlock = 2 * kNormLanes;
constexpr int kPairBlocks = 4;

template <class T>
RST_INLINE FloatV add_pair_squares(const uint16_t* block, int k, FloatV sum) {
  using Beside16 = Vector<uint16_t, kFloatLanes>;
  Twin g;
  if constexpr (std::is_same<T, BFloat16>::value) {  // neighbours
    typename Convert<Twin, BFloat16>::Raw raw;
    std::memcpy(&raw, block + 2 * k, sizeof(raw));
    g = Convert<Twin, BFloat16>::widen(raw);
  } else {  // 16 elements apart
    Beside16 first, second;
    std::memcpy(&first, block + k, sizeof(first));
    std::memcpy(&second, block + kNormLanes + k, sizeof(second));
    g = {half_to_float(first), half_to_float(second)};
  }
  return fma(g.a, g.a, fma(g.b, g.b, sum));
}

template <class T>
RST_INLINE void add_pairs(const uint16_t* blocks, DoubleV* sums) {
  for (int k = 0; k < kNormLanes; k += kFloatLanes) {
    FloatV squares{};
    for (int b = 0; b < kPairBlocks; ++b) squares = add_pair_squares<T>(blocks + b * kPairBlock, k, squares);
    Vector<float, kDoubleLanes> halves[2];
    std::memcpy(halves, &squares, sizeof(halves));
    sums[k / kDoubleLanes] += __builtin_convertvector(halves[0], DoubleV);
    sums[k / kDoubleLanes + 1] += __builtin_convertvector(halves[1], DoubleV);
  }
}

// True if the pairs were summed into c.lanes; false, with nothing done, where fp32 did not hold their squares: a bfloat16
// reaches as far as a float.
template <class T>
bool sum_pairs(const ChunkCall& c) {
  constexpr int kSums = kNormLanes / kDoubleLanes;
  DoubleV sums[kSums];
  std::memcpy(sums, c.lanes, sizeof(sums));
  const uint16_t* g = static_cast<const uint16_t*>(c.data[kGrad]);
  int64_t i = 0;
  constexpr int kStride = kPairBlocks * kPairBlock;
  for (; i + kStride <= c.count; i += kStride) add_pairs<T>(g + i, sums);
  if (i < c.count) {
    uint16_t rest[kStride] = {};
    std::memcpy(rest, g + i, (c.count - i) * sizeof(uint16_t));
    add_pairs<T>(rest, sums);
  }
  double lanes[kNormLanes], total = 0;
  std::memcpy(lanes, sums, sizeof(sums));
  for (double lane : lanes) total += lane;
  // Each of at most 2^14 squares below 2^-126 is off by less than 2^-149.
  if (!(total >= 0x1p-100 && total <= 0x1p120)) {
    bool zero = total == 0;
    for (i = 0; zero && i < c.count; ++i) zero = (g[i] & 0x7fffu) == 0;
    if (!zero) return false;
  }
  std::memcpy(c.lanes, sums, sizeof(sums));
  return true;
}

// Sums in fp64 over kNormLanes fixed lanes: element i of the chunk always goes to lane i % kNormLanes, so the result
// depends neither on the SIMD level nor on the number of threads.
template <class T, bool Adaptive, bool Master>
void grad_norm_chunk(const ChunkCall& c) {
  if constexpr (sizeof(T) == 2 && !Adaptive) {
    if (sum_pairs<T>(c)) return;
  }
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
