// Argument checks of the torch binding. They guard memory: a call that would read or write out of bounds raises.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "core/chunk_table.h"

namespace rst {

using StableTensor = torch::stable::Tensor;
using TensorList = std::vector<StableTensor>;
using torch::headeronly::ScalarType;

// Sets the dtype of `tensor`; false for one that no kernel serves.
inline bool describe(ScalarType type, Tensor& tensor) {
  tensor.complex = type == ScalarType::ComplexFloat || type == ScalarType::ComplexDouble;
  switch (type) {
    case ScalarType::Float:
    case ScalarType::ComplexFloat:
      tensor.dtype = DType::Float;
      return true;
    case ScalarType::Double:
    case ScalarType::ComplexDouble:
      tensor.dtype = DType::Double;
      return true;
    case ScalarType::BFloat16:
      tensor.dtype = DType::BFloat16;
      return true;
    case ScalarType::Half:
      tensor.dtype = DType::Half;
      return true;
    default:
      return false;
  }
}

// The device that an op runs on.
struct OpDevice {
  int32_t type, index;
  const char* name;  // in messages

  bool holds(const StableTensor& t) const {
    int32_t found = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &found));
    return found == type && (t.is_cpu() || t.get_device_index() == index);
  }
};
inline const OpDevice kCpu{aoti_torch_device_type_cpu(), 0, "the CPU"};

inline void check_like(const char* op, const char* name, const OpDevice& device, size_t i, const StableTensor& t,
                       const StableTensor& like, ScalarType dtype) {
  STD_TORCH_CHECK(device.holds(t), "rst_fused::", op, ": ", name, "[", i, "] is not on ", device.name,
                  ", where this kernel runs");
  STD_TORCH_CHECK(t.scalar_type() == dtype, "rst_fused::", op, ": ", name, "[", i, "] has dtype ", t.scalar_type(),
                  ", expected ", dtype);
  bool same = t.dim() == like.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == like.size(d);
  STD_TORCH_CHECK(same, "rst_fused::", op, ": ", name, "[", i, "] does not have the shape of the parameter");
}

inline void check_writable(const char* op, const char* name, size_t i, const View& view) {
  STD_TORCH_CHECK(!may_overlap(view.ndim, view.sizes, view.strides), "rst_fused::", op, ": ", name, "[", i,
                  "] is written, but several of its elements share memory (an expanded tensor?); clone it first");
}

// `given` must be a contiguous tensor of `dtype` on `device`, with at least `least` elements.
inline void check_scalars(const char* op, const char* name, const OpDevice& device, const StableTensor& given,
                          ScalarType dtype, int64_t least) {
  STD_TORCH_CHECK(device.holds(given) && given.is_contiguous() && given.scalar_type() == dtype, "rst_fused::", op, ": ",
                  name, " must be a contiguous tensor of dtype ", dtype, " on ", device.name, ", got ",
                  given.scalar_type());
  STD_TORCH_CHECK(given.numel() >= least, "rst_fused::", op, ": ", name, " has ", given.numel(),
                  " elements, expected at least ", least);
}

inline void check_group_sizes(const char* op, const std::vector<int64_t>& group_sizes, size_t parameters) {
  int64_t total = 0;
  for (int64_t size : group_sizes) {
    STD_TORCH_CHECK(size >= 0, "rst_fused::", op, ": group_sizes holds ", size, ", expected counts >= 0");
    total += size;
  }
  STD_TORCH_CHECK(total == static_cast<int64_t>(parameters), "rst_fused::", op, ": group_sizes sum to ", total,
                  ", expected the number of parameters, ", parameters);
}

}  // namespace rst
