// grad_norm over one chunk: reads g (and w for ASAM), 4 bytes per fp32 parameter (8 for ASAM); writes nothing.
#pragma once

#include "cpu/weights.h"

namespace rst::CPU_CAPABILITY {

// Eight squares at a time are added in fp32, each addition with an error of at most 2^-24 of the sum, before the sum is
// widened: converting every number to fp64 would cost more than reading it. Element order is the same at every SIMD
// level: a block holds one number of 4 bytes, or two of 2 bytes, for each of kNormLanes lanes.
constexpr int kSquares = 8;
template <class T>
constexpr int kNormBlock = kNormLanes * 4 / sizeof(T);
template <class T>
constexpr int kNormBlocks = kSquares * sizeof(T) / 4;  // whose squares are added before widening

// Adds the squares of lanes [k, k + kFloatLanes) of a block.
template <class T>
RST_INLINE FloatV add_squares(const T* block, int k, FloatV sum) {
  if constexpr (std::is_same_v<T, float>) {
    FloatV g;
    std::memcpy(&g, block + k, sizeof(g));
    return fma(g, g, sum);
  } else {
    Twin g;
    if constexpr (std::is_same_v<T, BFloat16>) {  // neighbours
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

// Sums over Count vectors of lanes. A tree: an array would be kept in memory, not in registers.
template <int Count>
struct Sums {
  Sums<Count / 2> low, high;

  // f(k, a, b) with sums k and k + 1, for every even k.
  template <class F>
  RST_INLINE void each_pair(F f, int k = 0) {
    if constexpr (Count == 2) {
      f(k, low.lanes, high.lanes);
    } else {
      low.each_pair(f, k);
      high.each_pair(f, k + Count / 2);
    }
  }
  RST_INLINE Sums operator+(const Sums& other) const { return {low + other.low, high + other.high}; }
  // Halves are added to halves: no long chain of additions, and the same order at every SIMD level.
  RST_INLINE double total() const { return (low + high).total(); }
};
template <>
struct Sums<1> {
  DoubleV lanes;

  RST_INLINE Sums operator+(const Sums& other) const { return {lanes + other.lanes}; }
  RST_INLINE double total() const {
    DoubleV all = lanes;
#pragma GCC unroll 8
    for (int half = kDoubleLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int k = 0; k < half; ++k) all[k] += all[k + half];
    }
    return all[0];
  }
};
using NormSums = Sums<kNormLanes / kDoubleLanes>;

// The sums of the earlier pieces, if the chunk comes in pieces.
RST_INLINE NormSums sums_before(const ChunkArgs& c) {
  NormSums sums{};
  if (c.lanes == nullptr) return sums;
  sums.each_pair([&](int k, DoubleV& a, DoubleV& b) __attribute__((always_inline)) {
    std::memcpy(&a, c.lanes + k * kDoubleLanes, sizeof(a));
    std::memcpy(&b, c.lanes + (k + 1) * kDoubleLanes, sizeof(b));
  });
  return sums;
}

RST_INLINE void pass_on(const ChunkArgs& c, NormSums& sums, double total) {
  *c.sum = total;
  if (c.lanes == nullptr) return;
  sums.each_pair([&](int k, DoubleV& a, DoubleV& b) __attribute__((always_inline)) {
    std::memcpy(c.lanes + k * kDoubleLanes, &a, sizeof(a));
    std::memcpy(c.lanes + (k + 1) * kDoubleLanes, &b, sizeof(b));
  });
}

// `last`: one more block, stored elsewhere, or null.
template <class T>
RST_INLINE void add_blocks(const T* blocks, int count, const T* last, NormSums& sums) {
  sums.each_pair([&](int k, DoubleV& a, DoubleV& b) __attribute__((always_inline)) {
    const int lane = k * kDoubleLanes;
    FloatV squares{};
    for (int i = 0; i < count; ++i) squares = add_squares<T>(blocks + i * kNormBlock<T>, lane, squares);
    if (last != nullptr) squares = add_squares<T>(last, lane, squares);
    Vector<float, kDoubleLanes> halves[2];
    std::memcpy(halves, &squares, sizeof(halves));
    a += to_double(halves[0]);
    b += to_double(halves[1]);
  });
}

// True if the chunk was summed; false, with nothing done, where the squares are out of fp32's range.
template <class T>
bool sum_in_fp32(const ChunkArgs& c) {
  NormSums sums = sums_before(c);
  const bool far = c.prefetches && c.streaming;  // data that is in the caches is near
  // Without this prefetching, data from memory takes a tenth less time on Zen 4.
  const bool near = sizeof(T) == 2 && !(c.streaming && kVectorBytes == kLine);
  const T* g = static_cast<const T*>(c.data[kGrad]);
  int64_t i = 0;
  constexpr int kStride = kNormBlocks<T> * kNormBlock<T>;
  static_assert(kNormBlock<T> * sizeof(T) == 64);
  static_assert(kGather % kStride == 0, "pieces of a chunk would be summed in another order than the whole");
  for (; i + kStride <= c.count; i += kStride) {
    for (int64_t k = 0; k < kStride; k += kLine / static_cast<int64_t>(sizeof(T))) {
      if (far) {
        prefetch<kFar, kRead, kIntoSecondLevel>(g + i + k);
      } else if (near) {
        prefetch<kNear>(g + i + k);
      }
    }
    add_blocks<T>(g + i, kNormBlocks<T>, nullptr, sums);
  }
  if (i < c.count) {
    const int64_t whole = (c.count - i) / kNormBlock<T>, left = (c.count - i) % kNormBlock<T>;
    T rest[kNormBlock<T>];
    if (left > 0) {
      using Block = Vector<uint16_t, 32>;  // of 64 bytes, whatever T is
      const auto block = load_some<Block>(g + c.count - left, left * sizeof(T));
      std::memcpy(rest, &block, sizeof(rest));
    }
    add_blocks<T>(g + i, static_cast<int>(whole), left > 0 ? rest : nullptr, sums);
  }
  const double total = sums.total();
  // Even if denormal numbers are flushed to zero, at most 2^14 squares below 2^-126 are lost: 2^-32 of the total.
  if (!(total >= 0x1p-80 && total <= 0x1p120)) {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    bool zero = total == 0;
    for (i = 0; zero && i < c.count; ++i) {
      Bits bits;
      std::memcpy(&bits, g + i, sizeof(bits));
      zero = static_cast<Bits>(bits << 1) == 0;  // without the sign
    }
    if (!zero) return false;
  }
  pass_on(c, sums, total);
  return true;
}

// Sums in fp64 over kNormLanes fixed lanes: element i of the chunk always goes to lane i % kNormLanes, so the result
// depends neither on the SIMD level nor on the number of threads.
template <class T, bool Adaptive, Master master>
void grad_norm_chunk(const ChunkArgs& c) {
  if constexpr (sizeof(T) < sizeof(double) && !Adaptive) {
    if (sum_in_fp32<T>(c)) return;
  }
  NormSums sums = sums_before(c);
  static_assert(kGather % kNormLanes == 0, "pieces of a chunk would be summed in another order than the whole");
  const AsamScale<DoubleV> scale{as<DoubleV>(c.params->eta)};
  const bool complex = c.tensor->complex;

  auto add = [&](auto at, DoubleV sum) __attribute__((always_inline)) {
    DoubleV g = at.template load<T>(c.data[kGrad]);
    if constexpr (Adaptive) {
      const DoubleV w =
          load_weights<DoubleV, T, master>(at, c.data[master == Master::Copy ? kMaster : kParam], c.data[kMaster]);
      return AsamSquaredNorm<DoubleV>{}(g, scale(magnitude(w, complex)), sum);
    } else {
      return SquaredNorm<DoubleV>{}(g, sum);
    }
  };
  int64_t i = 0;
  for (; i + kNormLanes <= c.count; i += kNormLanes) {
    sums.each_pair([&](int k, DoubleV& a, DoubleV& b) __attribute__((always_inline)) {
      a = add(At<DoubleV, Part::Whole>{i + k * kDoubleLanes, kDoubleLanes}, a);
      b = add(At<DoubleV, Part::Whole>{i + (k + 1) * kDoubleLanes, kDoubleLanes}, b);
    });
  }
  const auto add_some = [&](DoubleV& sum) __attribute__((always_inline)) {
    const int64_t left = c.count - i < kDoubleLanes ? c.count - i : kDoubleLanes;
    if (left > 0) sum = add(At<DoubleV, Part::Some>{i, static_cast<int>(left)}, sum);
    i += kDoubleLanes;
  };
  sums.each_pair([&](int, DoubleV& a, DoubleV& b) __attribute__((always_inline)) {
    add_some(a);
    add_some(b);
  });
  pass_on(c, sums, sums.total());
}

}  // namespace rst::CPU_CAPABILITY
