// Every base optimizer. A rule is a struct with the columns of its hyperparameters (gamma last), the names of its state
// tensors, of which the last may be absent (a variant of its own), and a Step, which holds what it prepares from a row
// of hyperparameters and the whole recipe: operator()(w, g, state) returns the new w.
#pragma once

#include "math/rules/adam.h"
#include "math/rules/lion.h"
#include "math/rules/sgd.h"

// X(rule, name): in the order of the indices by which launch plans choose one.
#define RST_RULES(X) \
  X(Sgd, sgd)        \
  X(Adam, adam)      \
  X(Lion, lion)

// X(rule, states, name, suffix): kernels with so many state tensors, and what their names end in.
#define RST_RULE_VARIANTS(X) \
  X(Sgd, 0, sgd, )           \
  X(Sgd, 1, sgd, _momentum)  \
  X(Adam, 2, adam, )         \
  X(Adam, 3, adam, _amsgrad) \
  X(Lion, 1, lion, )

namespace rst {

#define RST_RULE_INDEX(Rule, name) k##Rule,
enum RuleIndex : int { RST_RULES(RST_RULE_INDEX) kRules };
#undef RST_RULE_INDEX

// The number of variants of all rules before this one.
#define RST_IS_BEFORE(Rule, ...) +(k##Rule < rule)
constexpr int variants_before(int rule) { return 0 RST_RULE_VARIANTS(RST_IS_BEFORE); }
#undef RST_IS_BEFORE
constexpr int kRuleVariants = variants_before(kRules);
#define RST_STATES(Rule, name) +(Rule::kMostStates - Rule::kFewestStates + 1)
static_assert(kRuleVariants == 0 RST_RULES(RST_STATES), "RST_RULE_VARIANTS lists every number of states of every rule");
#undef RST_STATES

struct RuleInfo {
  int index;
  const char* op;
  int columns;  // of hyperparameters
  int fewest_states, most_states;
  bool counts_steps, has_flag;
  const char* const* state_names;
  int first_variant;  // among RST_RULE_VARIANTS
};

#define RST_RULE_INFO(Rule, name) \
  {k##Rule,                       \
   "restore_" #name "_step_",     \
   Rule::kColumns,                \
   Rule::kFewestStates,           \
   Rule::kMostStates,             \
   Rule::kCountsSteps,            \
   Rule::kHasFlag,                \
   Rule::kStateNames,             \
   variants_before(k##Rule)},
constexpr RuleInfo kRuleInfos[] = {RST_RULES(RST_RULE_INFO)};
#undef RST_RULE_INFO

// The most doubles in a row of hyperparameters.
constexpr int longest_row() {
  int longest = 0;
  for (const RuleInfo& info : kRuleInfos) longest = info.columns > longest ? info.columns : longest;
  return longest;
}

}  // namespace rst
