// The parameters of an op that CPU and CUDA kernels share.
#pragma once

#include <cstdint>

#include "math/sam_math.h"

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

struct SgdRow {
  double lr, momentum, dampening, weight_decay, gamma;
};
struct AdamRow {
  double lr, beta1, beta2, eps, weight_decay, gamma, step;
};

// Values that are the same for all tensors of a call.
struct OpParams {
  bool adaptive = false, stochastic = false, nesterov = false, decoupled = false;
  bool restoring = true;  // updates read w from the backup, where there is one
  double eta = 0;
  double grad_multiplier = 1;      // -1 to maximize; divided by the gradient scale of AMP
  const double* scales = nullptr;  // perturb, per row: rho / (norm + eps) on the CPU, rho on a GPU
  const double* gammas = nullptr;  // restore with mixing: per row
  const SgdRow* sgd = nullptr;
  const AdamRow* adam = nullptr;
  uint64_t seed = 0, step = 0;
};

}  // namespace rst
