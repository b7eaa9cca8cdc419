// The steps of a launch plan, once its gradients are taken: norm and perturbation, update, restore.
#include "host_plan.h"

namespace rst {

void Plan::perturb(uintptr_t stats, std::vector<double> rho, bool adaptive, double eta, bool stochastic, uint64_t seed,
                   uint64_t step, bool keep) {
  Call call;
  call.adaptive = adaptive;
  call.eta = eta;
  call.stochastic = stochastic;
  call.seed = seed;
  call.step = step;
  double* numbers = reinterpret_cast<double*>(stats);
  {
    py::gil_scoped_release unlocked;
    core().grad_norm(table_, call, numbers);
    core().perturb(table_, call, numbers, rho.data(), static_cast<int>(rho.size()));
    perturbed_ = true;
  }
  if (keep) {
    drop(first_grads_);
    first_grads_.swap(grads_);
    table_.chunks.clear();
  }
  drop(grads_);
}

void Plan::begin_update(Call& call, bool maximize, bool mixing) {
  call.direction = maximize ? -1 : 1;
  if (!mixing && !first_grads_.empty()) {
    drop(first_grads_);
    place_all();
  }
  for (size_t i = 0; i < entries_.size(); ++i) {  // a base step reads w itself
    table_.tensors[i].data[kBackup] = perturbed_ ? views_[i][kBackup].data : nullptr;
  }
}

void Plan::end_update() {
  for (size_t i = 0; i < entries_.size(); ++i) table_.tensors[i].data[kBackup] = views_[i][kBackup].data;
  if (!first_grads_.empty()) {
    drop(first_grads_);
    table_.chunks.clear();
  }
  drop(grads_);
}

void Plan::sgd_step(const std::vector<std::array<double, 5>>& rows, bool nesterov, bool maximize, bool mixing) {
  std::vector<SgdRow> numbers;
  for (const auto& r : rows) numbers.push_back({r[0], r[1], r[2], r[3], r[4]});
  Call call;
  call.sgd = numbers.data();
  call.nesterov = nesterov;
  begin_update(call, maximize, mixing);
  {
    py::gil_scoped_release unlocked;
    core().sgd_step(table_, call);
    perturbed_ = false;
  }
  end_update();
}

void Plan::adam_step(const std::vector<std::array<double, 7>>& rows, bool decoupled, bool maximize, bool mixing) {
  std::vector<AdamRow> numbers;
  for (const auto& r : rows) numbers.push_back({r[0], r[1], r[2], r[3], r[4], r[5], r[6]});
  Call call;
  call.adam = numbers.data();
  call.decoupled = decoupled;
  begin_update(call, maximize, mixing);
  {
    py::gil_scoped_release unlocked;
    core().adam_step(table_, call);
    perturbed_ = false;
  }
  end_update();
}

bool Plan::restore() {
  if (!perturbed_) return true;
  if (!in_place(true)) return false;
  for (size_t i = 0; i < entries_.size(); ++i) {  // without gradients, which may be gone
    View views[kStreams];
    for (Stream s : {kParam, kBackup, kMaster}) views[s] = views_[i][s];
    place(table_.tensors[i], views);
  }
  table_.cut();
  core().restore(table_, Call{});
  hand_over();
  return true;
}

py::list Plan::hand_over() {
  py::list kept;
  for (PyObject* grad : first_grads_) kept.append(py::handle(grad));
  perturbed_ = false;
  drop(grads_);
  drop(first_grads_);
  table_.chunks.clear();
  return kept;
}

}  // namespace rst
