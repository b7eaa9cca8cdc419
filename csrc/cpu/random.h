// The random bits of stochastic rounding, for one vector of elements after another.
#pragma once

#include "cpu/weights.h"

namespace rst::CPU_CAPABILITY {

// Those of the pairs of neighbours in `bits`, in order, one element to a lane: where Convert<Twin, T> has that element.
template <class T>
RST_INLINE Pair<UintV> bits_of_elements(UintV bits) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {bits & 0xffffu, bits >> 16};
  } else {
    Vector<uint16_t, kFloatLanes> first, second;
    std::memcpy(&first, &bits, sizeof(first));
    std::memcpy(&second, reinterpret_cast<const char*>(&bits) + sizeof(first), sizeof(second));
    return {__builtin_convertvector(first, UintV), __builtin_convertvector(second, UintV)};
  }
}

// Of elements that follow one another in the whole tensor, within one block. The first one is at `position`.
struct BitsOfStretch {
  RandomBits random{0};
  UintV place{};     // of the pairs that come next
  bool odd = false;  // the first one is at an odd position, so that neighbours here are not those that share bits

  static RST_INLINE BitsOfStretch of(RandomBits random, uint64_t position) {
    BitsOfStretch bits{random, {}, position % 2 != 0};
    for (int k = 0; k < kFloatLanes; ++k) bits.place[k] = static_cast<uint32_t>(position) / 2 + k;
    bits.place = RandomBits::place(bits.place);
    return bits;
  }
  // Of the next Twin. for_each_vector begins at even elements, one vector after another.
  RST_INLINE UintV next(int lanes) {
    UintV bits = random.at(place);
    if (odd) bits = bits >> 16 | random.at(place + RandomBits::place(1u)) << 16;
    place += RandomBits::place(static_cast<uint32_t>(lanes / 2));
    return bits;
  }
};

// Calls run(piece, random, position) for one stretch of elements after another that follow one another in the whole
// tensor. `index`: of the tensor, for its random bits.
template <class Run>
RST_INLINE void for_each_stretch(const ChunkArgs& c, uint64_t index, Run run) {
  const Shard& shard = c.tensor->shard;
  const uint32_t key = RandomBits::key_of_tensor(c.key, index);
  if (shard.in_one_stretch(c.begin, c.count)) {
    const uint64_t position = static_cast<uint64_t>(shard.offset) + static_cast<uint64_t>(c.begin);
    return run(c, RandomBits::of(key, position >> 32), position);
  }
  ChunkArgs piece = c;
  for (int64_t done = 0; done < c.count; done += piece.count) {
    const uint64_t position = shard.position(c.begin + done);
    const int64_t together = shard.together(c.begin + done), left = c.count - done;
    piece.count = together < left ? together : left;
    for (int s = 0; s < kOperands; ++s) {
      if (c.data[s] == nullptr) continue;
      piece.data[s] = static_cast<char*>(c.data[s]) + done * size_of(c.tensor->dtype_of(s));
      if (c.source == c.data[s]) piece.source = piece.data[s];
    }
    run(piece, RandomBits::of(key, position >> 32), position);
  }
}

}  // namespace rst::CPU_CAPABILITY
