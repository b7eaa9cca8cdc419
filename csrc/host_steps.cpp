// The steps of a launch plan, once its gradients are taken: norm and perturbation, update, restore.
#include "host_plan.h"

#include <algorithm>

namespace rst {

// Bytes of one stream that take a few milliseconds at most. Threads of Python take turns every five, so they do not miss the
// lock for that long, and giving it up would mean to hold every gradient.
constexpr int64_t kBrief = 8 << 20;

// Runs kernels, without Python's lock unless they are brief; then the gradients are held, for others may drop theirs.
template <class Run>
void Plan::run(Run run) {
  core().bump_versions(held_, count());
  if (gpu_ || table_.bytes.back() < kBrief) {  // a launch is brief, and memory stays until the stream is done with it
    run();
    return;
  }
  struct Slots {  // taken out of the plan: another thread that steps meanwhile needs its own
    HeldTensors& home;
    HeldTensors mine;
    ~Slots() {  // with Python's lock again
      core().empty_slots(mine);
      home.reset(mine.give_away());
    }
  } slots{slots_, taken(slots_)};
  core().fill_slots(slots.mine, grad_handles_.data());
  py::gil_scoped_release unlocked;
  run();
}

bool Plan::perturb(uintptr_t stats, std::vector<double> rho, bool adaptive, double eta, bool stochastic, uint64_t seed,
                   uint64_t step, bool keep) {
  if (!collect(false)) return false;
  Call call;
  call.adaptive = adaptive;
  call.eta = eta;
  call.stochastic = stochastic;
  call.seed = seed;
  call.step = step;
  double* numbers = reinterpret_cast<double*>(stats);
  HeldTensors kept;
  if (keep) {
    kept.reset(taken(first_slots_).give_away());
    core().fill_slots(kept, grad_handles_.data());
  }
  run([&] {
    ops_.grad_norm(table_, call, numbers, device_);
    ops_.perturb(table_, call, numbers, rho.data(), static_cast<int>(rho.size()), device_);
    perturbed_ = true;
  });
  if (keep) {
    first_grads_.reset(kept.give_away());
    note_first_grads();
  }
  core().clear_grads(grad_handles_.data(), count());
  return true;
}

HeldTensors Plan::taken(HeldTensors& slots) const {
  return HeldTensors(slots != 0 ? slots.give_away() : core().make_slots(count()));
}

// The first gradients lie where the table has the gradients, or there are none. Those of the second pass mostly lie alike,
// and `fits` sees where they do not; tensors that are walked by strides are placed anew.
void Plan::note_first_grads() {
  for (Tensor& t : table_.tensors) {
    t.data[kFirstGrad] = first_grads_ != 0 ? t.data[kGrad] : nullptr;
    if (t.strided()) table_.chunks.clear();
  }
}

void Plan::drop_first_grads() {
  if (first_grads_ == 0) return;
  core().empty_slots(first_grads_);
  first_slots_.reset(first_grads_.give_away());
  note_first_grads();
}

bool Plan::first_grads_lost() const {
  return std::any_of(table_.tensors.begin(), table_.tensors.end(), [](const Tensor& t) {
    return t.data[kFirstGrad] != nullptr && t.data[kFirstGrad] == t.data[kGrad];
  });
}

template <class Step>
bool Plan::update(Call& call, bool maximize, bool mixing, double scale, Step step) {
  if (!collect(true)) return false;
  call.direction = (maximize ? -1 : 1) / scale;
  if (!mixing) drop_first_grads();
  if (table_.chunks.empty()) place_all();
  if (first_grads_lost()) return false;
  call.restoring = perturbed_;
  run([&] {
    step();
    perturbed_ = false;
  });
  drop_first_grads();
  return true;
}

static cuda::DeviceNumbers at(const Plan::Addresses& there) {
  cuda::DeviceNumbers numbers;
  numbers.grad_scale = reinterpret_cast<const float*>(there[0]);
  numbers.found_inf = reinterpret_cast<const float*>(there[1]);
  return numbers;
}

bool Plan::sgd_step(const std::vector<std::array<double, 5>>& rows, bool nesterov, bool maximize, bool mixing,
                    double scale, const Addresses& there) {
  std::vector<SgdRow> numbers;
  for (const auto& r : rows) numbers.push_back({r[0], r[1], r[2], r[3], r[4]});
  Call call;
  call.sgd = numbers.data();
  call.nesterov = nesterov;
  const auto numbers_there = at(there);
  return update(call, maximize, mixing, scale, [&] { ops_.sgd_step(table_, call, numbers_there, device_); });
}

bool Plan::adam_step(const std::vector<std::array<double, 7>>& rows, bool decoupled, bool maximize, bool mixing,
                     double scale, const Addresses& there) {
  std::vector<AdamRow> numbers;
  for (const auto& r : rows) numbers.push_back({r[0], r[1], r[2], r[3], r[4], r[5], r[6]});
  Call call;
  call.adam = numbers.data();
  call.decoupled = decoupled;
  const auto numbers_there = at(there);
  return update(call, maximize, mixing, scale, [&] { ops_.adam_step(table_, call, numbers_there, device_); });
}

bool Plan::restore() {
  if (!perturbed_) return true;
  if (!core().in_place(held_, 0, count(), places_.data()) || !companions_in_place(true)) return false;
  for (size_t i = 0; i < entries_.size(); ++i) {  // without gradients, which may be gone
    View views[kStreams];
    for (Stream s : {kParam, kBackup, kMaster}) views[s] = views_[i][s];
    place(table_.tensors[i], views);
  }
  cut();
  if (!alike_) return false;
  core().bump_versions(held_, count());
  ops_.restore(table_, Call{}, device_);
  HeldTensors dropped(hand_over());
  return true;
}

int64_t Plan::hand_over() {
  perturbed_ = false;
  table_.chunks.clear();
  return first_grads_.give_away();
}

}  // namespace rst
