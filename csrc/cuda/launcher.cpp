#include "cuda/launcher.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace rst::cuda {

namespace {

void check(cudaError_t error, const char* what, int device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not left for the next call to find
  throw std::runtime_error(std::string("rst_fused: ") + what + " on CUDA device " + std::to_string(device) + ": " +
                           cudaGetErrorName(error) + ": " + cudaGetErrorString(error) +
                           ". CUDA may report here what work that was started earlier did: to see which, run again "
                           "with the environment variable CUDA_LAUNCH_BLOCKING=1");
}

class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    check(cudaGetDevice(&before_), "cudaGetDevice", device);
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice", device);
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }

 private:
  int device_, before_ = 0;
};

void launch(const GpuKernel& kernel, unsigned blocks, const void* args, const Launcher& self) {
  const OnDevice guard(self.device);
  void* arguments[] = {const_cast<void*>(args)};
  check(cudaLaunchKernel(kernel.function, dim3(blocks), dim3(kThreads), arguments, 0,
                         static_cast<cudaStream_t>(self.stream)),
        kernel.name, self.device);
}

}  // namespace

Launcher gpu_launcher(int device, void* stream) { return {&launch, device, stream}; }

// Asked of the driver itself: the runtime would initialize CUDA, and then processes that are forked could not use it.
int driver_version() {
  void* const driver = dlopen("libcuda.so.1", RTLD_LAZY);
  const auto get = driver == nullptr ? nullptr : reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDriverGetVersion"));
  int version = 0;
  return get != nullptr && get(&version) == 0 ? version : 0;
}

#define RST_TEXT_OF(x) #x
#define RST_TEXT(x) RST_TEXT_OF(x)
const char* build_description() { return RST_TEXT(RST_CUDA_VERSION) " for " RST_TEXT(RST_CUDA_ARCHITECTURES); }

}  // namespace rst::cuda
