#include "cuda/update.cuh"

#include "cuda/kernels.h"

namespace rst::cuda {

#define RST_UPDATE(name, Rule, states, T, mixing, master)                          \
  RST_KERNEL(rst_##name, (update_blocks<states, T, mixing, Master::master>()),     \
             UpdateArgs<rst::Rule, states, Master::master == Master::Remainder>) { \
    update<rst::Rule, states, T, mixing, Master::master>(args);                    \
  }
#define RST_BOTH(name, Rule, states, T, master)    \
  RST_UPDATE(name, Rule, states, T, false, master) \
  RST_UPDATE(name##_mixing, Rule, states, T, true, master)
#define RST_ALL(Rule, states, op, suffix)                                           \
  RST_BOTH(op##_step_float32##suffix, Rule, states, float, None)                    \
  RST_BOTH(op##_step_float64##suffix, Rule, states, double, None)                   \
  RST_BOTH(op##_step_bfloat16##suffix, Rule, states, BFloat16, None)                \
  RST_BOTH(op##_step_float16##suffix, Rule, states, Half, None)                     \
  RST_BOTH(op##_step_bfloat16_master##suffix, Rule, states, BFloat16, Copy)         \
  RST_BOTH(op##_step_bfloat16_remainder##suffix, Rule, states, BFloat16, Remainder) \
  RST_BOTH(op##_step_float16_master##suffix, Rule, states, Half, Copy)

RST_RULE_VARIANTS(RST_ALL)

#define RST_OF(name, ...) RST_ENTRY(rst_##name, UpdateArgs<rst::__VA_ARGS__>)
// clang-format off
#define RST_WIDE_ROW(name, ...) {{RST_OF(name, __VA_ARGS__), {}, {}}, {RST_OF(name##_mixing, __VA_ARGS__), {}, {}}}
#define RST_HALF_ROW(name, master, ...) \
  {{RST_OF(name, __VA_ARGS__), RST_OF(master, __VA_ARGS__), {}}, \
   {RST_OF(name##_mixing, __VA_ARGS__), RST_OF(master##_mixing, __VA_ARGS__), {}}}
#define RST_BFLOAT16_ROW(name, master, remainder, ...) \
  {{RST_OF(name, __VA_ARGS__), RST_OF(master, __VA_ARGS__), RST_OF(remainder, __VA_ARGS__, true)}, \
   {RST_OF(name##_mixing, __VA_ARGS__), RST_OF(master##_mixing, __VA_ARGS__), \
    RST_OF(remainder##_mixing, __VA_ARGS__, true)}}
#define RST_ROWS(Rule, states, op, suffix)                                                            \
  {RST_WIDE_ROW(op##_step_float32##suffix, Rule, states),                                             \
   RST_WIDE_ROW(op##_step_float64##suffix, Rule, states),                                             \
   RST_BFLOAT16_ROW(op##_step_bfloat16##suffix, op##_step_bfloat16_master##suffix,                    \
                    op##_step_bfloat16_remainder##suffix, Rule, states),                              \
   RST_HALF_ROW(op##_step_float16##suffix, op##_step_float16_master##suffix, Rule, states)},
// clang-format on

const GpuKernel update_kernels[kRuleVariants][kDTypes][2][kMasters] = {RST_RULE_VARIANTS(RST_ROWS)};

}  // namespace rst::cuda
