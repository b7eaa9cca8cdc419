// The torch face of the GPU kernels: the same registered ops as in ops.cpp, on the current stream of the tensors' device.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <string>
#include <utility>

#include "cpu/ops.h"
#include "gpu_target.h"
#include "tables.h"

namespace rst {

namespace {

using cuda::DeviceNumbers;

using GetStream = AOTITorchError (*)(int32_t device, void** stream);

// From the CUDA part of torch, looked up there by name, so that this library also loads beside a torch without it.
GetStream stream_getter() {
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  return get;
}

void* current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(knows_streams(), "rst_fused: this torch has CUDA tensors, but no aoti_torch_get_current_cuda_stream");
  TORCH_ERROR_CODE_CHECK(stream_getter()(device, &stream));
  return stream;
}

struct Target {
  Where where;
  cuda::Launcher launcher;
  bool reads_numbers = true;  // those on the CPU; false: the kernel reads them
};

Target target_of(const char* op, int32_t device) {
  if (device != kOnCpu) {
    return {{aoti_torch_device_type_cuda(), device, "the device of the others"},
            cuda::gpu_launcher(device, current_stream(device))};
  }
  const Simulation& sim = simulation();
  STD_TORCH_CHECK(sim.launcher.launch != nullptr, "rst_fused::", op, ": GPU kernels were asked to run on CPU tensors");
  return {kCpu, sim.launcher, !sim.device_numbers};
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
  std::array<StableIValue, 6> stack{from(tensor),       from(std::optional<ScalarType>(dtype)), from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt),                     from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<StableTensor>(stack[0]);
}

// Kernels want the tensors of a parameter to lie alike. Where they do not, they work on dense copies, in the order of the
// parameter's strides, and results are copied back.
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
        const bool master = tensor.data[c.stream] == nullptr;  // grad_norm was given masters as the parameters
        tensor.data[master ? kMaster : c.stream] = copy.data_ptr();
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

// Numbers of a call may lie on the device, for CUDA graphs, or on the CPU.
const double* rows_of(const char* op, const char* name, const Target& target, const StableTensor& given, size_t rows,
                      int columns, DeviceNumbers& device) {
  const Where& where = target.where.holds(given) ? target.where : kCpu;
  check_numbers(op, name, where, given, ScalarType::Double, static_cast<int64_t>(rows) * columns);
  const double* data = static_cast<const double*>(given.data_ptr());
  if (given.is_cpu() && target.reads_numbers) return data;
  device.rows = data;
  device.columns = columns;
  return nullptr;
}

// grad_scale and found_inf of AMP. True where an overflow is known already.
bool read_scaling(const char* op, const Target& target, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                  Call& call, DeviceNumbers& device) {
  auto there = [&](const char* name, const StableTensor& given) {
    const Where& where = target.where.holds(given) ? target.where : kCpu;
    check_numbers(op, name, where, given, ScalarType::Float, 1);
    return target.where.holds(given);
  };
  if (grad_scale.has_value()) {
    const float* data = static_cast<const float*>(grad_scale->data_ptr());
    if (there("grad_scale", *grad_scale)) {
      device.grad_scale = data;
    } else {
      call.direction /= *data;
    }
  }
  if (!found_inf.has_value()) return false;
  const float* data = static_cast<const float*>(found_inf->data_ptr());
  if (!there("found_inf", *found_inf)) return *data != 0;
  device.found_inf = data;
  return false;
}

void grad_norm(StableTensor stats, TensorList grads, TensorList params, bool adaptive, double eta) {
  const char* op = "grad_norm";
  const Target target = target_of(op, stats);
  check_numbers(op, "stats", target.where, stats, ScalarType::Double, kStats);
  if (adaptive) check_length(op, "params", params.size(), grads.size());
  const TensorList none;
  const std::vector<Companion> companions{{kGrad, "grads", grads, false}, {kParam, "params", adaptive ? params : none, false}};
  Table table = make_table(op, target.where, grads, companions, {static_cast<int64_t>(grads.size())});
  Copies copies(table, adaptive ? params : grads, companions);
  StableTensor partials = partials_for(table, stats.is_cpu() ? kOnCpu : static_cast<int32_t>(stats.get_device_index()));
  Call call;
  call.adaptive = adaptive;
  call.eta = eta;
  cuda::grad_norm(table, call, static_cast<double*>(stats.data_ptr()), static_cast<double*>(partials.data_ptr()),
                  target.launcher);
}

void perturb_(TensorList params, TensorList grads, TensorList backups, TensorList masters, StableTensor stats,
              StableTensor rho, Sizes group_sizes, bool adaptive, double eta, bool stochastic, StableTensor rng,
              int64_t first_index) {
  const char* op = "perturb_";
  const Target target = target_of(op, stats);
  check_numbers(op, "stats", target.where, stats, ScalarType::Double, kStats);
  check_length(op, "grads", grads.size(), params.size());
  if (masters.empty()) check_length(op, "backups", backups.size(), params.size());
  const Companions companions = perturb_lists(params, grads, backups, masters);
  Table table = make_table(op, target.where, params, companions, group_sizes);
  for (Tensor& tensor : table.tensors) tensor.index += first_index;
  Copies copies(table, params, companions);
  DeviceNumbers device;
  Call call;
  call.adaptive = adaptive;
  call.eta = eta;
  call.stochastic = stochastic;
  call.scales = rows_of(op, "rho", target, rho, group_sizes.size(), 1, device);
  check_numbers(op, "rng", target.where.holds(rng) ? target.where : kCpu, rng, ScalarType::Long, 2);
  const int64_t* numbers = static_cast<const int64_t*>(rng.data_ptr());
  if (rng.is_cpu() && target.reads_numbers) {
    call.seed = static_cast<uint64_t>(numbers[0]);
    call.step = static_cast<uint64_t>(numbers[1]);
  } else {
    device.rng = numbers;
  }
  cuda::perturb(table, call, device, static_cast<double*>(stats.data_ptr()), target.launcher);
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
  Table table = make_table(op, target.where, params, companions, group_sizes);
  Copies copies(table, params, companions);
  DeviceNumbers device;
  Call call;
  if (!first_grads.empty()) call.gammas = rows_of(op, "gamma", target, gamma, group_sizes.size(), 1, device);
  cuda::restore(table, call, device, target.launcher);
  copies.copy_back();
}

void restore_sgd_step_(TensorList params, TensorList grads, TensorList backups, TensorList first_grads,
                       TensorList momentum_buffers, TensorList masters, StableTensor hyper, Sizes group_sizes,
                       bool nesterov, bool maximize, OptionalTensor grad_scale, OptionalTensor found_inf) {
  const char* op = "restore_sgd_step_";
  if (params.empty()) return;
  const Target target = target_of(op, params[0]);
  check_length(op, "grads", grads.size(), params.size());
  const Companions companions = sgd_lists(params, grads, backups, first_grads, momentum_buffers, masters);
  Table table = make_table(op, target.where, params, companions, group_sizes);
  Copies copies(table, params, companions);
  DeviceNumbers device;
  Call call;
  std::vector<SgdRow> rows;
  if (const double* row = rows_of(op, "hyper", target, hyper, group_sizes.size(), 5, device)) {
    for (size_t r = 0; r < group_sizes.size(); ++r, row += 5) rows.push_back({row[0], row[1], row[2], row[3], row[4]});
  }
  call.sgd = rows.data();
  call.nesterov = nesterov;
  call.direction = maximize ? -1 : 1;
  if (read_scaling(op, target, grad_scale, found_inf, call, device)) {
    for (Tensor& tensor : table.tensors) tensor.data[kFirstGrad] = nullptr;  // nothing to mix
    cuda::restore(table, Call{}, {}, target.launcher);
  } else {
    cuda::sgd_step(table, call, device, target.launcher);
  }
  copies.copy_back();
}

void sgd_step_(TensorList params, TensorList grads, TensorList momentum_buffers, TensorList masters, StableTensor hyper,
               Sizes group_sizes, bool nesterov, bool maximize, OptionalTensor grad_scale, OptionalTensor found_inf) {
  restore_sgd_step_(params, grads, {}, {}, momentum_buffers, masters, hyper, group_sizes, nesterov, maximize, grad_scale,
                    found_inf);
}

void restore_adam_step_(TensorList params, TensorList grads, TensorList backups, TensorList first_grads,
                        TensorList exp_avgs, TensorList exp_avg_sqs, TensorList masters, StableTensor hyper,
                        StableTensor steps, Sizes group_sizes, bool decoupled, bool maximize, OptionalTensor grad_scale,
                        OptionalTensor found_inf) {
  const char* op = "restore_adam_step_";
  if (params.empty()) return;
  const Target target = target_of(op, params[0]);
  check_length(op, "grads", grads.size(), params.size());
  check_length(op, "exp_avgs", exp_avgs.size(), params.size());
  check_length(op, "exp_avg_sqs", exp_avg_sqs.size(), params.size());
  const Companions companions = adam_lists(params, grads, backups, first_grads, exp_avgs, exp_avg_sqs, masters);
  Table table = make_table(op, target.where, params, companions, group_sizes);
  Copies copies(table, params, companions);
  DeviceNumbers device, counts;
  Call call;
  const double* row = rows_of(op, "hyper", target, hyper, group_sizes.size(), 6, device);
  const double* step = rows_of(op, "steps", target, steps, group_sizes.size(), 1, counts);
  device.steps = counts.rows;
  std::vector<AdamRow> rows;
  for (size_t r = 0; r < group_sizes.size(); ++r) {  // what lies on the device is not read here
    AdamRow numbers{};
    if (row != nullptr) {
      const double* h = row + 6 * r;
      numbers = {h[0], h[1], h[2], h[3], h[4], h[5], 0};
    }
    if (step != nullptr) numbers.step = step[r];
    rows.push_back(numbers);
  }
  call.adam = rows.data();
  call.decoupled = decoupled;
  call.direction = maximize ? -1 : 1;
  if (read_scaling(op, target, grad_scale, found_inf, call, device)) {
    for (Tensor& tensor : table.tensors) tensor.data[kFirstGrad] = nullptr;  // nothing to mix
    cuda::restore(table, Call{}, {}, target.launcher);
  } else {
    cuda::adam_step(table, call, device, target.launcher);
  }
  copies.copy_back();
}

void adam_step_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList masters,
                StableTensor hyper, StableTensor steps, Sizes group_sizes, bool decoupled, bool maximize,
                OptionalTensor grad_scale, OptionalTensor found_inf) {
  restore_adam_step_(params, grads, {}, {}, exp_avgs, exp_avg_sqs, masters, hyper, steps, group_sizes, decoupled,
                     maximize, grad_scale, found_inf);
}

}  // namespace

bool knows_streams() { return stream_getter() != nullptr; }

Simulation& simulation() {
  static Simulation simulation;
  return simulation;
}

const CoreOps& gpu_ops() {
  static const CoreOps ops{
      [](const Table& t, const Call& c, double* stats, int32_t device) {
        StableTensor partials = partials_for(t, device);
        cuda::grad_norm(t, c, stats, static_cast<double*>(partials.data_ptr()), target_of("grad_norm", device).launcher);
      },
      [](const Table& t, const Call& c, double* stats, const double* rho, int, int32_t device) {
        Call call = c;
        call.scales = rho;
        cuda::perturb(t, call, {}, stats, target_of("perturb_", device).launcher);
      },
      [](const Table& t, const Call& c, int32_t device) {
        cuda::restore(t, c, {}, target_of("restore_", device).launcher);
      },
      [](const Table& t, const Call& c, int32_t device) {
        cuda::sgd_step(t, c, {}, target_of("sgd_step_", device).launcher);
      },
      [](const Table& t, const Call& c, int32_t device) {
        cuda::adam_step(t, c, {}, target_of("adam_step_", device).launcher);
      }};
  return ops;
}

// On CPU tensors the ops of this second namespace run only where something takes the launches instead of a GPU.
#define RST_GPU_OPS(m)                                                                                          \
  m.impl("grad_norm", TORCH_BOX(static_cast<void (*)(StableTensor, TensorList, TensorList, bool, double)>(&grad_norm))); \
  m.impl("perturb_", TORCH_BOX(&perturb_));                                                                     \
  m.impl("restore_", TORCH_BOX(&restore_));                                                                     \
  m.impl("sgd_step_", TORCH_BOX(&sgd_step_));                                                                   \
  m.impl("restore_sgd_step_", TORCH_BOX(&restore_sgd_step_));                                                   \
  m.impl("adam_step_", TORCH_BOX(&adam_step_));                                                                 \
  m.impl("restore_adam_step_", TORCH_BOX(&restore_adam_step_))

STABLE_TORCH_LIBRARY_IMPL(rst_fused, CUDA, m) { RST_GPU_OPS(m); }
STABLE_TORCH_LIBRARY_IMPL(rst_fused_gpu, CompositeExplicitAutograd, m) { RST_GPU_OPS(m); }

}  // namespace rst
