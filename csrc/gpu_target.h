// Where GPU kernels are started.
#pragma once

#include "core_api.h"
#include "cuda/launcher.h"

namespace rst {

// Takes the launches of ops on CPU tensors, so that all but the GPU itself can be tested without one.
struct Simulation {
  cuda::Launcher launcher{};    // launch is null unless a test has put an interpreter there
  bool device_numbers = false;  // hyperparameters stay where they are, as if on the device
};
Simulation& simulation();

// Whether torch can be asked for its current CUDA stream.
bool knows_streams();

// For launch plans.
const CoreOps& gpu_ops();

}  // namespace rst
