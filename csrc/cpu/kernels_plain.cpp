#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define RST_SIMD_LEVEL 0
#define CPU_CAPABILITY plain
#include "cpu/instantiate.h"

namespace rst {

const KernelTable& plain_kernels() {
  static const KernelTable table = plain::build_kernel_table("plain");
  return table;
}

}  // namespace rst
