// Which SIMD level runs, and how.
#include <atomic>
#include <cstring>

#include "cpu/kernels.h"

namespace rst {

std::vector<const KernelTable*> runnable_kernels() {
  std::vector<const KernelTable*> found{&plain::kernel_table()};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back(&avx2::kernel_table());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      found.push_back(&avx512::kernel_table());
    }
  }
#endif
  return found;
}

bool needs_prefetching() {
#if defined(__x86_64__)
  static const bool needs = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("intel") != 0;
  }();
  return needs;
#else
  return false;
#endif
}

static std::atomic<const KernelTable*>& chosen() {
  static std::atomic<const KernelTable*> table{runnable_kernels().back()};
  return table;
}

const KernelTable& kernels() { return *chosen().load(std::memory_order_relaxed); }

bool select_kernels(const char* name) {
  for (const KernelTable* table : runnable_kernels()) {
    if (std::strcmp(table->name, name) == 0) {
      chosen().store(table, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace rst
