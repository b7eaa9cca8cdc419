// Runs kernels on torch's own threads: as many as torch.set_num_threads allows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "torch/plan_api.h"

namespace rst {

inline Threads torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()), [](int n, void (*fn)(int, void*), void* context) {
            torch::stable::parallel_for(0, n, 1, [fn, context](int64_t begin, int64_t end) {
              for (int64_t k = begin; k < end; ++k) fn(static_cast<int>(k), context);
            });
          }};
}

// An op of cpu/run.h, as CoreOps has it.
template <void (*op)(const Table&, const OpParams&, const Threads&)>
void on_threads(const Table& table, const OpParams& params, int32_t, void*) {
  op(table, params, torch_threads());
}

constexpr CoreOps kCpuOps{
    on_threads<grad_norm>,
    on_threads<perturb>,
    on_threads<restore>,
    on_threads<update>,
    [](const double* squares, int64_t count, double* stats, int32_t) { finish_norm(squares, count, stats); },
    nullptr,
    nullptr};

}  // namespace rst
