// Instantiates all kernels for one SIMD level. A level's .cpp includes cpu/standard_headers.h, sets RST_SIMD_LEVEL
// and CPU_CAPABILITY, switches the compiler's target and includes this file. Everything that depends on the level is in
// namespace rst::CPU_CAPABILITY, so that the linker can never pick code made for a newer processor on an older one.
#pragma once

#include "cpu/grad_norm.h"
#include "cpu/perturb.h"
#include "cpu/restore.h"
#include "cpu/update.h"

namespace rst::CPU_CAPABILITY {

template <class Rule, int States, class T>
inline void fill_update(Kernel (&update)[2][2], Kernel (&rounding)[2][2]) {
  update[0][0] = update_chunk<Rule, States, T, false, false, false>;
  update[1][0] = update_chunk<Rule, States, T, true, false, false>;
  if constexpr (sizeof(T) == 2) {
    update[0][1] = update_chunk<Rule, States, T, false, true, false>;
    update[1][1] = update_chunk<Rule, States, T, true, true, false>;
  }
  if constexpr (States > 0) {
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, BFloat16>) {
      rounding[0][0] = update_chunk<Rule, States, T, false, false, true>;
      rounding[1][0] = update_chunk<Rule, States, T, true, false, true>;
    }
    if constexpr (sizeof(T) == 2) {
      rounding[0][1] = update_chunk<Rule, States, T, false, true, true>;
      rounding[1][1] = update_chunk<Rule, States, T, true, true, true>;
    }
  }
}

template <class T>
inline void fill(KernelTable& table, DType dtype) {
  const int d = static_cast<int>(dtype);
  table.grad_norm[d][0][0] = grad_norm_chunk<T, false, false>;
  table.grad_norm[d][1][0] = grad_norm_chunk<T, true, false>;
  table.perturb[d][0][0] = perturb_chunk<T, false, false>;
  table.perturb[d][1][0] = perturb_chunk<T, true, false>;
  table.backup[d] = backup_chunk<T>;
  table.restore[d][0] = restore_chunk<T, false>;
  table.mix[d] = mix_chunk<T>;
  int variant = 0;
#define RST_FILL(Rule, states, ...)                                                          \
  fill_update<Rule, states, T>(table.update[variant][d], table.update_rounding[variant][d]); \
  ++variant;
  RST_RULE_VARIANTS(RST_FILL)
#undef RST_FILL
  if constexpr (sizeof(T) == 2) {
    table.grad_norm[d][0][1] = grad_norm_chunk<T, false, false>;
    table.grad_norm[d][1][1] = grad_norm_chunk<T, true, true>;
    table.perturb[d][0][1] = perturb_chunk<T, false, true>;
    table.perturb[d][1][1] = perturb_chunk<T, true, true>;
    table.restore[d][1] = restore_chunk<T, true>;
  }
}

#define RST_NAME_OF(level) #level
#define RST_NAME(level) RST_NAME_OF(level)
const KernelTable& kernel_table() {
  static const KernelTable all = [] {
    KernelTable table{};
    table.name = RST_NAME(CPU_CAPABILITY);
    fill<float>(table, DType::Float);
    fill<double>(table, DType::Double);
    fill<BFloat16>(table, DType::BFloat16);
    fill<Half>(table, DType::Half);
    return table;
  }();
  return all;
}

}  // namespace rst::CPU_CAPABILITY
