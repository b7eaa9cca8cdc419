// The parameters of an op that CPU and CUDA kernels share.
#pragma once

#include <cstdint>

#include "core/chunk_table.h"
#include "math/rules/all.h"

namespace rst {

// What grad_norm leaves behind, as doubles: the norm, 1 / (norm + eps) or 0, whether the norm was not finite, how many
// calls so far had such a norm, and room for GPU kernels to count their blocks in.
enum Stat : int { kNorm, kInverse, kNonFinite, kNonFiniteCount, kTicket, kStats };

RST_HD void write_stats(double sum_of_squares, double* stats) {
  const NormFinish finish = NormFinish::of(sum_of_squares);
  stats[kNorm] = finish.norm;
  stats[kInverse] = finish.inverse;
  stats[kNonFinite] = finish.non_finite;
  stats[kNonFiniteCount] += finish.non_finite;
}

// Values that are the same for all tensors of a call.
struct OpParams {
  bool adaptive = false, stochastic = false;
  bool restoring = true;  // updates read w from the backup, where there is one
  double eta = 0;
  double grad_multiplier = 1;           // -1 to maximize; divided by the gradient scale of AMP
  const double* scales = nullptr;       // perturb, per row: rho / (norm + eps) on the CPU, rho on a GPU
  const double* gammas = nullptr;       // restore with mixing: per row
  int rule = 0;                         // of an update: a RuleIndex
  bool flag = false;                    // its flag: nesterov, or decoupled
  const double* hyperparams = nullptr;  // kRuleInfos[rule].row_size() for each row
  uint64_t seed = 0, step = 0;
};

// Among RST_RULE_VARIANTS, the one with the state tensors that `tensor` has.
inline int variant_of(int rule, const Tensor& tensor) {
  const RuleInfo& info = kRuleInfos[rule];
  const bool has_last = info.most_states > info.fewest_states && tensor.has(kState0 + info.fewest_states);
  return info.first_variant + has_last;
}

}  // namespace rst
