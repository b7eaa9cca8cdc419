// Lists of tensors that launch plans hold between steps, by handle, and what a plan asks of them at every step. See
// plan_api.h for what each function promises.
#pragma once

#include "torch/plan_api.h"

namespace rst {

bool facts_of(int64_t handle, int64_t index, TensorFacts& facts);
bool in_place(int64_t handle, int64_t begin, int64_t end, const ExpectedLayout* layouts);
void release(int64_t handle);

bool read_grads(int64_t handle, int64_t count, const ExpectedLayout* layouts, void** grads, SeenGrad* seen,
                void* context);
bool has_grads(int64_t handle, int64_t begin);
void clear_grads(void* const* grads, int64_t count);
int64_t make_slots(int64_t count);
void fill_slots(int64_t slots, void* const* grads);
void empty_slots(int64_t slots);
void bump_versions(int64_t handle, int64_t count);

}  // namespace rst
