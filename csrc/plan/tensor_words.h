// Where torch keeps what a plan compares. Found out from tensors that are made for it, never taken for granted.
#pragma once

#include <cstddef>

namespace rst {

// Of the pointer to the TensorImpl in a Python tensor, in bytes; 0: not found, and there are no plans.
ptrdiff_t find_impl_offset();
// Of TensorWords in a TensorImpl, in words; 0: not found, and torch is asked for each fact by itself.
int find_first_word();

}  // namespace rst
