#pragma once

#include "math/sam_math.h"

namespace rst {

// Adam (Kingma & Ba 2015) and, decoupled, AdamW (Loshchilov & Hutter 2019), in the form of torch.optim: step_size is
// lr / (1 - beta1^t), bias2_sqrt is sqrt(1 - beta2^t), and the decay is 1 - lr * weight_decay. A third state tensor
// makes it AMSGrad (Reddi et al. 2018).
struct Adam {
  enum Column { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kGamma, kColumns, kStep = kColumns };  // as ADAM_HYPER
  static constexpr const char* kStateNames[] = {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"};
  static constexpr int kFewestStates = 2, kMostStates = 3;
  static constexpr bool kCountsSteps = true, kHasFlag = true, kHasUnitFactors = false, kDivides = true;

  template <class V>
  struct Step {
    V minus_step_size, one_minus_beta1, beta2, one_minus_beta2, bias2_sqrt, eps, weight_decay, decay, grad_multiplier;

    // The step count starts at 1.
    template <class Row>
    static RST_HD Step prepare(const Row& row, double grad_multiplier, bool decoupled) {
      const double lr = row(kLr), beta1 = row(kBeta1), beta2 = row(kBeta2), weight_decay = row(kWeightDecay);
      const double bias1 = 1 - ::pow(beta1, row(kStep)), bias2 = 1 - ::pow(beta2, row(kStep));
      return {as<V>(-lr / bias1),
              as<V>(1 - beta1),
              as<V>(beta2),
              as<V>(1 - beta2),
              as<V>(::sqrt(bias2)),
              as<V>(row(kEps)),
              as<V>(decoupled ? 0 : weight_decay),
              as<V>(decoupled ? 1 - lr * weight_decay : 1),
              as<V>(grad_multiplier)};
    }
    // Whether roots up to 2^-62 vanish beside eps: less than half of its last digit.
    RST_HD bool ignores_small_roots() const { return eps * bias2_sqrt >= 0x1p-36f; }
    template <int N>
    RST_HD V operator()(V w, V g, States<V, N>& state) const {
      g = fma(weight_decay, w, grad_multiplier * g);
      w = decay * w;
      const V m = fma(one_minus_beta1, g - state[0], state[0]);
      const V v = fma(one_minus_beta2 * g, g, beta2 * state[1]);
      state[0] = m;
      state[1] = v;
      V largest = v;
      if constexpr (N > 2) state[2] = largest = maximum(state[2], v);
      const V denominator = sqrt(largest) / bias2_sqrt + eps;
      return w + minus_step_size * m / denominator;
    }
  };
};

}  // namespace rst
