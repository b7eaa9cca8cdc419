// The registered ops of all base optimizers, for both bindings: from the schema of a rule (rst_fused/_schemas.py) to
// one struct that is the same for all of them.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <utility>

#include "core/params.h"
#include "torch/tensor_lists.h"

namespace rst {

struct StepArgs {
  const char* op;
  const RuleInfo& rule;
  const TensorList &params, &grads, &backups, &first_grads;
  std::array<const TensorList*, kStates> states;  // null: the rule has fewer
  const TensorList& masters;
  const StableTensor& hyperparams;
  const StableTensor* steps;  // null: the rule does not count them
  const Sizes& group_sizes;
  bool flag, maximize;
  const OptionalTensor &grad_scale, &found_inf;

  void check_lengths() const {
    check_length(op, "grads", grads.size(), params.size());
    for (int s = 0; s < rule.fewest_states; ++s) {
      check_length(op, rule.state_names[s], states[s]->size(), params.size());
    }
  }
  Companions lists() const {
    Companions lists{{kParam, "params", params, true},
                     {kGrad, "grads", grads, false},
                     {kBackup, "backups", backups_or_none(backups, masters), false},
                     {kFirstGrad, "first_grads", first_grads, false}};
    for (int s = 0; s < rule.most_states; ++s) {
      lists.push_back({static_cast<Operand>(kState0 + s), rule.state_names[s], *states[s], true});
    }
    lists.push_back({kMaster, "masters", masters, true});
    return lists;
  }
  // Rows of rule.row_size() numbers. Null: those numbers are not read here.
  std::vector<double> rows(const double* hyperparams, const double* steps) const {
    const size_t columns = rule.columns, size = rule.row_size();
    std::vector<double> rows(group_sizes.size() * size);
    for (size_t r = 0; r < group_sizes.size(); ++r) {
      if (hyperparams != nullptr) std::copy_n(hyperparams + r * columns, columns, &rows[r * size]);
      if (steps != nullptr) rows[r * size + columns] = steps[r];
    }
    return rows;
  }
};

template <class T, size_t>
struct Repeat {
  using type = T;
};

// `run` has the signature of the rule's restore_<name>_step_, run_without_restore that of its <name>_step_. Both call
// update(StepArgs).
template <class Rule, RuleIndex index, void (*update)(const StepArgs&),
          class = std::make_index_sequence<Rule::kMostStates>, class = std::make_index_sequence<Rule::kCountsSteps>,
          class = std::make_index_sequence<Rule::kHasFlag>>
struct StepOp;

template <class Rule, RuleIndex index, void (*update)(const StepArgs&), size_t... State, size_t... Count,
          size_t... Flag>
struct StepOp<Rule, index, update, std::index_sequence<State...>, std::index_sequence<Count...>,
              std::index_sequence<Flag...>> {
  static void run(TensorList params, TensorList grads, TensorList backups, TensorList first_grads,
                  typename Repeat<TensorList, State>::type... states, TensorList masters, StableTensor hyperparams,
                  typename Repeat<StableTensor, Count>::type... steps, Sizes group_sizes,
                  typename Repeat<bool, Flag>::type... flag, bool maximize, OptionalTensor grad_scale,
                  OptionalTensor found_inf) {
    const StableTensor* counts = nullptr;
    ((counts = &steps), ...);
    update({kRuleInfos[index].restore_step_op,
            kRuleInfos[index],
            params,
            grads,
            backups,
            first_grads,
            {&states...},
            masters,
            hyperparams,
            counts,
            group_sizes,
            (flag || ... || false),
            maximize,
            grad_scale,
            found_inf});
  }
  static void run_without_restore(TensorList params, TensorList grads,
                                  typename Repeat<TensorList, State>::type... states, TensorList masters,
                                  StableTensor hyperparams, typename Repeat<StableTensor, Count>::type... steps,
                                  Sizes group_sizes, typename Repeat<bool, Flag>::type... flag, bool maximize,
                                  OptionalTensor grad_scale, OptionalTensor found_inf) {
    const StableTensor* counts = nullptr;
    ((counts = &steps), ...);
    update({kRuleInfos[index].step_op,
            kRuleInfos[index],
            params,
            grads,
            kNoTensors,
            kNoTensors,
            {&states...},
            masters,
            hyperparams,
            counts,
            group_sizes,
            (flag || ... || false),
            maximize,
            grad_scale,
            found_inf});
  }
};

// Registers both ops of every rule.
#define RST_IMPL_STEP(Rule, name)                                                            \
  m.impl(#name "_step_", TORCH_BOX((&StepOp<Rule, k##Rule, &update>::run_without_restore))); \
  m.impl("restore_" #name "_step_", TORCH_BOX((&StepOp<Rule, k##Rule, &update>::run)));

}  // namespace rst
