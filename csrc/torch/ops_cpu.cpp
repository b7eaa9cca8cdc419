// The torch binding of the CPU kernels: registered ops (schemas in rst_fused/_schemas.py) that turn lists of tensors
// into a chunk table and run the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/run.h"
#include "torch/step_op.h"
#include "torch/threads.h"

namespace rst {

namespace {

// True where AMP found an overflow: the step is not taken, but the weights are restored.
bool overflowed(const OptionalTensor& found_inf) {
  if (!found_inf.has_value()) return false;
  check_scalars("step", "found_inf", kCpu, *found_inf, ScalarType::Float, 1);
  return *static_cast<const float*>(found_inf->data_ptr()) != 0;
}

double grad_multiplier(bool maximize, const OptionalTensor& grad_scale) {
  double scale = maximize ? -1 : 1;
  if (grad_scale.has_value()) {
    check_scalars("step", "grad_scale", kCpu, *grad_scale, ScalarType::Float, 1);
    scale /= *static_cast<const float*>(grad_scale->data_ptr());
  }
  return scale;
}

const double* hyperparams(const char* op, const char* name, const StableTensor& given, size_t least) {
  check_scalars(op, name, kCpu, given, ScalarType::Double, static_cast<int64_t>(least));
  return static_cast<const double*>(given.data_ptr());
}

void grad_norm(StableTensor stats, TensorList grads, TensorList params, bool adaptive, double eta) {
  OpParams op_params;
  op_params.adaptive = adaptive;
  op_params.eta = eta;
  check_scalars("grad_norm", "stats", kCpu, stats, ScalarType::Double, kStats);
  if (adaptive) check_length("grad_norm", "params", params.size(), grads.size());
  const Table table =
      build_chunk_table("grad_norm", kCpu, grads, {{kGrad, "grads", grads, false}, {kParam, "params", params, false}},
                        {static_cast<int64_t>(grads.size())});
  op_params.stats = static_cast<double*>(stats.data_ptr());
  grad_norm(table, op_params, torch_threads());
}

void perturb_(TensorList params, TensorList grads, TensorList backups, TensorList masters, StableTensor stats,
              StableTensor rho, Sizes group_sizes, bool adaptive, double eta, bool stochastic, StableTensor rng,
              int64_t first_index) {
  const char* op = "perturb_";
  check_scalars(op, "stats", kCpu, stats, ScalarType::Double, kStats);
  check_scalars(op, "rng", kCpu, rng, ScalarType::Long, 2);
  OpParams op_params;
  op_params.rhos = hyperparams(op, "rho", rho, group_sizes.size());
  check_length(op, "grads", grads.size(), params.size());
  if (masters.empty()) check_length(op, "backups", backups.size(), params.size());
  Table table = build_chunk_table(op, kCpu, params, perturb_lists(params, grads, backups, masters), group_sizes);
  op_params.stats = static_cast<double*>(stats.data_ptr());
  op_params.adaptive = adaptive;
  op_params.eta = eta;
  op_params.stochastic = stochastic;
  op_params.seed = static_cast<uint64_t>(static_cast<const int64_t*>(rng.data_ptr())[0]);
  op_params.step = static_cast<uint64_t>(static_cast<const int64_t*>(rng.data_ptr())[1]);
  for (Tensor& tensor : table.tensors) tensor.index += first_index;
  perturb(table, op_params, torch_threads());
}

void restore_(TensorList params, TensorList backups, TensorList masters, TensorList grads, TensorList first_grads,
              StableTensor gamma, Sizes group_sizes) {
  const char* op = "restore_";
  if (masters.empty()) check_length(op, "backups", backups.size(), params.size());
  if (!first_grads.empty()) check_length(op, "grads", grads.size(), params.size());
  const Companions lists = restore_lists(params, backups, masters, grads, first_grads);
  const Table table = build_chunk_table(op, kCpu, params, lists, group_sizes);
  OpParams op_params;
  if (!first_grads.empty()) op_params.gammas = hyperparams(op, "gamma", gamma, group_sizes.size());
  restore(table, op_params, torch_threads());
}

void undo_only(const char* op, const TensorList& params, const TensorList& backups, const TensorList& masters) {
  if (backups.empty() && masters.empty()) return;
  const Table table =
      build_chunk_table(op, kCpu, params, restore_lists(params, backups, masters, kNoTensors, kNoTensors),
                        {static_cast<int64_t>(params.size())});
  restore(table, OpParams{}, torch_threads());
}

void update(const StepArgs& args) {
  args.check_lengths();
  const Table table = build_chunk_table(args.op, kCpu, args.params, args.lists(), args.group_sizes);
  const size_t groups = args.group_sizes.size();
  OpParams op_params;
  op_params.hyperparams = hyperparams(args.op, "hyper", args.hyperparams, args.rule.columns * groups);
  if (args.rule.counts_steps) op_params.steps = hyperparams(args.op, "steps", args.steps, groups);
  op_params.rule = args.rule.index;
  op_params.flag = args.flag;
  op_params.grad_multiplier = grad_multiplier(args.maximize, args.grad_scale);
  if (overflowed(args.found_inf)) {
    undo_only(args.op, args.params, args.backups, args.masters);
  } else {
    update(table, op_params, torch_threads());
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rst_fused, CPU, m) {
  m.impl("grad_norm", TORCH_BOX(static_cast<void (*)(StableTensor, TensorList, TensorList, bool, double)>(&grad_norm)));
  m.impl("perturb_", TORCH_BOX(&perturb_));
  m.impl("restore_", TORCH_BOX(&restore_));
  RST_RULES(RST_IMPL_STEP)
}

}  // namespace rst
