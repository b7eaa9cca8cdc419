// The registered ops (schemas in rst_fused/_schemas.py), for the CPU and for GPUs: they turn lists of tensors into a
// chunk table and run the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <utility>

#include "torch/plan_api.h"
#include "torch/step_op.h"

namespace rst {

// Where a call runs.
struct Target {
  const CoreOps& ops;
  OpDevice device;
  int32_t index;           // the device, as `ops` know it
  bool one_layout;         // kernels need all tensors of a parameter in the same memory layout
  bool reads_scalars;      // scalars on the CPU are read here; false: by the kernel
  bool reads_hyperparams;  // the same of the hyperparameters of an update
};
// `lead` is a tensor of the call.
using TargetOf = Target (*)(const StableTensor& lead);

inline StableTensor dense_like(const StableTensor& tensor, ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(tensor),       from(std::optional<ScalarType>(dtype)),
                                    from(std::nullopt), from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<StableTensor>(stack[0]);
}

// Where the tensors of a parameter differ in layout and the kernels need one, they work on dense copies, in the order
// of the strides of `lead`, and results are copied back.
class Copies {
 public:
  Copies(const Target& target, Table& table, const TensorList& lead, const Companions& companions) {
    for (size_t i = 0; target.one_layout && i < table.tensors.size(); ++i) {
      Tensor& tensor = table.tensors[i];
      if (!tensor.strided()) continue;
      tensor.sizes.clear();
      tensor.strides.clear();
      for (const Companion& c : companions) {
        if (c.list.empty() || !tensor.has(c.operand)) continue;
        StableTensor copy = dense_like(lead[i], c.list[i].scalar_type());
        torch::stable::copy_(copy, c.list[i]);
        tensor.data[c.operand] = copy.data_ptr();
        held_.push_back(copy);
        if (c.written) results_.push_back({c.list[i], copy});
      }
    }
  }
  void copy_back() {
    for (auto& [original, copy] : results_) torch::stable::copy_(original, copy);
  }

 private:
  TensorList held_;
  std::vector<std::pair<StableTensor, StableTensor>> results_;
};

// Numbers may be on the CPU or, for CUDA graphs, in device memory. Returns them where they are read here. Where the
// kernel reads them, that is null, and `on_device` is set.
template <class T>
const T* numbers(const char* op, const char* name, const Target& target, const StableTensor& given, size_t least,
                 const T*& on_device, bool reads) {
  const OpDevice& place = target.device.holds(given) ? target.device : kCpu;
  check_scalars(op, name, place, given, torch::headeronly::CppTypeToScalarType<T>::value, static_cast<int64_t>(least));
  const T* data = static_cast<const T*>(given.data_ptr());
  if (given.is_cpu() && reads) return data;
  on_device = data;
  return nullptr;
}

// Where the parameters of a call are, for the random bits.
inline void place(const char* op, Table& table, const Sizes& shards) {
  STD_TORCH_CHECK(set_shards(table, shards), "rst_fused::", op, ": shards has ", shards.size(),
                  " numbers, expected none, or three numbers >= 0 for each of ", table.tensors.size(), " parameters");
}
inline void read_rng(const char* op, const Target& target, const StableTensor& rng, OpParams& op_params) {
  if (const int64_t* seed_and_step =
          numbers(op, "rng", target, rng, 2, op_params.on_device.rng, target.reads_scalars)) {
    op_params.seed = static_cast<uint64_t>(seed_and_step[0]);
    op_params.step = static_cast<uint64_t>(seed_and_step[1]);
  }
}

template <TargetOf target_of>
void grad_norm(StableTensor stats, TensorList grads, TensorList params, TensorList masters, bool adaptive, double eta) {
  const char* op = "grad_norm";
  const Target target = target_of(stats);
  check_scalars(op, "stats", target.device, stats, ScalarType::Double, kStats);
  const Companions lists{{kGrad, "grads", grads, false},
                         {kParam, "params", adaptive ? params : kNoTensors, false, adaptive},
                         {kMaster, "masters", adaptive ? masters : kNoTensors, false, false, false, true}};
  Table table = build_chunk_table(op, target.device, grads, lists, {static_cast<int64_t>(grads.size())});
  const Copies copies(target, table, adaptive ? params : grads, lists);
  OpParams op_params;
  op_params.adaptive = adaptive;
  op_params.eta = eta;
  op_params.stats = static_cast<double*>(stats.data_ptr());
  target.ops.grad_norm(table, op_params, target.index, nullptr);
}

template <TargetOf target_of>
void finish_norm(StableTensor stats, StableTensor squares) {
  const char* op = "finish_norm";
  const Target target = target_of(stats);
  check_scalars(op, "stats", target.device, stats, ScalarType::Double, kStats);
  check_scalars(op, "squares", target.device, squares, ScalarType::Double, 0);
  STD_TORCH_CHECK(squares.dim() == 1, "rst_fused::", op, ": squares has ", squares.dim(), " dimensions, expected 1");
  target.ops.finish_norm(static_cast<const double*>(squares.data_ptr()), squares.numel(),
                         static_cast<double*>(stats.data_ptr()), target.index);
}

template <TargetOf target_of>
void perturb_(TensorList params, TensorList grads, TensorList backups, TensorList masters, StableTensor stats,
              StableTensor rho, Sizes group_sizes, bool adaptive, double eta, bool stochastic, StableTensor rng,
              int64_t first_index, Sizes shards) {
  const char* op = "perturb_";
  const Target target = target_of(stats);
  check_scalars(op, "stats", target.device, stats, ScalarType::Double, kStats);
  const Companions lists{{kParam, "params", params, true},
                         {kGrad, "grads", grads, false, true},
                         {kBackup, "backups", backups_or_none(backups, masters), true, !are_copies(masters)},
                         {kMaster, "masters", masters, false}};
  Table table = build_chunk_table(op, target.device, params, lists, group_sizes);
  for (Tensor& tensor : table.tensors) tensor.index += first_index;
  place(op, table, shards);
  OpParams op_params;
  op_params.adaptive = adaptive;
  op_params.eta = eta;
  op_params.stochastic = stochastic;
  op_params.stats = static_cast<double*>(stats.data_ptr());
  op_params.rhos =
      numbers(op, "rho", target, rho, group_sizes.size(), op_params.on_device.hyperparams, target.reads_scalars);
  read_rng(op, target, rng, op_params);
  Copies copies(target, table, params, lists);
  target.ops.perturb(table, op_params, target.index, nullptr);
  copies.copy_back();
}

template <TargetOf target_of>
void restore_(TensorList params, TensorList backups, TensorList masters, TensorList grads, TensorList first_grads,
              StableTensor gamma, Sizes group_sizes) {
  const char* op = "restore_";
  const Target target = target_of(params.empty() ? gamma : params[0]);
  const bool mixing = !first_grads.empty();
  const Companions lists{{kParam, "params", params, true},
                         {kGrad, "grads", mixing ? grads : kNoTensors, true, mixing},
                         {kBackup, "backups", backups_or_none(backups, masters), false, !are_copies(masters)},
                         {kFirstGrad, "first_grads", first_grads, false},
                         {kMaster, "masters", masters, false}};
  Table table = build_chunk_table(op, target.device, params, lists, group_sizes);
  if (params.empty()) return;
  OpParams op_params;
  if (mixing) {
    op_params.gammas =
        numbers(op, "gamma", target, gamma, group_sizes.size(), op_params.on_device.hyperparams, target.reads_scalars);
  }
  Copies copies(target, table, params, lists);
  target.ops.restore(table, op_params, target.index, nullptr);
  copies.copy_back();
}

template <TargetOf target_of>
void update(const StepArgs& args) {
  const Target target = target_of(args.params.empty() ? args.hyperparams : args.params[0]);
  const Companions lists = args.lists();
  Table table = build_chunk_table(args.rule.op, target.device, args.params, lists, args.group_sizes);
  if (args.params.empty()) return;
  const Sizes& indices = args.indices;
  STD_TORCH_CHECK(set_state_indices(table, indices), "rst_fused::", args.rule.op, ": indices has ", indices.size(),
                  " numbers, expected none, or a number from 0 to 2^31 - 1 for each of ", table.tensors.size(),
                  " parameters");
  place(args.rule.op, table, args.shards);
  const size_t groups = args.group_sizes.size();
  OpParams op_params;
  DeviceScalars& on_device = op_params.on_device;
  op_params.rule = args.rule.index;
  op_params.flag = args.flag;
  op_params.hyperparams = numbers(args.rule.op, "hyper", target, args.hyperparams, args.rule.columns * groups,
                                  on_device.hyperparams, target.reads_hyperparams);
  if (args.rule.counts_steps) {
    op_params.steps = numbers(args.rule.op, "steps", target, args.steps, groups, on_device.steps, target.reads_scalars);
  }
  op_params.grad_multiplier = args.maximize ? -1 : 1;
  if (args.grad_scale.has_value()) {
    const float* scale =
        numbers(args.rule.op, "grad_scale", target, *args.grad_scale, 1, on_device.grad_scale, target.reads_scalars);
    if (scale != nullptr) op_params.grad_multiplier /= *scale;
  }
  if (args.rng.has_value()) read_rng(args.rule.op, target, *args.rng, op_params);
  const float* found_inf = nullptr;
  if (args.found_inf.has_value()) {
    found_inf =
        numbers(args.rule.op, "found_inf", target, *args.found_inf, 1, on_device.found_inf, target.reads_scalars);
  }
  Copies copies(target, table, args.params, lists);
  if (found_inf == nullptr || *found_inf == 0) {
    target.ops.update(table, op_params, target.index, nullptr);
  } else if (!args.backups.empty() || are_copies(args.masters)) {  // AMP found an overflow: no step, but w comes back
    for (Tensor& tensor : table.tensors) tensor.data[kFirstGrad] = nullptr;  // nothing to mix
    target.ops.restore(table, OpParams{}, target.index, nullptr);
  }
  copies.copy_back();
}

template <TargetOf target_of>
void register_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("grad_norm", TORCH_BOX((&grad_norm<target_of>)));
  library.impl("finish_norm", TORCH_BOX((&finish_norm<target_of>)));
  library.impl("perturb_", TORCH_BOX((&perturb_<target_of>)));
  library.impl("restore_", TORCH_BOX((&restore_<target_of>)));
#define RST_IMPL_STEP(Rule, name) library.impl(kRuleInfos[k##Rule].op, &step<k##Rule, &update<target_of>>);
  RST_RULES(RST_IMPL_STEP)
#undef RST_IMPL_STEP
}

}  // namespace rst
