// The registered ops of all base optimizers: from the schema of a rule (rst_fused/_schemas.py) to one struct that is
// the same for all of them.
#pragma once

#include <torch/csrc/stable/library.h>

#include "core/params.h"
#include "torch/tensor_lists.h"

namespace rst {

struct StepArgs {
  const RuleInfo& rule;
  TensorList params{}, grads{}, backups{}, first_grads{}, states[kStates]{}, masters{};
  StableTensor hyperparams{}, steps{};  // steps: where the rule counts them
  Sizes group_sizes{};
  bool flag = false, maximize = false;
  OptionalTensor grad_scale{}, found_inf{}, rng{};
  Sizes indices{}, shards{};

  Companions lists() const {
    Companions lists{{kParam, "params", params, true},
                     {kGrad, "grads", grads, false, true},
                     {kBackup, "backups", backups_or_none(backups, masters), false},
                     {kFirstGrad, "first_grads", first_grads, false}};
    for (int s = 0; s < rule.most_states; ++s) {
      lists.push_back({static_cast<Operand>(kState0 + s), rule.state_names[s], states[s], true, s < rule.fewest_states,
                       s == 0 && rng.has_value()});
    }
    lists.push_back({kMaster, "masters", masters, true});
    return lists;
  }
};

// The next arguments of a call; what they refer to belongs to `values` from here on.
template <class... T>
void take(StableIValue*& stack, T&... values) {
  ((values = torch::stable::detail::to<T>(*stack++)), ...);
}

// The kernel of restore_<name>_step_, as TORCH_BOX would make it for one rule: it takes all arguments before anything
// can throw.
template <RuleIndex index, void (*update)(const StepArgs&)>
void step(StableIValue* stack, uint64_t given, uint64_t) {
  constexpr const RuleInfo& rule = kRuleInfos[index];
  constexpr uint64_t expected = 13 + rule.most_states + rule.counts_steps + rule.has_flag;
  StepArgs args{rule};
  STD_TORCH_CHECK(given == expected, "rst_fused::", rule.op, " was given ", given, " arguments, expected ", expected);
  take(stack, args.params, args.grads, args.backups, args.first_grads);
  for (int s = 0; s < rule.most_states; ++s) take(stack, args.states[s]);
  take(stack, args.masters, args.hyperparams);
  if (rule.counts_steps) take(stack, args.steps);
  take(stack, args.group_sizes);
  if (rule.has_flag) take(stack, args.flag);
  take(stack, args.maximize, args.grad_scale, args.found_inf, args.rng, args.indices, args.shards);
  update(args);
}

}  // namespace rst
