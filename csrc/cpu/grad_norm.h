// grad_norm over one chunk: reads g (and w for ASAM), 4 bytes per fp32 parameter (8 for ASAM); writes nothing.
#pragma once

#include "cpu/loop.h"

namespace rst::RST_LEVEL {

// Eight squares at a time are added in fp32, each addition with an error of at most 2^-24 of the sum, before the sum is
// widened: converting every number to fp64 would cost more than reading it. Element order is the same at every SIMD level:
// a block holds one number of 4 bytes, or two of 2 bytes, for each of kNormLanes lanes.
constexpr int kSquares = 8;
template <class T>
constexpr int kNormBlock = kNormLanes * 4 / sizeof(T);
template <class T>
constexpr int kNormBlocks = kSquares * sizeof(T) / 4;  // whose squares are added before widening

// Adds the squares of lanes [k, k + kFloatLanes) of a block.
template <class T>
RST_INLINE FloatV add_squares(const T* block, int k, FloatV sum) {
  if constexpr (std::is_same<T, float>::value) {
    FloatV g;
    std::memcpy(&g, block + k, sizeof(g));
    return fma(g, g, sum);
  } else {
    Twin g;
    if constexpr (std::is_same<T, BFloat16>::value) {  // neighbours
      typename Convert<Twin, BFloat16>::Raw raw;
      std::memcpy(&raw, block + 2 * k, sizeof(raw));
      g = Convert<Twin, BFloat16>::widen(raw);
    } else {  // 16 elements apart
      Vector<uint16_t, kFloatLanes> first, second;
      std::memcpy(&first, block + k, sizeof(first));
      std::memcpy(&second, block + kNormLanes + k, sizeof(second));
      g = {half_to_float(first), half_to_float(second)};
    }
    return fma(g.a, g.a, fma(g.b, g.b, sum));
  }
}

// `last`: one more block that lies elsewhere, or null.
template <class T>
RST_INLINE void add_blocks(const T* blocks, int count, const T* last, DoubleV* sums) {
  for (int k = 0; k < kNormLanes; k += kFloatLanes) {
    FloatV squares{};
    for (int b = 0; b < count; ++b) squares = add_squares<T>(blocks + b * kNormBlock<T>, k, squares);
    if (last != nullptr) squares = add_squares<T>(last, k, squares);
    Vector<float, kDoubleLanes> halves[2];
    std::memcpy(halves, &squares, sizeof(halves));
    sums[k / kDoubleLanes] += __builtin_convertvector(halves[0], DoubleV);
    sums[k / kDoubleLanes + 1] += __builtin_convertvector(halves[1], DoubleV);
  }
}

// True if the chunk was summed into c.lanes; false, with nothing done, where fp32 did not hold the squares.
template <class T>
bool sum_in_fp32(const ChunkCall& c) {
  constexpr int kSums = kNormLanes / kDoubleLanes;
  DoubleV sums[kSums];
  std::memcpy(sums, c.lanes, sizeof(sums));
  const T* g = static_cast<const T*>(c.data[kGrad]);
  int64_t i = 0;
  constexpr int kStride = kNormBlocks<T> * kNormBlock<T>;
  for (; i + kStride <= c.count; i += kStride) {
    if constexpr (sizeof(T) == 2) {
      for (int64_t k = 0; k < kStride; k += kLine / static_cast<int64_t>(sizeof(T))) fetch_ahead(g + i + k);
    }
    add_blocks<T>(g + i, kNormBlocks<T>, nullptr, sums);
  }
  if (i < c.count) {
    const int64_t whole = (c.count - i) / kNormBlock<T>, left = (c.count - i) % kNormBlock<T>;
    T rest[kNormBlock<T>];
    if (left > 0) {
      std::memset(rest, 0, sizeof(rest));
      std::memcpy(rest, g + c.count - left, left * sizeof(T));
    }
    add_blocks<T>(g + i, static_cast<int>(whole), left > 0 ? rest : nullptr, sums);
  }
  // Halves are added to halves: no long chain of additions, and the same order at every SIMD level.
  DoubleV all[kSums];
  std::memcpy(all, sums, sizeof(sums));
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) all[k] += all[k + half];
  }
  for (int half = kDoubleLanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) all[0][k] += all[0][k + half];
  }
  const double total = all[0][0];
  // Even if denormal numbers are flushed to zero, at most 2^14 squares below 2^-126 are lost: 2^-32 of the total.
  if (!(total >= 0x1p-80 && total <= 0x1p120)) {
    using Bits = typename std::conditional<sizeof(T) == 4, uint32_t, uint16_t>::type;
    bool zero = total == 0;
    for (i = 0; zero && i < c.count; ++i) {
      Bits bits;
      std::memcpy(&bits, g + i, sizeof(bits));
      zero = static_cast<Bits>(bits << 1) == 0;  // without the sign
    }
    if (!zero) return false;
  }
  std::memcpy(c.lanes, sums, sizeof(sums));
  return true;
}

// Sums in fp64 over kNormLanes fixed lanes: element i of the chunk always goes to lane i % kNormLanes, so the result
// depends neither on the SIMD level nor on the number of threads.
template <class T, bool Adaptive, bool Master>
void grad_norm_chunk(const ChunkCall& c) {
  if constexpr (sizeof(T) < sizeof(double) && !Adaptive) {
    if (sum_in_fp32<T>(c)) return;
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
