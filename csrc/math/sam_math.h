// Every formula of the package, once, for host and device; the base optimizers are in math/rules/.
//
// Each functor works on one value of type V and knows nothing of memory: V is float or double in scalar code
// (CUDA threads, portable CPU code) and a SIMD vector in the CPU kernels. A value type supplies + - * /, construction
// from its scalar, and the free functions fma, sqrt and abs. Multiplications that feed an addition are written as
// fma(), and the build forbids further contraction, so that every implementation rounds at the same layouts.
//
// rst_fused/reference.py holds the same functors under the same names; it is the oracle of the tests.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/bits.h"

namespace rst {

RST_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
RST_HD double fma(double a, double b, double c) { return ::fma(a, b, c); }
RST_HD float sqrt(float a) { return ::sqrtf(a); }
RST_HD double sqrt(double a) { return ::sqrt(a); }
RST_HD float abs(float a) { return ::fabsf(a); }
RST_HD double abs(double a) { return ::fabs(a); }
RST_HD float copysign(float a, float b) { return ::copysignf(a, b); }
RST_HD double copysign(double a, double b) { return ::copysign(a, b); }

RST_HD uint32_t to_bits(float x) { return reinterpret<uint32_t>(x); }
RST_HD float from_bits(uint32_t bits) { return reinterpret<float>(bits); }

RST_HD void assign(float& to, double x) { to = static_cast<float>(x); }
RST_HD void assign(double& to, double x) { to = x; }
// A number that is the same for all elements, in the value type of a kernel.
template <class V>
RST_HD V as(double x) {
  V v;
  assign(v, x);
  return v;
}

// The larger one; NaN if either is, as torch.maximum.
template <class V>
RST_HD V maximum(V a, V b) {
  return (b > a) | (b != b) ? b : a;
}

// 1 or -1; x itself where it is 0 or NaN.
template <class V>
RST_HD V sign(V x) {
  return abs(x) > 0 ? copysign(V{} + 1.0f, x) : x;
}

// T of ASAM (Kwon et al. 2021, arXiv 2102.11600, section 4): T = |w| + eta.
template <class V>
struct AsamScale {
  V eta;
  RST_HD V operator()(V magnitude) const { return magnitude + eta; }
};

// One term of ||g||^2 (SAM, Foret et al. 2021, eq. 2), added to `sum`.
template <class V>
struct SquaredNorm {
  RST_HD V operator()(V g, V sum) const { return fma(g, g, sum); }
};

// One term of ||T g||^2 (ASAM).
template <class V>
struct AsamSquaredNorm {
  RST_HD V operator()(V g, V t, V sum) const {
    V tg = t * g;
    return fma(tg, tg, sum);
  }
};

// The end of a norm: 1 / (norm + eps), or 0 where there is no direction to move in.
struct NormFinish {
  static constexpr double kEps = 1e-12;
  double norm, inverse, non_finite;

  static RST_HD NormFinish of(double sum_of_squares) {
    const double norm = sqrt(sum_of_squares);
    const bool finite = std::isfinite(norm);
    return {norm, finite && norm > 0 ? 1 / (norm + kEps) : 0, finite ? 0.0 : 1.0};
  }
};

// w + e with e = rho * g / ||g||; `scale` is rho / (||g|| + eps), or 0 for a zero or non-finite norm.
template <class V>
struct Perturb {
  V scale;
  RST_HD V operator()(V w, V g) const { return fma(scale, g, w); }
};

// w + e with e = rho * T^2 g / ||T g|| (ASAM).
template <class V>
struct AsamPerturb {
  V scale;
  RST_HD V operator()(V w, V g, V t) const { return fma(scale * (t * t), g, w); }
};

// G-RST (Zhao et al. 2022, arXiv 2203.09962): (1 - gamma) * g1 + gamma * g2. gamma = 1 gives g2 exactly.
template <class V>
struct Mix {
  V gamma, one_minus_gamma;
  static RST_HD Mix of(double gamma) { return {as<V>(gamma), as<V>(1 - gamma)}; }
  RST_HD V operator()(V g1, V g2) const { return fma(gamma, g2, one_minus_gamma * g1); }
};

// A factor that is known to be 1, at no cost.
struct One {};
template <class V>
RST_HD V operator*(One, V x) {
  return x;
}
template <class V>
RST_HD V fma(One, V x, V y) {
  return x + y;
}
RST_HD void assign(One&, double) {}

// What a base optimizer keeps for an element: see math/rules/.
template <class V, int N>
struct States {
  V at[N > 0 ? N : 1];
  RST_HD V& operator[](int i) { return at[i]; }
};

// fp32 weights as bfloat16 and an int16, exactly: their bits are those of b, with zeros below, plus r. b is w rounded
// to nearest, ties away from zero, and r has the lower half of w's bits. A NaN is quiet, and has no remainder. Where
// somebody else has written b, that may be 0 or infinite beside a remainder that leads out of all numbers: then it
// counts alone. V is float and U uint32_t, or vectors of them.
template <class V, class U>
struct Remainder {
  U upper, lower;  // of split: b in the upper half and r in the lower one; the other halves are arbitrary

  static RST_HD Remainder split(V w) {
    const U bits = to_bits(w == w ? w : from_bits(U{} + 0x7fc00000u));
    return {bits + 0x8000u, bits};
  }
  // Here the other halves have to be 0.
  static RST_HD V join(U upper, U lower) {
    const V w = reinterpret<V>(upper + ((lower ^ 0x8000u) - 0x8000u));
    return w == w ? w : reinterpret<V>(upper);
  }
};

// The random bits of stochastic rounding: a pure function of (seed, step), the tensor's index and the element's. Two
// neighbours share 32 of them.
struct RandomBits {
  uint32_t key;

  // Added to the index of a tensor for the bits of its state, so that no weight is rounded by the same ones.
  static constexpr uint64_t kState = uint64_t{1} << 32;

  template <class U>
  static RST_HD U mixed(U x) {  // the finalizer of MurmurHash3 (public domain): full avalanche
    x ^= x >> 16;
    x *= 0x85ebca6bu;
    x ^= x >> 13;
    x *= 0xc2b2ae35u;
    return x ^ (x >> 16);
  }
  static RST_HD uint32_t folded(uint32_t h, uint64_t x) {
    h = mixed(h ^ static_cast<uint32_t>(x)) + 0x9e3779b9u;
    return mixed(h ^ static_cast<uint32_t>(x >> 32)) + 0x9e3779b9u;
  }
  static RST_HD uint32_t key_of(uint64_t seed, uint64_t step, uint64_t tensor) {
    return key_of_tensor(key_of_step(seed, step), tensor);
  }
  // The same in two steps: what all tensors share, and the rest.
  static RST_HD uint32_t key_of_step(uint64_t seed, uint64_t step) { return folded(folded(0u, seed), step); }
  static RST_HD uint32_t key_of_tensor(uint32_t of_step, uint64_t tensor) { return folded(of_step, tensor); }
  // `block` is the element index divided by 2^32, so that tensors beyond 2^32 elements never repeat.
  static RST_HD RandomBits of(uint32_t key, uint64_t block) { return {folded(key, block)}; }
  // For elements 2 * index (the low 16 bits) and 2 * index + 1 (the high ones).
  template <class U>
  RST_HD U pair(U index) const {
    return at(place(index));
  }
  // pair in two steps: place(i + k) = place(i) + place(k).
  template <class U>
  static RST_HD U place(U index) {
    return index * 0x9e3779b9u;
  }
  template <class U>
  RST_HD U at(U place) const {
    return mixed(place ^ key);
  }
  // 16 bits. `element` counts within its block of 2^32.
  template <class U>
  RST_HD U operator()(U element) const {
    return (pair(element >> 1) >> ((element & 1u) << 4)) & 0xffffu;
  }
};

// Stochastic rounding of fp32 to a format that keeps the high bits: adding uniform bits below the cut and truncating
// rounds away from zero with probability equal to the fraction cut off, so the expectation is the value itself.
// `random` holds 16 bits. V is float and U uint32_t, or vectors of them; to_bits and from_bits reinterpret one as the
// other.
template <class V, class U>
struct StochasticRound {
  static RST_HD V to_bfloat16(V x, U random) { return x == x ? own_to_bfloat16(x, random) : x; }
  // For an x whose NaNs have nothing below the cut.
  static RST_HD V own_to_bfloat16(V x, U random) { return from_bits(own_upper_half(x, random) & 0xffff0000u); }
  // The same in the upper half; the lower half is arbitrary.
  static RST_HD U own_upper_half(V x, U random) { return to_bits(x) + random; }
  // Below 2^-14 a float16 has the fixed quantum 2^-24: there x is rounded as 2^-14 + |x|, which has that quantum.
  static RST_HD V to_float16(V x, U random) {
    const V rounded = own_to_float16(x, random);  // first: registers of the GPU's kernels would spill otherwise
    return x == x ? rounded : x;
  }
  // For an x whose NaNs have nothing below the cut.
  static RST_HD V own_to_float16(V x, U random) {
    V magnitude = abs(x);
    V shift = magnitude < 0x1p-14f ? V{} + 0x1p-14f : V{};
    U bits = (to_bits(magnitude + shift) + (random & 0x1fffu)) & 0xffffe000u;
    U sign = to_bits(x) & 0x80000000u;
    return from_bits(to_bits(from_bits(bits) - shift) | sign);
  }
};

}  // namespace rst
