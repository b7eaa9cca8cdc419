// The loop that all kernels share: whole vectors, with partial ones at the ends. Included once per SIMD level.
#pragma once

#include "cpu/simd.h"  // first: formulas in math/ find only the overloads for vectors that are declared before them

#include "cpu/kernels.h"
#include "math/sam_math.h"

namespace rst::CPU_CAPABILITY {

// 16-bit dtypes compute in fp32.
template <class T>
using Arithmetic =
    std::conditional_t<sizeof(T) == 2, Twin, std::conditional_t<std::is_same_v<T, double>, DoubleV, FloatV>>;
template <class V>
constexpr int kLanes = sizeof(V) / (std::is_same_v<V, DoubleV> ? sizeof(double) : sizeof(float));

// Kernels over 16-bit dtypes prefetch what they read, which saves up to a sixth of their time: the hardware prefetcher
// does not look far enough ahead at their speed, and it stops at the end of every page. With fp32 the effect is a few
// hundredths either way. Where a vector fills a line and stores bypass the cache (AVX-512, measured on Zen 5), an
// update becomes a thirtieth slower and a perturbation gains nothing, so there is none. But on a Xeon of the fifth
// generation the same kernels take a fifth less time with it, and those of fp32 up to a twentieth, and it pays to look
// further ahead: ChunkArgs::prefetches. What is only written is prefetched too, unless it bypasses the cache: a store
// that misses waits for its line.
constexpr int64_t kLine = 64, kNear = 2048, kFar = 4096;  // bytes
constexpr int kRead = 0, kWrite = 1;                      // what for
constexpr int kIntoSecondLevel = 2, kIntoFirstLevel = 3;  // of the caches
template <int64_t distance, int access = kRead, int level = kIntoFirstLevel>
RST_INLINE void prefetch(const void* current) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(current) + distance), access, level);
}

enum class Part { Whole, WholeStreaming, Some };
// What is stored as a T: anything, what was computed only from elements of T and finite numbers, or what T holds
// exactly. See Convert.
enum class Values { Any, Own, Exact };

// `lanes` elements from element `i` on. Missing lanes of a partial vector read as zero and are not written.
template <class V, Part part>
struct At {
  int64_t i;
  int lanes;
  bool prefetches = false;

  template <class T>
  RST_INLINE V load(const void* base) const {
    return Convert<V, T>::widen(read<T>(base));
  }
  // The elements as they are stored.
  template <class T>
  RST_INLINE typename Convert<V, T>::Raw read(const void* base) const {
    if constexpr (part != Part::Some) {
      const T* const p = static_cast<const T*>(base) + i;
      constexpr bool always = sizeof(T) == 2 && (part == Part::Whole || kLanes<V> * sizeof(T) < kLine);
      if (prefetches) {
        prefetch_lines<kFar, kRead>(p);
      } else if (always) {
        prefetch_lines<kNear, kRead>(p);
      }
    }
    return get<T>(base);
  }
  template <class T, Values values>
  RST_INLINE void store(void* base, V v) const {
    put<T>(base, narrow<T, values>(v));
  }
  // For outputs that the kernel does not read: no line is fetched only to be overwritten.
  template <class T, Values values>
  RST_INLINE void store_only(void* base, V v) const {
    write_only<T>(base, narrow<T, values>(v));
  }
  // The bits as they are: not even the payload of a NaN changes.
  template <class T>
  RST_INLINE void copy(void* to, const void* from) const {
    write_only<T>(to, get<T>(from));
  }
  template <class T, class Raw>
  RST_INLINE void put(void* base, Raw raw) const {
    T* p = static_cast<T*>(base) + i;
    if constexpr (kIsPair<Raw>) {
      put_bytes(p, raw.a, first_half<T>());
      put_bytes(p + first_half<T>() / sizeof(T), raw.b, bytes<T>() - first_half<T>());
    } else {
      put_bytes(p, raw, bytes<T>());
    }
  }
  template <class T, class Raw>
  RST_INLINE void write_only(void* base, Raw raw) const {
    if constexpr (part == Part::WholeStreaming) {
      stream(static_cast<T*>(base) + i, raw);
    } else {
      if constexpr (part == Part::Whole) prefetch_lines<kNear, kWrite>(static_cast<T*>(base) + i);
      put<T>(base, raw);
    }
  }

 private:
  template <class T>
  RST_INLINE typename Convert<V, T>::Raw get(const void* base) const {
    typename Convert<V, T>::Raw raw{};
    const T* p = static_cast<const T*>(base) + i;
    if constexpr (kIsPair<decltype(raw)>) {
      raw.a = get_bytes<decltype(raw.a)>(p, first_half<T>());
      raw.b = get_bytes<decltype(raw.b)>(p + first_half<T>() / sizeof(T), bytes<T>() - first_half<T>());
    } else {
      raw = get_bytes<decltype(raw)>(p, bytes<T>());
    }
    return raw;
  }
  template <class Raw>
  RST_INLINE Raw get_bytes(const void* p, size_t bytes) const {
    if constexpr (part == Part::Some) return load_some<Raw>(p, bytes);
    Raw raw;
    std::memcpy(&raw, p, sizeof(raw));
    return raw;
  }
  template <class Raw>
  RST_INLINE void put_bytes(void* p, Raw raw, size_t bytes) const {
    if constexpr (part == Part::Some) return store_some(p, raw, bytes);
    std::memcpy(p, &raw, sizeof(raw));
  }
  // Those that lie as far ahead of this vector as prefetch looks, each of them once.
  template <int64_t distance, int access, class T>
  RST_INLINE void prefetch_lines(const T* p) const {
    constexpr int64_t width = kLanes<V> * sizeof(T);
    if (width < kLine && i * static_cast<int64_t>(sizeof(T)) % kLine >= width) return;
    for (int64_t line = 0; line < width; line += kLine) {
      prefetch<distance, access>(reinterpret_cast<const char*>(p) + line);
    }
  }
  template <class T, Values values>
  RST_INLINE auto narrow(V v) const {
    if constexpr (values == Values::Exact) {
      return Convert<V, T>::truncate(v);
    } else if constexpr (values == Values::Own) {
      return Convert<V, T>::narrow_own(v);
    } else {
      return Convert<V, T>::narrow(v);
    }
  }
  template <class T>
  RST_INLINE size_t bytes() const {
    return lanes * sizeof(T);
  }
  // Of a Pair.
  template <class T>
  RST_INLINE size_t first_half() const {
    constexpr int half = kLanes<V> / 2;
    return (lanes < half ? lanes : half) * sizeof(T);
  }
};

// Calls body(At) over the chunk. When streaming, whole vectors start where `streamed` (elements of T) is aligned. In
// a Twin every At starts at an even element, so that a pair of neighbours is never split.
template <class T, class V, class Body>
RST_INLINE void for_each_vector(const ChunkArgs& c, const void* streamed, Body body) {
  constexpr int64_t bytes = kLanes<V> * sizeof(T);
  int64_t i = 0;
  const int64_t n = c.count;
  const bool prefetches = c.prefetches;  // a copy: the compiler knows that no store changes it
  if (c.streaming && streamed != nullptr) {
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(streamed) % bytes);
    const int64_t head = past == 0 ? 0 : (bytes - past) / static_cast<int64_t>(sizeof(T));
    const bool parts_pairs = kIsPair<V> && head % 2 != 0;
    if (past % static_cast<int64_t>(sizeof(T)) == 0 && head <= n && !parts_pairs) {
      if (head > 0) body(At<V, Part::Some>{0, static_cast<int>(head)});
      for (i = head; i + kLanes<V> <= n; i += kLanes<V>) {
        body(At<V, Part::WholeStreaming>{i, kLanes<V>, prefetches});
      }
    }
  }
  for (; i + kLanes<V> <= n; i += kLanes<V>) body(At<V, Part::Whole>{i, kLanes<V>, prefetches});
  if (i < n) body(At<V, Part::Some>{i, static_cast<int>(n - i)});
}

#define RST_BODY(at) [&](auto at) __attribute__((always_inline))

// |w| per scalar; for complex w, |w| of the pair in both its lanes.
template <class V>
RST_INLINE V magnitude(V w, [[maybe_unused]] bool complex) {
  if constexpr (!std::is_same_v<V, Twin>) {  // there are no complex 16-bit dtypes
    if (complex) {
      const V square = w * w;
      return sqrt(square + swap_pairs(square));
    }
  }
  return abs(w);
}

}  // namespace rst::CPU_CAPABILITY
