// Instantiates all kernels for one SIMD level. A level's .cpp includes cpu/standard_headers.h, sets RST_SIMD_LEVEL
// and CPU_CAPABILITY, switches the compiler's target and includes this file. Everything that depends on the level is in
// namespace rst::CPU_CAPABILITY, so that the linker can never pick code made for a newer processor on an older one.
#pragma once

#include "cpu/grad_norm.h"
#include "cpu/perturb.h"
#include "cpu/restore.h"
#include "cpu/update.h"

namespace rst::CPU_CAPABILITY {

template <class Rule, int States, class T, Master master>
inline void fill_update(Kernel (&update)[2][kMasters], Kernel (&rounding)[2][kMasters]) {
  constexpr int m = static_cast<int>(master);
  update[0][m] = update_chunk<Rule, States, T, false, master, false>;
  update[1][m] = update_chunk<Rule, States, T, true, master, false>;
  if constexpr (States > 0 && (master != Master::None || std::is_same_v<T, float> || std::is_same_v<T, BFloat16>)) {
    rounding[0][m] = update_chunk<Rule, States, T, false, master, true>;
    rounding[1][m] = update_chunk<Rule, States, T, true, master, true>;
  }
}

// What depends on where the weights are.
template <class T, Master master>
inline void fill_with(KernelTable& table, int d) {
  constexpr int m = static_cast<int>(master);
  table.grad_norm[d][0][m] = grad_norm_chunk<T, false, Master::None>;
  table.grad_norm[d][1][m] = grad_norm_chunk<T, true, master>;
  table.perturb[d][0][m] = perturb_chunk<T, false, master>;
  table.perturb[d][1][m] = perturb_chunk<T, true, master>;
  int variant = 0;
#define RST_FILL(Rule, states, ...)                                                                  \
  fill_update<Rule, states, T, master>(table.update[variant][d], table.update_rounding[variant][d]); \
  ++variant;
  RST_RULE_VARIANTS(RST_FILL)
#undef RST_FILL
}

template <class T>
inline void fill(KernelTable& table, DType dtype) {
  const int d = static_cast<int>(dtype);
  table.backup[d] = backup_chunk<T>;
  table.restore[d][0] = restore_chunk<T, false>;
  table.mix[d] = mix_chunk<T>;
  fill_with<T, Master::None>(table, d);
  if constexpr (sizeof(T) == 2) {
    fill_with<T, Master::Copy>(table, d);
    table.restore[d][1] = restore_chunk<T, true>;
  }
  if constexpr (std::is_same_v<T, BFloat16>) fill_with<T, Master::Remainder>(table, d);
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
