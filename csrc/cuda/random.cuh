// Stochastic rounding: the random bits of the elements of a piece, and what is made of them.
#pragma once

#include "cuda/args.h"
#include "cuda/pack.cuh"

namespace rst::cuda {

// That of a tensor, from the seed and the step in the arguments or in device memory.
__device__ __forceinline__ uint32_t random_key(const LaunchParams& c, uint64_t index) {
  const uint64_t seed = c.on_device.rng == nullptr ? c.seed : static_cast<uint64_t>(c.on_device.rng[0]);
  const uint64_t step = c.on_device.rng == nullptr ? c.step : static_cast<uint64_t>(c.on_device.rng[1]);
  return RandomBits::key_of(seed, step, index);
}

template <class T>
__device__ __forceinline__ T stochastic_round(float x, uint32_t random) {
  using Round = StochasticRound<float, uint32_t>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {static_cast<uint16_t>(to_bits(Round::to_bfloat16(x, random)) >> 16)};
  } else {
    return narrow<Half>(Round::to_float16(x, random));
  }
}

// The random bits of elements that follow one another in the whole tensor, the first of them at an even position.
struct BitsOfRun {
  RandomBits random;
  uint32_t first;  // index of the piece's first element within its block of 2^32

  // In the lower halves, one element after another; packs of N start at even ones.
  template <int N>
  struct OfPack {
    RandomBits random;
    uint32_t element, bits;

    __device__ __forceinline__ uint32_t next(int k) {
      if constexpr (N == 1) {
        bits = random(element);
      } else {
        bits = k % 2 == 0 ? random.pair((element + k) >> 1) : bits >> 16;
      }
      return bits;
    }
  };
  template <int N>
  __device__ __forceinline__ OfPack<N> of_pack(int64_t i) const {
    return {random, first + static_cast<uint32_t>(i), 0};
  }
};

// Those of the elements of any shard.
struct BitsOfShard {
  uint32_t key;
  const Shard& shard;
  int64_t begin;  // of the piece

  struct OfPack {
    const Shard& shard;
    uint32_t key;
    uint64_t position;
    int32_t left;  // in the run; no pack reaches the end of a longer one
    uint32_t block;
    RandomBits random;

    static __device__ __forceinline__ int32_t clipped(int64_t count) {
      return count < INT32_MAX ? static_cast<int32_t>(count) : INT32_MAX;
    }
    __device__ __forceinline__ uint32_t next(int) {
      if (left == 0) {
        left = clipped(shard.run);
        position += static_cast<uint64_t>(shard.stride - shard.run);
      }
      if (position >> 32 != block) random = RandomBits::of(key, block = static_cast<uint32_t>(position >> 32));
      --left;
      return random(static_cast<uint32_t>(position++));
    }
  };
  template <int N>
  __device__ __forceinline__ OfPack of_pack(int64_t i) const {
    const uint64_t position = shard.position(begin + i);
    const auto block = static_cast<uint32_t>(position >> 32);
    return {
        shard, key, position, OfPack::clipped(shard.run - (begin + i) % shard.run), block, RandomBits::of(key, block)};
  }
};

}  // namespace rst::cuda
