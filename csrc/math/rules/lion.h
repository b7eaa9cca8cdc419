#pragma once

#include "math/sam_math.h"

namespace rst {

// Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2), with the decay 1 - lr * weight_decay of AdamW.
struct Lion {
  enum Column { kLr, kBeta1, kBeta2, kWeightDecay, kGamma, kColumns };  // as LION_HYPER in rst_fused/_schemas.py
  static constexpr const char* kStateNames[] = {"exp_avgs"};
  static constexpr int kFewestStates = 1, kMostStates = 1;
  static constexpr bool kCountsSteps = false, kHasFlag = false, kHasUnitFactors = false, kDivides = false;

  template <class V>
  struct Step {
    V minus_lr, one_minus_beta1, one_minus_beta2, decay, grad_multiplier;

    template <class Row>
    static RST_HD Step prepare(const Row& row, double grad_multiplier, bool) {
      return {as<V>(-row(kLr)), as<V>(1 - row(kBeta1)), as<V>(1 - row(kBeta2)), as<V>(1 - row(kLr) * row(kWeightDecay)),
              as<V>(grad_multiplier)};
    }
    template <int N>
    RST_HD V operator()(V w, V g, States<V, N>& state) const {
      g = grad_multiplier * g;
      w = decay * w;
      const V m = state[0], c = fma(one_minus_beta1, g - m, m);
      state[0] = fma(one_minus_beta2, g - m, m);
      return fma(minus_lr, sign(c), w);
    }
  };
};

}  // namespace rst
