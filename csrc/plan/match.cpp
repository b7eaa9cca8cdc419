// Whether the tensors of a launch plan are those that it was made for, and where the gradients are.
#include "plan/plan.h"

#include <algorithm>

namespace rst {

bool Plan::fits(size_t index, const TensorFacts& grad) {
  if (!is_like(grad, layouts_[index])) return false;
  if (!equal(grad.strides, grad_strides_[index], grad.ndim)) {
    std::copy(grad.strides, grad.strides + grad.ndim, grad_strides_[index]);
    table_.chunks.clear();  // the table must be rebuilt
  }
  table_.tensors[index].data[kGrad] = grad.data;
  return true;
}

void Plan::set_all_layouts(bool mixing) {
  for (size_t i = 0; i < grad_strides_.size(); ++i) {
    View views[kOperands];
    for (int s = 0; s < kOperands; ++s) views[s] = views_[i][s];
    views[kBackup] = backup_of(i);
    views[kGrad] = {table_.tensors[i].data[kGrad], views[kParam].ndim, views[kParam].sizes, grad_strides_[i]};
    if (mixing) {
      TensorFacts g;
      tensors().facts_in_slot(first_->slots.get(), static_cast<int64_t>(i), g);  // which were compared before
      views[kFirstGrad] = g;
      first_grads_differ_ = first_grads_differ_ || !equal(g.strides, grad_strides_[i], g.ndim);
    }
    set_layout(table_.tensors[i], views);
  }
  mixes_ = mixing;
  cut();
}

void Plan::cut() {
  table_.cut();
  const auto& tensors = table_.tensors;
  same_layout_ = !gpu_ || std::none_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.strided(); });
  for (Part& part : parts_) {
    part.table.tensors.clear();
    for (size_t i : part.members) part.table.tensors.push_back(tensors[i]);
    part.table.cut();
  }
}

const Table& Plan::renewed(Part& part) {
  for (size_t k = 0; k < part.members.size(); ++k) {
    part.table.tensors[k].data[kGrad] = table_.tensors[part.members[k]].data[kGrad];
  }
  return part.table;
}

bool Plan::in_place(int64_t begin, int64_t end) {
  return tensors().in_place(tensors_.data(), begin, end, layouts_.data(), words_.data(), !gpu_);
}

bool Plan::read_grads() {
  const auto seen = [](void* context, int64_t i, void* data, const TensorFacts* grad) {
    Plan& plan = *static_cast<Plan*>(context);
    const auto index = static_cast<size_t>(i);
    if (grad != nullptr) return plan.fits(index, *grad);
    plan.table_.tensors[index].data[kGrad] = data;
    return true;
  };
  return tensors().read_grads(tensors_.data(), count(), layouts_.data(), words_.data(), grad_handles_.data(),
                              grad_words_.data(), seen, this, !gpu_);
}

bool Plan::read_first_grads() {
  if (std::exchange(first_grads_differ_, false)) table_.chunks.clear();
  const auto seen = [](void* context, int64_t i, void* data, const TensorFacts* facts) {
    Plan& plan = *static_cast<Plan*>(context);
    const auto index = static_cast<size_t>(i);
    Tensor& tensor = plan.table_.tensors[index];
    if (facts != nullptr || plan.first_grad_words_[index] != plan.grad_words_[index]) {
      TensorFacts g;
      if (!tensors().facts_in_slot(plan.first_->slots.get(), i, g) || !is_like(g, plan.layouts_[index])) return false;
      if (!equal(g.strides, plan.grad_strides_[index], g.ndim)) plan.table_.chunks.clear();
    }
    tensor.data[kFirstGrad] = data;
    return data == nullptr || data != tensor.data[kGrad];
  };
  return tensors().read_slots(first_->slots.get(), first_grad_words_.data(), seen, this);
}

// For tensors that are visited by strides the table is rebuilt. A perturbation may find first gradients in it, which it
// does not read.
void Plan::set_mixing(bool mixing) {
  mixes_ = mixing;
  for (Tensor& t : table_.tensors) {
    if (!mixing) t.data[kFirstGrad] = nullptr;
    if (t.strided()) table_.chunks.clear();
  }
}

bool Plan::steps_differ() const {
  for (size_t a = 0; a < counters(); ++a) {
    for (size_t b = 0; b < a; ++b) {
      if (row_groups_[a] == row_groups_[b] && counter(b) == counter(a)) return false;
    }
  }
  return true;
}

bool Plan::collect(bool updating, bool restores, bool mixing) {
  if (!read_grads()) return false;
  const bool reads_backups = restores || !updating;
  if (!in_place(count(), reads_backups ? backups_end_ : masters_end_) || !steps_differ()) return false;
  if (updating && !in_place(backups_end_, static_cast<int64_t>(tensors_.size()))) return false;
  if ((updating || masters_end_ > counters_end_) && !same_state()) return false;
  if (tensors().has_grads(idle_tensors_.data(), static_cast<int64_t>(idle_tensors_.size()))) return false;
  if (!updating && !own_gradients()) return false;
  if (updating && mixing != mixes_) set_mixing(mixing);
  if (mixing && !read_first_grads()) return false;
  if (table_.chunks.empty()) set_all_layouts(mixing);
  return same_layout_;
}

bool Plan::collect_for_norm() {
  if (!read_grads() || !in_place(counters_end_, masters_end_)) return false;
  if (masters_end_ > counters_end_ && !same_state()) return false;
  if (tensors().has_grads(idle_tensors_.data(), static_cast<int64_t>(idle_tensors_.size()))) return false;
  if (table_.chunks.empty()) set_all_layouts(false);
  return same_layout_;
}

}  // namespace rst
