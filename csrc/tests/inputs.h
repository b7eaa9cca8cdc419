// What several C++ tests need to run an op: threads, and values of any dtype.
#pragma once

#include <cstring>
#include <thread>
#include <vector>

#include "cpu/run.h"

inline void run_threads(int n, void (*fn)(int, void*), void* context) {
  std::vector<std::thread> pool;
  for (int k = 0; k < n; ++k) pool.emplace_back(fn, k, context);
  for (std::thread& thread : pool) thread.join();
}

// Writes element i of an operand, in its dtype: bfloat16 without rounding.
inline void put(const rst::Tensor& tensor, int operand, int64_t i, double value) {
  const rst::DType type = tensor.dtype_of(operand);
  const float single = static_cast<float>(value);
  const uint16_t top = static_cast<uint16_t>(rst::to_bits(single) >> 16), half = rst::float_to_half_bits(single);
  const void* const as[rst::kDTypes] = {&single, &value, &top, &half};  // in the order of DType
  const int64_t size = rst::size_of(type);
  std::memcpy(static_cast<char*>(tensor.data[operand]) + i * size, as[static_cast<int>(type)], size);
}
