// From lists of tensors to a chunk table, with every check that guards memory.
#pragma once

#include <optional>

#include "torch/checks.h"

namespace rst {

using OptionalTensor = std::optional<StableTensor>;
using Sizes = std::vector<int64_t>;

struct Companion {
  Operand operand;
  const char* name;
  const TensorList& list;
  bool written;
  bool required = false;  // else it may be absent, that is, empty
  bool rounded = false;   // may be bfloat16 beside float32 arithmetic, and is rounded stochastically then
  bool some = false;      // masters: a parameter that has none stands for it
};
using Companions = std::vector<Companion>;

inline View view_of(const StableTensor& t) {
  return {t.data_ptr(), static_cast<int>(t.dim()), t.sizes().data(), t.strides().data()};
}

// Whether masters, all of them alike, take the place of backups: int16 ones are what bfloat16 parameters lack.
inline bool are_copies(const TensorList& masters) {
  return !masters.empty() && masters[0].scalar_type() != ScalarType::Short;
}

// `lead` is the list every other one must match.
inline Table build_chunk_table(const char* op, const OpDevice& device, const TensorList& lead,
                               const Companions& companions, const Sizes& group_sizes) {
  check_group_sizes(op, group_sizes, lead.size());
  const Companion* masters = nullptr;
  for (const Companion& c : companions) {
    STD_TORCH_CHECK(c.list.size() == lead.size() || (c.list.empty() && !c.required), "rst_fused::", op, ": ", c.name,
                    " has ", c.list.size(), " entries, expected ", lead.size(), ", one per parameter");
    if (c.operand == kMaster && !c.list.empty()) masters = &c;
  }
  const bool remainders = masters != nullptr && !are_copies(masters->list);
  Table table;
  table.tensors.resize(lead.size());
  size_t row = 0;
  int64_t left = group_sizes.empty() ? 0 : group_sizes[0];
  for (size_t i = 0; i < lead.size(); ++i) {
    while (left == 0) left = group_sizes[++row];
    --left;
    Tensor& tensor = table.tensors[i];
    const ScalarType dtype = lead[i].scalar_type();
    STD_TORCH_CHECK(describe(dtype, tensor), "rst_fused::", op, ": parameter ", i, " has dtype ", dtype,
                    ", expected float32, float64, bfloat16, float16, complex64 or complex128");
    const bool sixteen_bit = tensor.dtype == DType::BFloat16 || tensor.dtype == DType::Half;
    const bool has_master = masters != nullptr && !(masters->some && masters->list[i].scalar_type() == dtype);
    STD_TORCH_CHECK(!has_master || sixteen_bit, "rst_fused::", op,
                    ": masters go with bfloat16 and float16 parameters, but parameter ", i, " has dtype ", dtype);
    tensor.remainder = has_master && (masters->some ? masters->list[i].scalar_type() == ScalarType::Short : remainders);
    STD_TORCH_CHECK(!tensor.remainder || tensor.dtype == DType::BFloat16, "rst_fused::", op,
                    ": int16 masters, which are remainders, go with bfloat16 parameters, but parameter ", i,
                    " has dtype ", dtype);
    tensor.state_dtype = has_master ? DType::Float : tensor.dtype;
    tensor.row = static_cast<int>(row);
    View views[kOperands];
    for (const Companion& c : companions) {
      if (c.list.empty()) continue;
      if (c.operand == kMaster && !has_master) continue;
      const bool state = c.operand == kMaster || is_state(c.operand);
      ScalarType expected = has_master && state ? ScalarType::Float : dtype;
      if (c.operand == kMaster && tensor.remainder) expected = ScalarType::Short;
      if (c.rounded && c.list[i].scalar_type() == ScalarType::BFloat16 &&
          (expected == ScalarType::Float || expected == ScalarType::BFloat16)) {
        expected = ScalarType::BFloat16;
        tensor.rounds_state = true;
      }
      check_like(op, c.name, device, i, c.list[i], lead[i], expected);
      views[c.operand] = view_of(c.list[i]);
      if (c.written) check_writable(op, c.name, i, views[c.operand]);
    }
    set_layout(tensor, views);
    tensor.index = static_cast<int64_t>(i);
  }
  table.cut();
  return table;
}

inline const TensorList kNoTensors;

inline const TensorList& backups_or_none(const TensorList& backups, const TensorList& masters) {
  return are_copies(masters) ? kNoTensors : backups;
}

}  // namespace rst
