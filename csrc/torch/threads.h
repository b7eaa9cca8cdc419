// Runs kernels on torch's own threads: as many as torch.set_num_threads allows.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include "torch/plan_api.h"

namespace rst {

inline Threads torch_threads() {
  uint32_t count = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  struct Work {
    void (*fn)(int, void*);
    void* context;
  };
  return {static_cast<int>(count), [](int n, void (*fn)(int, void*), void* context) {
            Work work{fn, context};
            auto range = [](int64_t begin, int64_t end, void* w) {
              const Work& work = *static_cast<Work*>(w);
              for (int64_t k = begin; k < end; ++k) work.fn(static_cast<int>(k), work.context);
            };
            TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, 1, range, &work));
          }};
}

// An op of cpu/run.h, as CoreOps has it.
template <void (*op)(const Table&, const OpParams&, const Threads&)>
void on_threads(const Table& table, const OpParams& params, int32_t) {
  op(table, params, torch_threads());
}

constexpr CoreOps kCpuOps{on_threads<grad_norm>, on_threads<perturb>, on_threads<restore>, on_threads<update>};

}  // namespace rst
