// Which SIMD level runs, and how.
#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

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

#if defined(__x86_64__)
// Family 25 is Zen 3 and Zen 4, of which only Zen 4 has AVX-512.
static bool is_zen4() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __builtin_cpu_init();
  if (!__builtin_cpu_is("amd") || !__builtin_cpu_supports("avx512f")) return false;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 8 & 0xf) + (eax >> 20 & 0xff) == 25;
}
#endif

// Null: by the processor.
static std::atomic<const KernelTable*>& chosen() {
  static std::atomic<const KernelTable*> table{nullptr};
  return table;
}

const KernelTable& kernels() {
  static const KernelTable& best = *runnable_kernels().back();
  const KernelTable* const table = chosen().load(std::memory_order_relaxed);
  return table != nullptr ? *table : best;
}

const KernelTable& kernels_from_memory() {
#if defined(__x86_64__)
  static const bool halves = is_zen4();
  const bool automatic = chosen().load(std::memory_order_relaxed) == nullptr;
  if (halves && automatic && &kernels() == &avx512::kernel_table()) return avx2::kernel_table();
#endif
  return kernels();
}

bool select_kernels(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    chosen().store(nullptr, std::memory_order_relaxed);
    return true;
  }
  for (const KernelTable* table : runnable_kernels()) {
    if (std::strcmp(table->name, name) == 0) {
      chosen().store(table, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace rst
