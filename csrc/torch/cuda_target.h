// Where GPU kernels are started.
#pragma once

#include "cuda/launcher.h"
#include "torch/plan_api.h"

namespace rst {

// Takes the launches of GPU ops on CPU tensors, so that everything but the GPU itself can be tested without one.
struct Simulation {
  cuda::Launcher launcher{};          // launch is null unless a test has put an interpreter there
  bool scalars_on_device = false;     // numbers are read by the kernel, as if they were in device memory
  bool hyperparams_by_value = false;  // but for hyperparameters of an update
};
Simulation& simulation();

// Whether torch can be asked for its current CUDA stream.
bool has_stream_api();

// For launch plans.
const CoreOps& cuda_ops();

}  // namespace rst
