// One vector type per SIMD level, as GCC/Clang vector extensions: arithmetic, comparison and ?: come from the
// compiler; only what it cannot express (fma, sqrt, fp16, streaming stores) is written with intrinsics.
//
// RST_SIMD_LEVEL is 0 (plain: 16-byte vectors, any architecture), 1 (AVX2 + FMA + F16C) or 2 (AVX-512 F/BW/DQ/VL).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if RST_SIMD_LEVEL > 0
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed only between functions that are always inlined
#if RST_SIMD_LEVEL == 2
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own _mm512_sqrt_ps
#endif
#endif

#include "cpu/dtypes.h"

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

template <class To, class From>
RST_INLINE To reinterpret(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "reinterpret keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
RST_INLINE UintV to_bits(FloatV x) { return reinterpret<UintV>(x); }
RST_INLINE FloatV from_bits(UintV x) { return reinterpret<FloatV>(x); }

RST_INLINE FloatV abs(FloatV x) { return from_bits(to_bits(x) & 0x7fffffffu); }
RST_INLINE DoubleV abs(DoubleV x) { return x < 0 ? -x : x; }

#if RST_SIMD_LEVEL == 2
RST_INLINE FloatV fma(FloatV a, FloatV b, FloatV c) { return _mm512_fmadd_ps(a, b, c); }
RST_INLINE DoubleV fma(DoubleV a, DoubleV b, DoubleV c) { return _mm512_fmadd_pd(a, b, c); }
RST_INLINE FloatV sqrt(FloatV a) { return _mm512_sqrt_ps(a); }
RST_INLINE DoubleV sqrt(DoubleV a) { return _mm512_sqrt_pd(a); }
RST_INLINE void stream(float* p, FloatV v) { _mm512_stream_ps(p, v); }
RST_INLINE void stream(double* p, DoubleV v) { _mm512_stream_pd(p, v); }
RST_INLINE FloatV half_to_float(Vector<uint16_t, 16> h) { return _mm512_cvtph_ps(reinterpret<__m256i>(h)); }
RST_INLINE Vector<float, 8> half_to_float(Vector<uint16_t, 8> h) { return _mm256_cvtph_ps(reinterpret<__m128i>(h)); }
RST_INLINE UintV zero_extend(Vector<uint16_t, 16> h) { return reinterpret<UintV>(_mm512_cvtepu16_epi32(reinterpret<__m256i>(h))); }
RST_INLINE Vector<uint32_t, 8> zero_extend(Vector<uint16_t, 8> h) {
  return reinterpret<Vector<uint32_t, 8>>(_mm256_cvtepu16_epi32(reinterpret<__m128i>(h)));
}
RST_INLINE Vector<uint16_t, 16> low_halves(UintV x) {
  return reinterpret<Vector<uint16_t, 16>>(_mm512_cvtepi32_epi16(reinterpret<__m512i>(x)));
}
RST_INLINE Vector<uint16_t, 16> float_to_half(FloatV x) {
  return reinterpret<Vector<uint16_t, 16>>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
RST_INLINE void stream(uint16_t* p, Vector<uint16_t, 16> v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret<__m256i>(v));
}
#elif RST_SIMD_LEVEL == 1
RST_INLINE FloatV fma(FloatV a, FloatV b, FloatV c) { return _mm256_fmadd_ps(a, b, c); }
RST_INLINE DoubleV fma(DoubleV a, DoubleV b, DoubleV c) { return _mm256_fmadd_pd(a, b, c); }
RST_INLINE FloatV sqrt(FloatV a) { return _mm256_sqrt_ps(a); }
RST_INLINE DoubleV sqrt(DoubleV a) { return _mm256_sqrt_pd(a); }
RST_INLINE void stream(float* p, FloatV v) { _mm256_stream_ps(p, v); }
RST_INLINE void stream(double* p, DoubleV v) { _mm256_stream_pd(p, v); }
RST_INLINE FloatV half_to_float(Vector<uint16_t, 8> h) { return _mm256_cvtph_ps(reinterpret<__m128i>(h)); }
RST_INLINE Vector<float, 4> half_to_float(Vector<uint16_t, 4> h) {
  return _mm_cvtph_ps(_mm_cvtsi64_si128(reinterpret<int64_t>(h)));
}
RST_INLINE UintV zero_extend(Vector<uint16_t, 8> h) {
  return reinterpret<UintV>(_mm256_cvtepu16_epi32(reinterpret<__m128i>(h)));
}
RST_INLINE Vector<uint32_t, 4> zero_extend(Vector<uint16_t, 4> h) {
  return reinterpret<Vector<uint32_t, 4>>(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(reinterpret<int64_t>(h))));
}
RST_INLINE Vector<uint16_t, 8> low_halves(UintV x) {  // each at most 0xffff, or packus would saturate
  const __m256i v = reinterpret<__m256i>(x);
  return reinterpret<Vector<uint16_t, 8>>(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
RST_INLINE Vector<uint16_t, 8> float_to_half(FloatV x) {
  return reinterpret<Vector<uint16_t, 8>>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
RST_INLINE void stream(uint16_t* p, Vector<uint16_t, 8> v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret<__m128i>(v));
}
#else
template <class V>
RST_INLINE V each_fma(V a, V b, V c) {
  V r;
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) r[i] = std::fma(a[i], b[i], c[i]);
  return r;
}
template <class V>
RST_INLINE V each_sqrt(V a) {
  V r;
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) r[i] = std::sqrt(a[i]);
  return r;
}
RST_INLINE FloatV fma(FloatV a, FloatV b, FloatV c) { return each_fma(a, b, c); }
RST_INLINE DoubleV fma(DoubleV a, DoubleV b, DoubleV c) { return each_fma(a, b, c); }
RST_INLINE FloatV sqrt(FloatV a) { return each_sqrt(a); }
RST_INLINE DoubleV sqrt(DoubleV a) { return each_sqrt(a); }
template <class H>
RST_INLINE auto half_to_float(H h) {
  Vector<float, sizeof(H) / 2> r;
  for (unsigned i = 0; i < sizeof(H) / 2; ++i) r[i] = half_bits_to_float(h[i]);
  return r;
}
RST_INLINE Vector<uint16_t, 4> float_to_half(FloatV x) {
  Vector<uint16_t, 4> r;
  for (int i = 0; i < 4; ++i) r[i] = float_to_half_bits(x[i]);
  return r;
}
template <class H>
RST_INLINE auto zero_extend(H h) {
  return __builtin_convertvector(h, Vector<uint32_t, sizeof(H) / 2>);
}
RST_INLINE Vector<uint16_t, 4> low_halves(UintV x) { return __builtin_convertvector(x, Vector<uint16_t, 4>); }
template <class Scalar, class V>
RST_INLINE void stream(Scalar* p, V v) { std::memcpy(p, &v, sizeof(v)); }
#endif

// Orders the streaming stores of this thread before whatever it publishes next.
RST_INLINE void finish_streaming() {
#if RST_SIMD_LEVEL > 0
  _mm_sfence();
#endif
}

// Nearest even, NaN kept quiet, as torch rounds float32 to bfloat16.
RST_INLINE Vector<uint16_t, kFloatLanes> float_to_bfloat16(FloatV x) {
  UintV bits = to_bits(x);
  UintV rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return low_halves(x == x ? rounded : UintV{} + 0x7fc0u);
}

// Storage format of T in vectors of Lanes elements: T's raw bits, and the conversion to and from arithmetic.
template <class V, class T>
struct Convert;
template <class V>
struct Convert<V, float> {
  static constexpr int kLanes = sizeof(V) / sizeof(V{}[0]);
  using Raw = Vector<float, kLanes>;
  static RST_INLINE V widen(Raw raw) { return __builtin_convertvector(raw, V); }
  static RST_INLINE Raw narrow(V v) { return __builtin_convertvector(v, Raw); }
};
template <>
struct Convert<DoubleV, double> {
  static constexpr int kLanes = kDoubleLanes;
  using Raw = DoubleV;
  static RST_INLINE DoubleV widen(Raw raw) { return raw; }
  static RST_INLINE Raw narrow(DoubleV v) { return v; }
};
template <class V>
struct Convert<V, BFloat16> {
  static constexpr int kLanes = sizeof(V) / sizeof(V{}[0]);
  using Raw = Vector<uint16_t, kLanes>;
  static RST_INLINE V widen(Raw raw) {
    auto bits = zero_extend(raw) << 16;
    return __builtin_convertvector(reinterpret<Vector<float, kLanes>>(bits), V);
  }
  static RST_INLINE Raw narrow(FloatV v) { return float_to_bfloat16(v); }
  // For a v that is a bfloat16 already.
  static RST_INLINE Raw truncate(FloatV v) { return low_halves(to_bits(v) >> 16); }
};
template <class V>
struct Convert<V, Half> {
  static constexpr int kLanes = sizeof(V) / sizeof(V{}[0]);
  using Raw = Vector<uint16_t, kLanes>;
  static RST_INLINE V widen(Raw raw) { return __builtin_convertvector(half_to_float(raw), V); }
  static RST_INLINE Raw narrow(FloatV v) { return float_to_half(v); }
  static RST_INLINE Raw truncate(FloatV v) { return float_to_half(v); }
};

// Exchanges the two halves of every (real, imaginary) pair.
template <class V>
RST_INLINE V swap_pairs(V v) {
  V r;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) r[i] = v[i ^ 1];
  return r;
}

}  // namespace rst
