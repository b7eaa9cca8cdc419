// The loop every kernel shares: whole vectors, with partial ones at the ends. Included once per SIMD level.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "sam_math.h"

namespace rst::RST_LEVEL {

template <class T>
struct ArithmeticOf {
  using type = FloatV;
};
template <>
struct ArithmeticOf<double> {
  using type = DoubleV;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;  // 16-bit dtypes compute in fp32
template <class V>
constexpr int kLanes = sizeof(V) / sizeof(V{}[0]);

template <class V>
RST_INLINE V broadcast(double x) {
  using Scalar = typename std::decay<decltype(V{}[0])>::type;
  return V{} + static_cast<Scalar>(x);
}

enum class Part { Whole, WholeStreaming, Some };

// `lanes` elements from element `i` on. Missing lanes of a partial vector read as zero and are not written.
template <class V, Part part>
struct At {
  int64_t i;
  int lanes;

  template <class T>
  RST_INLINE V load(const void* base) const {
    typename Convert<V, T>::Raw raw{};
    const T* p = static_cast<const T*>(base) + i;
    if constexpr (part == Part::Some) {
      std::memcpy(&raw, p, lanes * sizeof(T));
    } else {
      std::memcpy(&raw, p, sizeof(raw));
    }
    return Convert<V, T>::widen(raw);
  }
  template <class T>
  RST_INLINE void store(void* base, V v) const {
    auto raw = Convert<V, T>::narrow(v);
    T* p = static_cast<T*>(base) + i;
    if constexpr (part == Part::Some) {
      std::memcpy(p, &raw, lanes * sizeof(T));
    } else {
      std::memcpy(p, &raw, sizeof(raw));
    }
  }
  // The bits as they are: not even the payload of a NaN changes.
  template <class T>
  RST_INLINE void copy(void* to, const void* from) const {
    typename Convert<V, T>::Raw raw{};
    constexpr size_t whole = sizeof(raw);
    const size_t bytes = part == Part::Some ? lanes * sizeof(T) : whole;
    std::memcpy(&raw, static_cast<const T*>(from) + i, bytes);
    write_only<T>(to, raw, bytes);
  }
  // For outputs that the kernel does not read: no line is fetched to be overwritten.
  template <class T>
  RST_INLINE void store_only(void* base, V v) const {
    write_only<T>(base, Convert<V, T>::narrow(v), part == Part::Some ? lanes * sizeof(T) : kLanes<V> * sizeof(T));
  }

 private:
  template <class T, class Raw>
  RST_INLINE void write_only(void* base, Raw raw, size_t bytes) const {
    T* p = static_cast<T*>(base) + i;
    if constexpr (part == Part::WholeStreaming) {
      using Scalar = typename std::decay<decltype(raw[0])>::type;
      stream(reinterpret_cast<Scalar*>(p), raw);
    } else {
      std::memcpy(p, &raw, bytes);
    }
  }
};

// Calls body(At) over the chunk. When streaming, whole vectors start where `streamed` (elements of T) is aligned.
template <class T, class V, class Body>
RST_INLINE void each(const ChunkCall& c, const void* streamed, Body body) {
  constexpr int64_t bytes = kLanes<V> * sizeof(T);
  int64_t i = 0;
  const int64_t n = c.count;
  if (c.streaming && streamed != nullptr) {
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(streamed) % bytes);
    const int64_t head = past == 0 ? 0 : (bytes - past) / static_cast<int64_t>(sizeof(T));
    if (past % static_cast<int64_t>(sizeof(T)) == 0 && head <= n) {
      if (head > 0) body(At<V, Part::Some>{0, static_cast<int>(head)});
      for (i = head; i + kLanes<V> <= n; i += kLanes<V>) body(At<V, Part::WholeStreaming>{i, kLanes<V>});
      finish_streaming();
    }
  }
  for (; i + kLanes<V> <= n; i += kLanes<V>) body(At<V, Part::Whole>{i, kLanes<V>});
  if (i < n) body(At<V, Part::Some>{i, static_cast<int>(n - i)});
}

#define RST_BODY(at) [&](auto at) __attribute__((always_inline))

// |w| per scalar; for complex w, |w| of the pair in both its lanes.
template <class V>
RST_INLINE V magnitude(V w, bool complex) {
  if (!complex) return abs(w);
  V square = w * w;
  return sqrt(square + swap_pairs(square));
}

}  // namespace rst::RST_LEVEL
