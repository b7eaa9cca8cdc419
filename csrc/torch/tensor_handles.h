// What a launch plan asks of tensors and gradients at every step. See plan_api.h for what each function promises.
#pragma once

#include "torch/plan_api.h"

namespace rst {

bool facts_of(AtenTensorHandle handle, TensorFacts& facts);
void set_impl_layout(const ImplLayout& layout);
bool in_place(const TensorRef* tensors, int64_t begin, int64_t end, const TensorFacts* layouts, KnownWords* words);
bool read_grads(const TensorRef* tensors, int64_t count, const TensorFacts* layouts, KnownWords* words,
                AtenTensorHandle* grads, KnownWords* grad_words, SeenGrad* seen, void* context);
bool has_grads(const TensorRef* tensors, int64_t count);
void clear_grads(const AtenTensorHandle* grads, int64_t count);
void bump_versions(const TensorRef* tensors, int64_t count);

void* make_slots(int64_t count);
void fill_slots(void* slots, const AtenTensorHandle* grads);
AtenTensorHandle slot(void* slots, int64_t index);
bool read_slots(void* slots, KnownWords* grad_words, SeenGrad* seen, void* context);
void empty_slots(void* slots);
void release_slots(void* slots);

}  // namespace rst
