// The steps of a launch plan, after the tensors were validated: norm and perturbation, update, restore.
#include "plan/plan.h"

#include <algorithm>

namespace rst {

// Bytes of one operand that take a few milliseconds at most. Python's threads take turns every five milliseconds, so
// they can wait for the lock that long, and releasing it would mean holding every gradient.
constexpr int64_t kBrief = 8 << 20;

// Runs kernels: brief ones with Python's lock, others without it. Then the gradients are held, since other threads may
// drop them.
template <class Run>
void Plan::run(Run run) {
  core().bump_versions(held_, count());
  if (gpu_ || table_.bytes.back() < kBrief) {  // a launch is brief, and memory stays until the stream is done with it
    run();
    return;
  }
  struct Slots {  // taken out of the plan: another thread that steps meanwhile needs its own
    TensorListHandle& home;
    TensorListHandle mine;
    ~Slots() {  // with Python's lock again
      core().empty_slots(mine);
      home.reset(mine.release());
    }
  } slots{slots_, taken(slots_)};
  core().fill_slots(slots.mine, grad_handles_.data());
  py::gil_scoped_release unlocked;
  run();
}

bool Plan::perturb(uintptr_t stats, std::vector<double> rho, bool adaptive, double eta, bool stochastic, uint64_t seed,
                   uint64_t step, bool keep) {
  if (!collect(false)) return false;
  OpParams params;
  params.adaptive = adaptive;
  params.eta = eta;
  params.stochastic = stochastic;
  params.seed = seed;
  params.step = step;
  double* stats_data = reinterpret_cast<double*>(stats);
  TensorListHandle kept;
  if (keep) {
    kept.reset(taken(first_slots_).release());
    core().fill_slots(kept, grad_handles_.data());
  }
  run([&] {
    ops_.grad_norm(table_, params, stats_data, device_);
    ops_.perturb(table_, params, stats_data, rho.data(), static_cast<int>(rho.size()), device_);
    perturbed_ = true;
  });
  if (keep) {
    first_grads_.reset(kept.release());
    note_first_grads();
  }
  core().clear_grads(grad_handles_.data(), count());
  return true;
}

TensorListHandle Plan::taken(TensorListHandle& slots) const {
  return TensorListHandle(slots != 0 ? slots.release() : core().make_slots(count()));
}

// The first gradients are where the table has the gradients, or there are none. Those of the second pass mostly have
// the same layout, and `fits` sees where they do not. For tensors that are visited by strides the table is rebuilt.
void Plan::note_first_grads() {
  for (Tensor& t : table_.tensors) {
    t.data[kFirstGrad] = first_grads_ != 0 ? t.data[kGrad] : nullptr;
    if (t.strided()) table_.chunks.clear();
  }
}

void Plan::drop_first_grads() {
  if (first_grads_ == 0) return;
  core().empty_slots(first_grads_);
  first_slots_.reset(first_grads_.release());
  note_first_grads();
}

bool Plan::first_grads_lost() const {
  return std::any_of(table_.tensors.begin(), table_.tensors.end(),
                     [](const Tensor& t) { return t.has(kFirstGrad) && t.data[kFirstGrad] == t.data[kGrad]; });
}

bool Plan::update(int rule, const std::vector<std::vector<double>>& hyperparams, bool flag, bool maximize, bool mixing,
                  double scale, const Addresses& on_device) {
  if (rule < 0 || rule >= kRules) throw py::index_error("rule is not the number of a base optimizer");
  std::vector<double> rows;
  for (const auto& row : hyperparams) {
    if (static_cast<int>(row.size()) != kRuleInfos[rule].row_size()) {
      throw py::value_error("hyperparams do not have the columns of the rule");
    }
    rows.insert(rows.end(), row.begin(), row.end());
  }
  if (!collect(true)) return false;
  if (!mixing) drop_first_grads();
  if (table_.chunks.empty()) set_all_layouts();
  if (first_grads_lost()) return false;
  OpParams params;
  params.rule = rule;
  params.flag = flag;
  params.hyperparams = rows.data();
  params.grad_multiplier = (maximize ? -1 : 1) / scale;
  params.restoring = perturbed_;
  cuda::DeviceScalars scalars;
  scalars.grad_scale = reinterpret_cast<const float*>(on_device[0]);
  scalars.found_inf = reinterpret_cast<const float*>(on_device[1]);
  run([&] {
    ops_.update(table_, params, scalars, device_);
    perturbed_ = false;
  });
  drop_first_grads();
  return true;
}

bool Plan::restore() {
  if (!perturbed_) return true;
  if (!core().in_place(held_, 0, count(), layouts_.data()) || !companions_in_place(true)) return false;
  for (size_t i = 0; i < entries_.size(); ++i) {  // without the gradients, which may be gone
    View views[kOperands];
    for (Operand operand : {kParam, kBackup, kMaster}) views[operand] = views_[i][operand];
    set_layout(table_.tensors[i], views);
  }
  cut();
  if (!same_layout_) return false;
  core().bump_versions(held_, count());
  ops_.restore(table_, OpParams{}, device_);
  TensorListHandle dropped(hand_over());
  return true;
}

int64_t Plan::hand_over() {
  perturbed_ = false;
  table_.chunks.clear();
  return first_grads_.release();
}

}  // namespace rst
