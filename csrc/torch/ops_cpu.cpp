// The registered ops on the CPU.
#include "torch/ops.h"
#include "torch/threads.h"

namespace rst {

static Target cpu_target(const StableTensor&) { return {kCpuOps, kCpu, kOnCpu, false, true, true}; }

STABLE_TORCH_LIBRARY_IMPL(rst_fused, CPU, m) { register_ops<cpu_target>(m); }

}  // namespace rst
