// Updates whose first state is bfloat16, and rounded stochastically: see update.cu.
#include "cuda/kernels.h"
#include "cuda/update.cuh"

namespace rst::cuda {

#define RST_UPDATE(name, Rule, states, T, mixing, master)                                  \
  RST_KERNEL(rst_##name, (rounding_blocks<states, T, mixing, Master::master>()),           \
             RoundingUpdateArgs<rst::Rule, states, Master::master == Master::Remainder>) { \
    update<rst::Rule, states, T, mixing, Master::master>(args);                            \
  }
#define RST_BOTH(name, Rule, states, T, master)    \
  RST_UPDATE(name, Rule, states, T, false, master) \
  RST_UPDATE(name##_mixing, Rule, states, T, true, master)
#define RST_ALL_0(...)
#define RST_ALL_1(Rule, states, op, suffix)                                                  \
  RST_BOTH(op##_step_float32_rounding##suffix, Rule, states, float, None)                    \
  RST_BOTH(op##_step_bfloat16_rounding##suffix, Rule, states, BFloat16, None)                \
  RST_BOTH(op##_step_bfloat16_master_rounding##suffix, Rule, states, BFloat16, Copy)         \
  RST_BOTH(op##_step_bfloat16_remainder_rounding##suffix, Rule, states, BFloat16, Remainder) \
  RST_BOTH(op##_step_float16_master_rounding##suffix, Rule, states, Half, Copy)
#define RST_ALL_2 RST_ALL_1
#define RST_ALL_3 RST_ALL_1
#define RST_ALL(Rule, states, op, suffix) RST_ALL_##states(Rule, states, op, suffix)

RST_RULE_VARIANTS(RST_ALL)

#define RST_OF(name, ...) RST_ENTRY(rst_##name, RoundingUpdateArgs<rst::__VA_ARGS__>)
// clang-format off
#define RST_PLAIN(name, ...) {{RST_OF(name, __VA_ARGS__), {}, {}}, {RST_OF(name##_mixing, __VA_ARGS__), {}, {}}}
#define RST_MASTER(name, ...) {{{}, RST_OF(name, __VA_ARGS__), {}}, {{}, RST_OF(name##_mixing, __VA_ARGS__), {}}}
#define RST_ALL_THREE(name, master, remainder, ...) \
  {{RST_OF(name, __VA_ARGS__), RST_OF(master, __VA_ARGS__), RST_OF(remainder, __VA_ARGS__, true)}, \
   {RST_OF(name##_mixing, __VA_ARGS__), RST_OF(master##_mixing, __VA_ARGS__), \
    RST_OF(remainder##_mixing, __VA_ARGS__, true)}}
#define RST_ROWS_0(...) {},
#define RST_ROWS_1(Rule, states, op, suffix)                                                                       \
  {RST_PLAIN(op##_step_float32_rounding##suffix, Rule, states),                                                    \
   {},                                                                                                             \
   RST_ALL_THREE(op##_step_bfloat16_rounding##suffix, op##_step_bfloat16_master_rounding##suffix,                  \
                 op##_step_bfloat16_remainder_rounding##suffix, Rule, states),                                     \
   RST_MASTER(op##_step_float16_master_rounding##suffix, Rule, states)},
#define RST_ROWS_2 RST_ROWS_1
#define RST_ROWS_3 RST_ROWS_1
#define RST_ROWS(Rule, states, op, suffix) RST_ROWS_##states(Rule, states, op, suffix)
// clang-format on

const GpuKernel update_rounding_kernels[kRuleVariants][kDTypes][2][kMasters] = {RST_RULE_VARIANTS(RST_ROWS)};

}  // namespace rst::cuda
