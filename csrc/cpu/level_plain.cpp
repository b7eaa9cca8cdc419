#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#define RST_SIMD_LEVEL 0
#define RST_LEVEL plain
#include "cpu/level.h"

namespace rst {

const KernelTable& plain_kernels() {
  static const KernelTable table = plain::make_table("plain");
  return table;
}

}  // namespace rst
