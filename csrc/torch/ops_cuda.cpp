// The registered ops on GPUs: on the current stream of the tensors' device.
#include <dlfcn.h>

#include <optional>

#include "torch/cuda_target.h"
#include "torch/ops.h"

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

cuda::Launcher launcher_for(int32_t device) {
  if (device == kOnCpu) {
    STD_TORCH_CHECK(simulation().launcher.launch != nullptr, "rst_fused: GPU kernels were asked to run on CPU tensors");
    return simulation().launcher;
  }
  STD_TORCH_CHECK(has_stream_api(),
                  "rst_fused: this torch has CUDA tensors, but no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(stream_getter()(device, &stream));
  return cuda::gpu_launcher(device, stream);
}

Target gpu_target(const StableTensor& lead) {
  if (lead.is_cpu()) {
    const bool by_value = !simulation().scalars_on_device;
    return {cuda_ops(), kCpu, kOnCpu, true, by_value, by_value || simulation().hyperparams_by_value};
  }
  const auto index = static_cast<int32_t>(lead.get_device_index());
  return {cuda_ops(), {aoti_torch_device_type_cuda(), index, "the device of the others"}, index, true, true, true};
}

// What a launch plan keeps of its ops: the launches, and the memory in which the norm adds up.
struct Cache {
  cuda::LaunchCache launches;
  std::optional<StableTensor> partials;
  void* stream = nullptr;  // which the partial sums were allocated on: torch may hand freed memory out again there
};
cuda::LaunchCache* launches_of(void* cache) {
  return cache == nullptr ? nullptr : &static_cast<Cache*>(cache)->launches;
}

StableTensor new_partials(int64_t count, int32_t device) {
  const torch::stable::Device place = device == kOnCpu
                                          ? torch::stable::Device(torch::headeronly::DeviceType::CPU)
                                          : torch::stable::Device(torch::headeronly::DeviceType::CUDA, device);
  return torch::stable::empty({count}, ScalarType::Double, std::nullopt, place, std::nullopt, std::nullopt);
}

void grad_norm(const Table& table, const OpParams& params, int32_t device, void* cache) {
  const cuda::Launcher launcher = launcher_for(device);
  const int64_t count = cuda::norm_partials(table);
  Cache* const kept = static_cast<Cache*>(cache);
  const bool usable =
      kept != nullptr && kept->partials && kept->stream == launcher.stream && kept->partials->numel() >= count;
  const StableTensor partials = usable ? *kept->partials : new_partials(count, device);
  if (kept != nullptr && !usable) {
    kept->partials = partials;
    kept->stream = launcher.stream;
  }
  cuda::grad_norm(table, params, static_cast<double*>(partials.data_ptr()), launcher, launches_of(cache));
}

// An op of cuda/launch.h, as CoreOps has it.
template <void (*op)(const Table&, const OpParams&, const cuda::Launcher&, cuda::LaunchCache*)>
void on_stream(const Table& table, const OpParams& params, int32_t device, void* cache) {
  op(table, params, launcher_for(device), launches_of(cache));
}
void restore(const Table& table, const OpParams& params, int32_t device, void*) {
  cuda::restore(table, params, launcher_for(device));
}
void finish_norm(const double* squares, int64_t count, double* stats, int32_t device) {
  cuda::finish_norm(squares, count, stats, launcher_for(device));
}

}  // namespace

bool has_stream_api() { return stream_getter() != nullptr; }

Simulation& simulation() {
  static Simulation simulation;
  return simulation;
}

const CoreOps& cuda_ops() {
  static const CoreOps ops{grad_norm,
                           on_stream<cuda::perturb>,
                           restore,
                           on_stream<cuda::update>,
                           finish_norm,
                           []() -> void* { return new Cache; },
                           [](void* cache) { delete static_cast<Cache*>(cache); }};
  return ops;
}

STABLE_TORCH_LIBRARY_IMPL(rst_fused, CUDA, m) { register_ops<gpu_target>(m); }
// On CPU tensors the ops of this second namespace run only where something takes the launches instead of a GPU.
STABLE_TORCH_LIBRARY_IMPL(rst_fused_gpu, CompositeExplicitAutograd, m) { register_ops<gpu_target>(m); }

}  // namespace rst
