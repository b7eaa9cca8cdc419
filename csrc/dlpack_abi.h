// The part of DLPack 1.x (https://dmlc.github.io/dlpack) that reads a Python tensor from C without making an object:
// type(tensor).__dlpack_c_exchange_api__, which torch offers from 2.11 on. Layouts are fixed by that standard.
#pragma once

#include <cstdint>

namespace rst::dlpack {

struct Device {
  int32_t type;  // 1: CPU
  int32_t index;
};
struct DataType {
  uint8_t code;  // 2: float, 4: bfloat16, 5: complex
  uint8_t bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* sizes;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* object, Tensor* out);  // 0: done; else a Python error is set
  void* current_work_stream;
};
constexpr const char* kCapsule = "dlpack_exchange_api";
constexpr uint32_t kMajor = 1;

}  // namespace rst::dlpack
