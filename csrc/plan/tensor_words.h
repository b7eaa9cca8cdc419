// Where torch keeps what a plan compares. Found out from tensors that are made for it, never taken for granted.
#pragma once

#include <cstddef>

#include "torch/plan_api.h"

namespace rst {

// Of the pointer to the TensorImpl in a Python tensor, in bytes; 0: not found, and there are no plans.
ptrdiff_t find_impl_offset();
// All of it or nothing, which slows plans down.
ImplLayout find_impl_layout();
// What was found when the module was connected.
const ImplLayout& known_layout();

}  // namespace rst
