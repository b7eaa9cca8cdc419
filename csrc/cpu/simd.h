// One vector type per SIMD level, as GCC/Clang vector extensions: arithmetic, comparison and ?: come from the compiler;
// only what it cannot express (fma, sqrt, fp16, streaming stores) or expresses badly (to_double) is written with
// intrinsics.
//
// RST_SIMD_LEVEL is 0 (plain: 16-byte vectors, any architecture), 1 (AVX2 + FMA + F16C) or 2 (AVX-512 F/BW/DQ/VL).
#pragma once

#include "core/dtypes.h"
#include "cpu/standard_headers.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed only between functions that are always inlined
#if RST_SIMD_LEVEL == 2
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own _mm512_sqrt_ps
#endif
#endif

namespace rst {

template <class Scalar, int Lanes>
struct VectorOf {
  typedef Scalar type __attribute__((vector_size(Lanes * sizeof(Scalar))));
};
template <class Scalar, int Lanes>
using Vector = typename VectorOf<Scalar, Lanes>::type;

constexpr int kVectorBytes = 16 << RST_SIMD_LEVEL;
using FloatV = Vector<float, kVectorBytes / 4>;
using DoubleV = Vector<double, kVectorBytes / 8>;
using UintV = Vector<uint32_t, kVectorBytes / 4>;
constexpr int kFloatLanes = kVectorBytes / 4;
constexpr int kDoubleLanes = kVectorBytes / 8;

RST_INLINE UintV to_bits(FloatV x) { return reinterpret<UintV>(x); }
RST_INLINE FloatV from_bits(UintV x) { return reinterpret<FloatV>(x); }

RST_INLINE FloatV abs(FloatV x) { return from_bits(to_bits(x) & 0x7fffffffu); }
RST_INLINE DoubleV abs(DoubleV x) { return x < 0 ? -x : x; }
RST_INLINE FloatV copysign(FloatV a, FloatV b) { return from_bits(to_bits(abs(a)) | (to_bits(b) & 0x80000000u)); }
RST_INLINE DoubleV copysign(DoubleV a, DoubleV b) {
  using Bits = Vector<uint64_t, kDoubleLanes>;
  const Bits sign = reinterpret<Bits>(b) & (uint64_t{1} << 63);
  return reinterpret<DoubleV>(reinterpret<Bits>(abs(a)) | sign);
}

#if RST_SIMD_LEVEL == 2
RST_INLINE FloatV fma(FloatV a, FloatV b, FloatV c) { return _mm512_fmadd_ps(a, b, c); }
RST_INLINE DoubleV fma(DoubleV a, DoubleV b, DoubleV c) { return _mm512_fmadd_pd(a, b, c); }
RST_INLINE FloatV sqrt(FloatV a) { return _mm512_sqrt_ps(a); }
RST_INLINE DoubleV sqrt(DoubleV a) { return _mm512_sqrt_pd(a); }
RST_INLINE DoubleV to_double(Vector<float, 8> x) { return _mm512_cvtps_pd(reinterpret<__m256>(x)); }
RST_INLINE FloatV half_to_float(Vector<uint16_t, 16> h) { return _mm512_cvtph_ps(reinterpret<__m256i>(h)); }
RST_INLINE Vector<float, 8> half_to_float(Vector<uint16_t, 8> h) { return _mm256_cvtph_ps(reinterpret<__m128i>(h)); }
RST_INLINE Vector<uint32_t, 8> zero_extend(Vector<uint16_t, 8> h) {
  return reinterpret<Vector<uint32_t, 8>>(_mm256_cvtepu16_epi32(reinterpret<__m128i>(h)));
}
RST_INLINE Vector<uint16_t, 16> float_to_half(FloatV x) {
  return reinterpret<Vector<uint16_t, 16>>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
RST_INLINE Vector<uint16_t, 32> blend_neighbours(Vector<uint16_t, 32> even, Vector<uint16_t, 32> odd) {
  return reinterpret<Vector<uint16_t, 32>>(
      _mm512_mask_blend_epi16(0xaaaaaaaau, reinterpret<__m512i>(even), reinterpret<__m512i>(odd)));
}
RST_INLINE Vector<uint16_t, 32> minus_saturated(Vector<uint16_t, 32> a, Vector<uint16_t, 32> b) {
  return reinterpret<Vector<uint16_t, 32>>(_mm512_subs_epu16(reinterpret<__m512i>(a), reinterpret<__m512i>(b)));
}
#elif RST_SIMD_LEVEL == 1
RST_INLINE FloatV fma(FloatV a, FloatV b, FloatV c) { return _mm256_fmadd_ps(a, b, c); }
RST_INLINE DoubleV fma(DoubleV a, DoubleV b, DoubleV c) { return _mm256_fmadd_pd(a, b, c); }
RST_INLINE FloatV sqrt(FloatV a) { return _mm256_sqrt_ps(a); }
RST_INLINE DoubleV sqrt(DoubleV a) { return _mm256_sqrt_pd(a); }
RST_INLINE DoubleV to_double(Vector<float, 4> x) { return _mm256_cvtps_pd(reinterpret<__m128>(x)); }
RST_INLINE FloatV half_to_float(Vector<uint16_t, 8> h) { return _mm256_cvtph_ps(reinterpret<__m128i>(h)); }
RST_INLINE Vector<float, 4> half_to_float(Vector<uint16_t, 4> h) {
  return _mm_cvtph_ps(_mm_cvtsi64_si128(reinterpret<int64_t>(h)));
}
RST_INLINE Vector<uint32_t, 4> zero_extend(Vector<uint16_t, 4> h) {
  return reinterpret<Vector<uint32_t, 4>>(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(reinterpret<int64_t>(h))));
}
RST_INLINE Vector<uint16_t, 8> float_to_half(FloatV x) {
  return reinterpret<Vector<uint16_t, 8>>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
RST_INLINE Vector<uint16_t, 16> blend_neighbours(Vector<uint16_t, 16> even, Vector<uint16_t, 16> odd) {
  return reinterpret<Vector<uint16_t, 16>>(
      _mm256_blend_epi16(reinterpret<__m256i>(even), reinterpret<__m256i>(odd), 0xaa));
}
RST_INLINE Vector<uint16_t, 16> minus_saturated(Vector<uint16_t, 16> a, Vector<uint16_t, 16> b) {
  return reinterpret<Vector<uint16_t, 16>>(_mm256_subs_epu16(reinterpret<__m256i>(a), reinterpret<__m256i>(b)));
}
#else
RST_INLINE Vector<uint16_t, 8> blend_neighbours(Vector<uint16_t, 8> even, Vector<uint16_t, 8> odd) {
  const Vector<uint16_t, 8> upper{0, 0xffff, 0, 0xffff, 0, 0xffff, 0, 0xffff};
  return (even & ~upper) | (odd & upper);
}
RST_INLINE Vector<uint16_t, 8> minus_saturated(Vector<uint16_t, 8> a, Vector<uint16_t, 8> b) {
  return (a > b ? a : b) - b;
}
template <class V>
RST_INLINE V each_fma(V a, V b, V c) {
  V r{};
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) r[i] = std::fma(a[i], b[i], c[i]);
  return r;
}
template <class V>
RST_INLINE V each_sqrt(V a) {
  V r{};
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) r[i] = std::sqrt(a[i]);
  return r;
}
RST_INLINE FloatV fma(FloatV a, FloatV b, FloatV c) { return each_fma(a, b, c); }
RST_INLINE DoubleV fma(DoubleV a, DoubleV b, DoubleV c) { return each_fma(a, b, c); }
RST_INLINE FloatV sqrt(FloatV a) { return each_sqrt(a); }
RST_INLINE DoubleV sqrt(DoubleV a) { return each_sqrt(a); }
RST_INLINE DoubleV to_double(Vector<float, 2> x) { return __builtin_convertvector(x, DoubleV); }
template <class H>
RST_INLINE auto half_to_float(H h) {
  Vector<float, sizeof(H) / 2> r{};
  for (unsigned i = 0; i < sizeof(H) / 2; ++i) r[i] = half_bits_to_float(h[i]);
  return r;
}
RST_INLINE Vector<uint16_t, 4> float_to_half(FloatV x) {
  Vector<uint16_t, 4> r{};
  for (int i = 0; i < 4; ++i) r[i] = float_to_half_bits(x[i]);
  return r;
}
template <class H>
RST_INLINE auto zero_extend(H h) {
  return __builtin_convertvector(h, Vector<uint32_t, sizeof(H) / 2>);
}
#endif

// A store that bypasses the cache, where there is one.
template <class V>
RST_INLINE void stream(void* p, V v) {
#if RST_SIMD_LEVEL > 0
  if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret<__m512i>(v));
  } else if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret<__m256i>(v));
  } else {
    _mm_stream_si128(static_cast<__m128i*>(p), reinterpret<__m128i>(v));
  }
#else
  std::memcpy(p, &v, sizeof(v));
#endif
}

// Two vectors side by side. They are read and written one by one: as one block, the compiler would send them through
// the stack.
template <class V>
struct Pair {
  V a, b;
};
template <class V>
constexpr bool kIsPair = false;
template <class V>
constexpr bool kIsPair<Pair<V>> = true;
template <class V>
RST_INLINE void stream(void* p, Pair<V> v) {
  stream(p, v.a);
  stream(static_cast<char*>(p) + sizeof(V), v.b);
}

// The arithmetic of 16-bit dtypes, so that one whole vector of them is worked on at a time. Which element is where is
// up to Convert.
using Twin = Pair<FloatV>;
RST_INLINE Twin operator+(Twin x, Twin y) { return {x.a + y.a, x.b + y.b}; }
RST_INLINE Twin operator-(Twin x, Twin y) { return {x.a - y.a, x.b - y.b}; }
RST_INLINE Twin operator*(Twin x, Twin y) { return {x.a * y.a, x.b * y.b}; }
RST_INLINE Twin operator/(Twin x, Twin y) { return {x.a / y.a, x.b / y.b}; }
RST_INLINE Twin fma(Twin x, Twin y, Twin z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
RST_INLINE Twin sqrt(Twin x) { return {sqrt(x.a), sqrt(x.b)}; }
RST_INLINE Twin abs(Twin x) { return {abs(x.a), abs(x.b)}; }
template <class V>
RST_INLINE V maximum(V a, V b);
template <class V>
RST_INLINE V sign(V x);
RST_INLINE Twin maximum(Twin x, Twin y) { return {maximum(x.a, y.a), maximum(x.b, y.b)}; }
RST_INLINE Twin sign(Twin x) { return {sign(x.a), sign(x.b)}; }

RST_INLINE void assign(FloatV& to, double x) { to = FloatV{} + static_cast<float>(x); }
RST_INLINE void assign(DoubleV& to, double x) { to = DoubleV{} + x; }
RST_INLINE void assign(Twin& to, double x) {
  assign(to.a, x);
  to.b = to.a;
}

// Storage format of T in as many elements as a V holds: the raw bits, and the conversion to and from arithmetic.
// Where T is narrower than V, truncate is narrow for values that T holds exactly, and narrow_own for values computed
// only from elements of T and finite numbers.
template <class V, class T>
struct Convert;
// A T that is computed with as it is stored.
template <class V>
struct Identity {
  using Raw = V;
  static RST_INLINE V widen(Raw raw) { return raw; }
  static RST_INLINE Raw narrow(V v) { return v; }
  static RST_INLINE Raw narrow_own(V v) { return v; }
};
template <>
struct Convert<FloatV, float> : Identity<FloatV> {};
template <>
struct Convert<DoubleV, double> : Identity<DoubleV> {};
template <>
struct Convert<DoubleV, float> {
  using Raw = Vector<float, kDoubleLanes>;
  static RST_INLINE DoubleV widen(Raw raw) { return to_double(raw); }
};
template <>
struct Convert<DoubleV, BFloat16> {
  using Raw = Vector<uint16_t, kDoubleLanes>;
  static RST_INLINE DoubleV widen(Raw raw) {
    return to_double(reinterpret<Vector<float, kDoubleLanes>>(zero_extend(raw) << 16));
  }
};
template <>
struct Convert<DoubleV, Half> {
  using Raw = Vector<uint16_t, kDoubleLanes>;
  static RST_INLINE DoubleV widen(Raw raw) { return to_double(half_to_float(raw)); }
};

// bfloat16 in a Twin: elements of even index in a, of odd index in b, which takes no shuffle.
template <>
struct Convert<Twin, BFloat16> {
  using Raw = Vector<uint16_t, 2 * kFloatLanes>;
  static RST_INLINE Twin widen(Raw raw) {
    const UintV bits = reinterpret<UintV>(raw);
    return {from_bits(bits << 16), from_bits(bits & 0xffff0000u)};
  }
  // The upper halves, side by side: a shift and a blend, where a shift, a mask and an or would be one operation more.
  static RST_INLINE Raw join(UintV even, UintV odd) {
    return blend_neighbours(reinterpret<Raw>(even >> 16), reinterpret<Raw>(odd));
  }
  static RST_INLINE FloatV quiet(FloatV x) { return x == x ? x : from_bits(UintV{} + 0x7fc00000u); }
  static RST_INLINE Raw narrow(Twin v) { return narrow_own({quiet(v.a), quiet(v.b)}); }
  // Nearest even, as torch rounds: up if the lower half is above its middle, or if it is the middle and the upper half
  // is odd. Done on all 16-bit halves at once. What was computed only from bfloat16 has no NaN with anything in its
  // lower half, which rounding would carry on.
  static RST_INLINE Raw narrow_own(Twin v) {
    const Raw upper = truncate(v),
              lower = blend_neighbours(reinterpret<Raw>(v.a), reinterpret<Raw>(to_bits(v.b) << 16));
    return upper + (minus_saturated(lower, ~upper & 1) >> 15);
  }
  static RST_INLINE Raw truncate(Twin v) { return join(to_bits(v.a), to_bits(v.b)); }
};
// float16 in a Twin: the first elements in a, the rest in b.
template <>
struct Convert<Twin, Half> {
  using Raw = Pair<Vector<uint16_t, kFloatLanes>>;
  static RST_INLINE Twin widen(Raw raw) { return {half_to_float(raw.a), half_to_float(raw.b)}; }
  static RST_INLINE Raw narrow(Twin v) { return {float_to_half(v.a), float_to_half(v.b)}; }
  static RST_INLINE Raw truncate(Twin v) { return narrow(v); }
  static RST_INLINE Raw narrow_own(Twin v) { return narrow(v); }
};

// fp32 state beside T in a Twin: in the order that Convert<Twin, T> has.
template <class T>
struct Beside;
template <>
struct Beside<Half> {
  static RST_INLINE Twin arrange(Twin v) { return v; }
  static RST_INLINE Twin restore(Twin v) { return v; }
};
template <>
struct Beside<BFloat16> {
#if RST_SIMD_LEVEL == 2
  static RST_INLINE Twin arrange(Twin v) {
    return {__builtin_shufflevector(v.a, v.b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
            __builtin_shufflevector(v.a, v.b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
  }
  static RST_INLINE Twin restore(Twin v) {
    return {__builtin_shufflevector(v.a, v.b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
            __builtin_shufflevector(v.a, v.b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
  }
#elif RST_SIMD_LEVEL == 1
  static RST_INLINE Twin arrange(Twin v) {
    return {__builtin_shufflevector(v.a, v.b, 0, 2, 4, 6, 8, 10, 12, 14),
            __builtin_shufflevector(v.a, v.b, 1, 3, 5, 7, 9, 11, 13, 15)};
  }
  static RST_INLINE Twin restore(Twin v) {
    return {__builtin_shufflevector(v.a, v.b, 0, 8, 1, 9, 2, 10, 3, 11),
            __builtin_shufflevector(v.a, v.b, 4, 12, 5, 13, 6, 14, 7, 15)};
  }
#else
  static RST_INLINE Twin arrange(Twin v) {
    return {__builtin_shufflevector(v.a, v.b, 0, 2, 4, 6), __builtin_shufflevector(v.a, v.b, 1, 3, 5, 7)};
  }
  static RST_INLINE Twin restore(Twin v) {
    return {__builtin_shufflevector(v.a, v.b, 0, 4, 1, 5), __builtin_shufflevector(v.a, v.b, 2, 6, 3, 7)};
  }
#endif
};
// An fp32 companion of T, as a format of its own.
template <class T>
struct Float32Beside {
  float value;
};
template <class T>
struct Convert<Twin, Float32Beside<T>> {
  using Raw = Twin;
  static RST_INLINE Twin widen(Raw raw) { return Beside<T>::arrange(raw); }
  static RST_INLINE Raw narrow(Twin v) { return Beside<T>::restore(v); }
};

// A bfloat16 companion of T: in the order that Convert<Twin, T> has.
template <class T>
struct BFloat16Beside {
  uint16_t bits;
};
template <>
struct Convert<Twin, BFloat16Beside<BFloat16>> : Convert<Twin, BFloat16> {};
template <>
struct Convert<Twin, BFloat16Beside<Half>> {
  using Upper = Vector<uint16_t, kFloatLanes>;
  using Raw = Pair<Upper>;
  static RST_INLINE Twin widen(Raw raw) {
    return {from_bits(__builtin_convertvector(raw.a, UintV) << 16),
            from_bits(__builtin_convertvector(raw.b, UintV) << 16)};
  }
  static RST_INLINE Raw truncate(Twin v) {
    return {__builtin_convertvector(to_bits(v.a) >> 16, Upper), __builtin_convertvector(to_bits(v.b) >> 16, Upper)};
  }
};

// The first bytes of a vector: those that are missing are read as zero and not written.
#if RST_SIMD_LEVEL == 2
RST_INLINE __mmask64 first_bytes(size_t count) {
  const __mmask64 all = ~__mmask64{0};
  return count < 64 ? ~(all << count) : all;
}
#endif
template <class V>
RST_INLINE V load_some(const void* p, size_t bytes) {
#if RST_SIMD_LEVEL == 2
  if constexpr (sizeof(V) == 64) {
    return reinterpret<V>(_mm512_maskz_loadu_epi8(first_bytes(bytes), p));
  } else if constexpr (sizeof(V) == 32) {
    return reinterpret<V>(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(first_bytes(bytes)), p));
  }
#endif
  V v{};
  std::memcpy(&v, p, bytes);
  return v;
}
template <class V>
RST_INLINE void store_some(void* p, V v, size_t bytes) {
#if RST_SIMD_LEVEL == 2
  if constexpr (sizeof(V) == 64) {
    return _mm512_mask_storeu_epi8(p, first_bytes(bytes), reinterpret<__m512i>(v));
  } else if constexpr (sizeof(V) == 32) {
    return _mm256_mask_storeu_epi8(p, static_cast<__mmask32>(first_bytes(bytes)), reinterpret<__m256i>(v));
  }
#endif
  std::memcpy(p, &v, bytes);
}

// Exchanges the two halves of every (real, imaginary) pair.
template <class V>
RST_INLINE V swap_pairs(V v) {
  V r{};
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) r[i] = v[i ^ 1];
  return r;
}

}  // namespace rst
