// The launcher of a real GPU.
#pragma once

#include "cuda/launch.h"

namespace rst::cuda {

// Starts kernels on `stream` of `device`; the current device of the calling thread stays as it is. Throws
// std::runtime_error naming the kernel, the device and CUDA's error.
Launcher gpu_launcher(int device, void* stream);
// The newest CUDA that the driver supports, as 1000 * major + 10 * minor; 0: there is no driver.
int driver_version();
// "13.0 for sm_80, sm_90, ...", as built.
const char* build_description();

}  // namespace rst::cuda
