// The torch binding of the GPU kernels: the same registered ops as in ops_cpu.cpp, on the current stream of the
// tensors' device.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <string>
#include <utility>

#include "cpu/run.h"
#include "torch/cuda_target.h"
#include "torch/step_op.h"

namespace rst {

namespace {

using GetStream = AOTITorchError (*)(int32_t device, void** stream);

// Looked up by name in the CUDA part of torch, so that this library also loads with a torch that lacks it.
GetStream stream_getter() {
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  return get;
}

void* current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(has_stream_api(),
                  "rst_fused: this torch has CUDA tensors, but no aoti_torch_get_current_cuda_stream");
  TORCH_ERROR_CODE_CHECK(stream_getter()(device, &stream));
  return stream;
}

struct Target {
  OpDevice device;
  cuda::Launcher launcher;
  bool reads_scalars = true;  // scalars on the CPU are read here; false: by the kernel
};

Target target_of(const char* op, int32_t device) {
  if (device != kOnCpu) {
    return {{aoti_torch_device_type_cuda(), device, "the device of the others"},
            cuda::gpu_launcher(device, current_stream(device))};
  }
  const Simulation& sim = simulation();
  STD_TORCH_CHECK(sim.launcher.launch != nullptr, "rst_fused::", op, ": GPU kernels were asked to run on CPU tensors");
  return {kCpu, sim.launcher, !sim.scalars_on_device};
}

Target target_of(const char* op, const StableTensor& lead) {
  return target_of(op, lead.is_cpu() ? kOnCpu : static_cast<int32_t>(lead.get_device_index()));
}

StableTensor partials_for(const Table& table, int32_t device) {
  const torch::stable::Device place = device == kOnCpu
                                          ? torch::stable::Device(torch::headeronly::DeviceType::CPU)
                                          : torch::stable::Device(torch::headeronly::DeviceType::CUDA, device);
  return torch::stable::empty({cuda::norm_partials(table)}, ScalarType::Double, std::nullopt, place, std::nullopt,
                              std::nullopt);
}

StableTensor dense_like(const StableTensor& tensor, ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(tensor),       from(std::optional<ScalarType>(dtype)),
                                    from(std::nullopt), from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<StableTensor>(stack[0]);
}

// Kernels need all tensors of a parameter in the same memory layout. Where they differ, kernels work on dense copies,
// in the order of the parameter's strides, and results are copied back.
class Copies {
 public:
  Copies(Table& table, const TensorList& lead, const std::vector<Companion>& companions) {
    for (size_t i = 0; i < table.tensors.size(); ++i) {
      Tensor& tensor = table.tensors[i];
      if (!tensor.strided()) continue;
      tensor.sizes.clear();
      tensor.strides.clear();
      for (const Companion& c : companions) {
        if (c.list.empty()) continue;
        StableTensor copy = dense_like(lead[i], c.list[i].scalar_type());
        torch::stable::copy_(copy, c.list[i]);
        const bool master = tensor.data[c.operand] == nullptr;  // grad_norm was given masters as the parameters
        tensor.data[master ? kMaster : c.operand] = copy.data_ptr();
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

// Hyperparameters may be in device memory, for CUDA graphs, or on the CPU.
const double* hyperparams_of(const char* op, const char* name, const Target& target, const StableTensor& given,
                             size_t rows, int columns, DeviceScalars& on_device) {
  const OpDevice& place = target.device.holds(given) ? target.device : kCpu;
  check_scalars(op, name, place, given, ScalarType::Double, static_cast<int64_t>(rows) * columns);
  const double* data = static_cast<const double*>(given.data_ptr());
  if (given.is_cpu() && target.reads_scalars) return data;
  on_device.hyperparams = data;
  on_device.columns = columns;
  return nullptr;
}

// grad_scale and found_inf of AMP. True where an overflow is known already.
bool read_scaling(const char* op, const Target& target, const OptionalTensor& grad_scale,
                  const OptionalTensor& found_inf, OpParams& op_params) {
  auto is_on_device = [&](const char* name, const StableTensor& given) {
    const OpDevice& place = target.device.holds(given) ? target.device : kCpu;
    check_scalars(op, name, place, given, ScalarType::Float, 1);
    return target.device.holds(given);
  };
  if (grad_scale.has_value()) {
    const float* data = static_cast<const float*>(grad_scale->data_ptr());
    if (is_on_device("grad_scale", *grad_scale)) {
      op_params.on_device.grad_scale = data;
    } else {
      op_params.grad_multiplier /= *data;
    }
  }
  if (!found_inf.has_value()) return false;
  const float* data = static_cast<const float*>(found_inf->data_ptr());
  if (!is_on_device("found_inf", *found_inf)) return *data != 0;
  op_params.on_device.found_inf = data;
  return false;
}

void grad_norm(StableTensor stats, TensorList grads, TensorList params, bool adaptive, double eta) {
  const char* op = "grad_norm";
  const Target target = target_of(op, stats);
  check_scalars(op, "stats", target.device, stats, ScalarType::Double, kStats);
  if (adaptive) check_length(op, "params", params.size(), grads.size());
  const TensorList none;
  const std::vector<Companion> companions{{kGrad, "grads", grads, false},
                                          {kParam, "params", adaptive ? params : none, false}};
  Table table = build_chunk_table(op, target.device, grads, companions, {static_cast<int64_t>(grads.size())});
  Copies copies(table, adaptive ? params : grads, companions);
  StableTensor partials = partials_for(table, stats.is_cpu() ? kOnCpu : static_cast<int32_t>(stats.get_device_index()));
  OpParams op_params;
  op_params.adaptive = adaptive;
  op_params.eta = eta;
  op_params.stats = static_cast<double*>(stats.data_ptr());
  cuda::grad_norm(table, op_params, static_cast<double*>(partials.data_ptr()), target.launcher);
}

void perturb_(TensorList params, TensorList grads, TensorList backups, TensorList masters, StableTensor stats,
              StableTensor rho, Sizes group_sizes, bool adaptive, double eta, bool stochastic, StableTensor rng,
              int64_t first_index) {
  const char* op = "perturb_";
  const Target target = target_of(op, stats);
  check_scalars(op, "stats", target.device, stats, ScalarType::Double, kStats);
  check_length(op, "grads", grads.size(), params.size());
  if (masters.empty()) check_length(op, "backups", backups.size(), params.size());
  const Companions companions = perturb_lists(params, grads, backups, masters);
  Table table = build_chunk_table(op, target.device, params, companions, group_sizes);
  for (Tensor& tensor : table.tensors) tensor.index += first_index;
  Copies copies(table, params, companions);
  OpParams op_params;
  op_params.stats = static_cast<double*>(stats.data_ptr());
  op_params.adaptive = adaptive;
  op_params.eta = eta;
  op_params.stochastic = stochastic;
  op_params.rhos = hyperparams_of(op, "rho", target, rho, group_sizes.size(), 1, op_params.on_device);
  check_scalars(op, "rng", target.device.holds(rng) ? target.device : kCpu, rng, ScalarType::Long, 2);
  const int64_t* seed_and_step = static_cast<const int64_t*>(rng.data_ptr());
  if (rng.is_cpu() && target.reads_scalars) {
    op_params.seed = static_cast<uint64_t>(seed_and_step[0]);
    op_params.step = static_cast<uint64_t>(seed_and_step[1]);
  } else {
    op_params.on_device.rng = seed_and_step;
  }
  cuda::perturb(table, op_params, target.launcher);
  copies.copy_back();
}

void restore_(TensorList params, TensorList backups, TensorList masters, TensorList grads, TensorList first_grads,
              StableTensor gamma, Sizes group_sizes) {
  const char* op = "restore_";
  if (params.empty()) return;
  const Target target = target_of(op, params[0]);
  if (masters.empty()) check_length(op, "backups", backups.size(), params.size());
  if (!first_grads.empty()) check_length(op, "grads", grads.size(), params.size());
  const Companions companions = restore_lists(params, backups, masters, grads, first_grads);
  Table table = build_chunk_table(op, target.device, params, companions, group_sizes);
  Copies copies(table, params, companions);
  OpParams op_params;
  if (!first_grads.empty()) {
    op_params.gammas = hyperparams_of(op, "gamma", target, gamma, group_sizes.size(), 1, op_params.on_device);
  }
  cuda::restore(table, op_params, target.launcher);
  copies.copy_back();
}

void update(const StepArgs& args) {
  if (args.params.empty()) return;
  const Target target = target_of(args.op, args.params[0]);
  args.check_lengths();
  const Companions companions = args.lists();
  Table table = build_chunk_table(args.op, target.device, args.params, companions, args.group_sizes);
  Copies copies(table, args.params, companions);
  OpParams op_params;
  DeviceScalars& on_device = op_params.on_device;
  DeviceScalars counts;
  const size_t groups = args.group_sizes.size();
  op_params.hyperparams =
      hyperparams_of(args.op, "hyper", target, args.hyperparams, groups, args.rule.columns, on_device);
  if (args.rule.counts_steps) op_params.steps = hyperparams_of(args.op, "steps", target, args.steps, groups, 1, counts);
  on_device.steps = counts.hyperparams;
  op_params.rule = args.rule.index;
  op_params.flag = args.flag;
  op_params.grad_multiplier = args.maximize ? -1 : 1;
  if (read_scaling(args.op, target, args.grad_scale, args.found_inf, op_params)) {
    for (Tensor& tensor : table.tensors) tensor.data[kFirstGrad] = nullptr;  // nothing to mix
    cuda::restore(table, OpParams{}, target.launcher);
  } else {
    cuda::update(table, op_params, target.launcher);
  }
  copies.copy_back();
}

}  // namespace

bool has_stream_api() { return stream_getter() != nullptr; }

Simulation& simulation() {
  static Simulation simulation;
  return simulation;
}

const CoreOps& cuda_ops() {
  static const CoreOps ops{[](const Table& t, const OpParams& c, int32_t device) {
                             StableTensor partials = partials_for(t, device);
                             cuda::grad_norm(t, c, static_cast<double*>(partials.data_ptr()),
                                             target_of("grad_norm", device).launcher);
                           },
                           [](const Table& t, const OpParams& c, int32_t device) {
                             cuda::perturb(t, c, target_of("perturb_", device).launcher);
                           },
                           [](const Table& t, const OpParams& c, int32_t device) {
                             cuda::restore(t, c, target_of("restore_", device).launcher);
                           },
                           [](const Table& t, const OpParams& c, int32_t device) {
                             cuda::update(t, c, target_of(kRuleInfos[c.rule].step_op, device).launcher);
                           }};
  return ops;
}

#define RST_IMPL_ALL(m)                                                                                     \
  m.impl("grad_norm",                                                                                       \
         TORCH_BOX(static_cast<void (*)(StableTensor, TensorList, TensorList, bool, double)>(&grad_norm))); \
  m.impl("perturb_", TORCH_BOX(&perturb_));                                                                 \
  m.impl("restore_", TORCH_BOX(&restore_));                                                                 \
  RST_RULES(RST_IMPL_STEP)

STABLE_TORCH_LIBRARY_IMPL(rst_fused, CUDA, m){RST_IMPL_ALL(m)}
// On CPU tensors the ops of this second namespace run only where something takes the launches instead of a GPU.
STABLE_TORCH_LIBRARY_IMPL(rst_fused_gpu, CompositeExplicitAutograd, m) {
  RST_IMPL_ALL(m)
}

}  // namespace rst
