#include "cuda/update.cuh"

#include "cuda/kernels.h"

namespace rst::cuda {

#define RST_UPDATE(name, Rule, states, T, mixing, master)                                               \
  RST_KERNEL(rst_##name, (update_blocks<states, T, mixing, master>()), UpdateArgs<rst::Rule, states>) { \
    update<rst::Rule, states, T, mixing, master>(args);                                                 \
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

#define RST_OF(name, ...) RST_ENTRY(rst_##name, UpdateArgs<rst::__VA_ARGS__>)
// clang-format off
#define RST_WIDE_ROW(name, ...) {{RST_OF(name, __VA_ARGS__), {}}, {RST_OF(name##_mixing, __VA_ARGS__), {}}}
#define RST_HALF_ROW(name, master, ...) \
  {{RST_OF(name, __VA_ARGS__), RST_OF(master, __VA_ARGS__)}, \
   {RST_OF(name##_mixing, __VA_ARGS__), RST_OF(master##_mixing, __VA_ARGS__)}}
#define RST_ROWS(Rule, states, op, suffix)                                                            \
  {RST_WIDE_ROW(op##_step_float32##suffix, Rule, states),                                             \
   RST_WIDE_ROW(op##_step_float64##suffix, Rule, states),                                             \
   RST_HALF_ROW(op##_step_bfloat16##suffix, op##_step_bfloat16_master##suffix, Rule, states),         \
   RST_HALF_ROW(op##_step_float16##suffix, op##_step_float16_master##suffix, Rule, states)},
// clang-format on

const GpuKernel update_kernels[kRuleVariants][kDTypes][2][2] = {RST_RULE_VARIANTS(RST_ROWS)};

}  // namespace rst::cuda
