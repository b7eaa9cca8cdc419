// The parameters of an op that CPU and CUDA kernels share.
#pragma once

#include <cstdint>

#include "core/chunk_table.h"
#include "math/rules/all.h"

namespace rst {

// What grad_norm leaves behind, as doubles: the norm, 1 / (norm + eps) or 0, whether the norm was not finite, how many
// calls so far had such a norm, room for GPU kernels to count their blocks in, and the sum of squares.
enum Stat : int { kNorm, kInverse, kNonFinite, kNonFiniteCount, kTicket, kSquaredNorm, kStats };

RST_HD void write_stats(double sum_of_squares, double* stats) {
  const NormFinish finish = NormFinish::of(sum_of_squares);
  stats[kNorm] = finish.norm;
  stats[kInverse] = finish.inverse;
  stats[kNonFinite] = finish.non_finite;
  stats[kNonFiniteCount] += finish.non_finite;
  stats[kSquaredNorm] = sum_of_squares;
}

// The norm over parts, whose sums of squares are added in their order.
RST_HD void finish_norm(const double* squares, int64_t count, double* stats) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += squares[i];
  write_stats(sum, stats);
}

// Parameters of an op that are in device memory; what is null is taken from the OpParams.
struct DeviceScalars {
  const double* hyperparams = nullptr;  // or rho, or gamma
  const double* steps = nullptr;        // of a rule that counts steps
  const int64_t* rng = nullptr;         // seed and step
  const float* grad_scale = nullptr;    // of AMP
  const float* found_inf = nullptr;
};

// Values that are the same for all tensors of a call: those that GPU kernels are given too.
struct CommonParams {
  DeviceScalars on_device;  // for GPU kernels
  double* stats = nullptr;  // of grad_norm, which writes them, and perturb, which reads them
  double eta = 0;
  double grad_multiplier = 1;  // -1 to maximize; divided by the gradient scale of AMP
  uint64_t seed = 0, step = 0;
  bool stochastic = false;
  bool flag = false;  // of the rule: nesterov, or decoupled
};

// All of them.
struct OpParams : CommonParams {
  bool adaptive = false;
  bool restoring = true;                // updates read w from the backup, where there is one
  const double* rhos = nullptr;         // perturb, per row
  const double* gammas = nullptr;       // restore with mixing: per row
  int rule = 0;                         // of an update: a RuleIndex
  const double* hyperparams = nullptr;  // kRuleInfos[rule].columns for each row
  const double* steps = nullptr;        // of a rule that counts steps: per row
};

// Among RST_RULE_VARIANTS, the one with the state tensors that `tensor` has.
inline int variant_of(int rule, const Tensor& tensor) {
  const RuleInfo& info = kRuleInfos[rule];
  const bool has_last = info.most_states > info.fewest_states && tensor.has(kState0 + info.fewest_states);
  return info.first_variant + has_last;
}

}  // namespace rst
