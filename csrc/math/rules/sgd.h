#pragma once

#include "math/sam_math.h"

namespace rst {

// SGD as torch.optim.SGD: decay, momentum with dampening, Nesterov. Without momentum there is no state.
struct Sgd {
  enum Column { kLr, kMomentum, kDampening, kWeightDecay, kGamma, kColumns };  // as SGD_HYPER in rst_fused/_schemas.py
  static constexpr const char* kStateNames[] = {"momentum_buffers"};
  static constexpr int kFewestStates = 0, kMostStates = 1;
  static constexpr bool kCountsSteps = false, kHasFlag = true, kHasUnitFactors = true, kDivides = false;

  template <class Row>
  static RST_HD bool has_unit_factors(const Row& row, double grad_multiplier) {
    return 1 - row(kDampening) == 1 && grad_multiplier == 1;
  }

  template <class V, class Factor = V>
  struct Step {
    V minus_lr, momentum, weight_decay;
    Factor one_minus_dampening, grad_multiplier;
    bool nesterov;

    template <class Row>
    static RST_HD Step prepare(const Row& row, double grad_multiplier, bool nesterov) {
      return {as<V>(-row(kLr)),
              as<V>(row(kMomentum)),
              as<V>(row(kWeightDecay)),
              as<Factor>(1 - row(kDampening)),
              as<Factor>(grad_multiplier),
              nesterov};
    }
    template <int N>
    RST_HD V operator()(V w, V g, [[maybe_unused]] States<V, N>& state) const {
      V d = fma(weight_decay, w, grad_multiplier * g);
      if constexpr (N > 0) {
        const V buffer = fma(one_minus_dampening, d, momentum * state[0]);
        d = nesterov ? fma(momentum, buffer, d) : buffer;
        state[0] = buffer;
      }
      return fma(minus_lr, d, w);
    }
  };
};

}  // namespace rst
