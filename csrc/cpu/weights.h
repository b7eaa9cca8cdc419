// Where the weights of a parameter are read and written: in its own dtype, in an fp32 master copy, or in bfloat16 and a
// remainder.
#pragma once

#include "cpu/multi_tensor_apply.h"

namespace rst::CPU_CAPABILITY {

// The format of a parameter's state: its own, or fp32 beside a master.
template <class T, Master master>
using State = std::conditional_t<master == Master::None, T, Float32Beside<T>>;

// bfloat16 and remainders side by side.
template <class V>
struct Joined;
template <>
struct Joined<Twin> {
  using Format = Convert<Twin, BFloat16>;
  using Raw = Format::Raw;
  using Each = Remainder<FloatV, UintV>;
  static RST_INLINE Twin join(Raw upper, Raw lower) {
    const UintV b = reinterpret<UintV>(upper), r = reinterpret<UintV>(lower);
    return {Each::join(b << 16, r & 0xffffu), Each::join(b & 0xffff0000u, r >> 16)};
  }
  static RST_INLINE Pair<Raw> split(Twin w) {
    const Each even = Each::split(w.a), odd = Each::split(w.b);
    return {Format::join(even.upper, odd.upper), Format::join(even.lower << 16, odd.lower << 16)};
  }
};
template <>
struct Joined<DoubleV> {
  using Raw = Convert<DoubleV, BFloat16>::Raw;
  using Floats = Vector<float, kDoubleLanes>;
  static RST_INLINE DoubleV join(Raw upper, Raw lower) {
    const auto bits = zero_extend(upper) << 16;
    return to_double(Remainder<Floats, decltype(bits + bits)>::join(bits, zero_extend(lower)));
  }
};

// `source`: of the weights, beside which `rest` has the master. T is the dtype of the parameter.
template <class V, class T, Master master, class At>
RST_INLINE V load_weights(At at, const void* source, [[maybe_unused]] const void* rest) {
  if constexpr (master == Master::Remainder) {
    return Joined<V>::join(at.template read<T>(source), at.template read<T>(rest));
  } else if constexpr (master == Master::Copy && std::is_same_v<V, DoubleV>) {
    return at.template load<float>(source);  // there is no order beside T to keep
  } else {
    return at.template load<State<T, master>>(source);
  }
}

// To the parameter, and to its master.
template <class T, Master master, Values values, class V, class At>
RST_INLINE void store_weights(At at, void* param, [[maybe_unused]] void* rest, V w) {
  if constexpr (master == Master::Remainder) {
    const auto halves = Joined<V>::split(w);
    at.template put<T>(rest, halves.b);
    at.template write_only<T>(param, halves.a);
  } else {
    if constexpr (master == Master::Copy) at.template store<State<T, master>, Values::Any>(rest, w);
    at.template store_only<T, values>(param, w);
  }
}

}  // namespace rst::CPU_CAPABILITY
