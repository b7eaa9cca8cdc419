// Where the elements of a shard are in the whole tensor: their random bits are those of these positions.
#pragma once

#include <cstdint>

#include "math/bits.h"

namespace rst {

// Element i is at offset + i / run * stride + i % run: runs of consecutive elements, a stride apart. A whole tensor is
// one run that begins at 0.
struct Shard {
  static constexpr int64_t kEndless = INT64_MAX;
  static constexpr uint64_t kBlock = uint64_t{1} << 32;  // of positions that share a key, see RandomBits
  int64_t offset = 0, run = kEndless, stride = 0;

  RST_HD bool whole(int64_t numel) const { return offset == 0 && run >= numel; }
  RST_HD uint64_t position(int64_t i) const {
    return static_cast<uint64_t>(offset) + static_cast<uint64_t>(i / run) * static_cast<uint64_t>(stride) +
           static_cast<uint64_t>(i % run);
  }
  // Whether elements [i, i + n), of which there are some, are at offset + i and after it, within one block: nearly
  // always, and asked without a division.
  RST_HD bool in_one_stretch(int64_t i, int64_t n) const {
    const uint64_t first = static_cast<uint64_t>(offset) + static_cast<uint64_t>(i);
    return i + n <= run && first / kBlock == (first + static_cast<uint64_t>(n) - 1) / kBlock;
  }
  // How many elements from i on follow one another in the whole tensor, within one block.
  RST_HD int64_t together(int64_t i) const {
    const int64_t in_run = run - i % run;
    const auto in_block = static_cast<int64_t>(kBlock - position(i) % kBlock);
    return in_run < in_block ? in_run : in_block;
  }
};

}  // namespace rst
