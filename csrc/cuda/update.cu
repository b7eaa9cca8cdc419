#include "cuda/update.cuh"

#include "cuda/kernels.h"

namespace rst::cuda {

#define RST_UPDATE(name, Rule, states, T, mixing, master)                          \
  RST_KERNEL(rst_##name, kUpdateOperands<rst::Rule>, (kUpdateBlocks<states, T>)) { \
    update<rst::Rule, states, T, mixing, master>(args);                            \
  }
#define RST_BOTH(name, Rule, states, T, master)    \
  RST_UPDATE(name, Rule, states, T, false, master) \
  RST_UPDATE(name##_mixing, Rule, states, T, true, master)
#define RST_ALL(Rule, states, op, suffix)                                   \
  RST_BOTH(op##_step_float32##suffix, Rule, states, float, false)           \
  RST_BOTH(op##_step_float64##suffix, Rule, states, double, false)          \
  RST_BOTH(op##_step_bfloat16##suffix, Rule, states, BFloat16, false)       \
  RST_BOTH(op##_step_float16##suffix, Rule, states, Half, false)            \
  RST_BOTH(op##_step_bfloat16_master##suffix, Rule, states, BFloat16, true) \
  RST_BOTH(op##_step_float16_master##suffix, Rule, states, Half, true)

RST_RULE_VARIANTS(RST_ALL)

#define RST_OF(name, Rule) RST_ENTRY(rst_##name, kUpdateOperands<rst::Rule>)
// clang-format off
#define RST_WIDE_ROW(name, Rule) {{RST_OF(name, Rule), {}}, {RST_OF(name##_mixing, Rule), {}}}
#define RST_HALF_ROW(name, master, Rule) \
  {{RST_OF(name, Rule), RST_OF(master, Rule)}, {RST_OF(name##_mixing, Rule), RST_OF(master##_mixing, Rule)}}
#define RST_ROWS(Rule, states, op, suffix)                                                  \
  {RST_WIDE_ROW(op##_step_float32##suffix, Rule),                                           \
   RST_WIDE_ROW(op##_step_float64##suffix, Rule),                                           \
   RST_HALF_ROW(op##_step_bfloat16##suffix, op##_step_bfloat16_master##suffix, Rule),       \
   RST_HALF_ROW(op##_step_float16##suffix, op##_step_float16_master##suffix, Rule)},
// clang-format on

const GpuKernel update_kernels[kRuleVariants][kDTypes][2][2] = {RST_RULE_VARIANTS(RST_ROWS)};

}  // namespace rst::cuda
