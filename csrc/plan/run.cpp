// The steps of a launch plan, after the tensors were validated: norm and perturbation, update, restore.
#include "plan/plan.h"

#include <algorithm>
#include <cstring>

namespace rst {

// Bytes of one operand that take a few milliseconds at most. Python's threads take turns every five milliseconds, so
// they can wait for the lock that long, and releasing it would mean holding every gradient.
constexpr int64_t kBrief = 8 << 20;

// Runs kernels: brief ones with Python's lock, others without it. Then the gradients are held, since other threads may
// drop them.
template <class Run>
void Plan::run(Run run) {
  if (gpu_ || table_.bytes.back() < kBrief) {  // a launch is brief, and memory stays until the stream is done with it
    run();
    return;
  }
  struct Held {  // taken out of the plan: another thread that steps meanwhile needs its own
    Slots& home;
    Slots mine;
    ~Held() {  // with Python's lock again
      tensors().empty_slots(mine.get());
      home = std::move(mine);
    }
  } held{slots_, slots_ ? std::move(slots_) : Slots(tensors().make_slots(count()))};
  tensors().fill_slots(held.mine.get(), grad_handles_.data());
  py::gil_scoped_release unlocked;
  run();
}

void Plan::become(const py::dict& after) {
  PyObject *name, *value;
  for (Py_ssize_t at = 0; PyDict_Next(after.ptr(), &at, &name, &value);) {
    if (PyObject_SetAttr(step_state_.ptr(), name, value) != 0) throw py::error_already_set();
  }
}

static PyObject* name_of_first_grads() {
  static PyObject* const name = PyUnicode_InternFromString("first_grads");
  return name;
}

bool Plan::perturb(uintptr_t stats, std::vector<double> rho, bool adaptive, double eta, bool stochastic, uint64_t seed,
                   uint64_t step, bool keep, bool measured, const py::dict& after) {
  release_first_grads();
  const bool swaps = !swapped_.empty();
  if (swaps && (keep || kept_slots_->users > 0)) return false;
  if (!collect(false, false, false)) return false;
  if (rho.size() != row_count()) throw py::value_error("rho does not have a number for each row");
  OpParams params;
  params.adaptive = adaptive;
  params.eta = eta;
  params.stochastic = stochastic;
  params.seed = seed;
  params.step = step;
  params.stats = reinterpret_cast<double*>(stats);
  params.rhos = rho.data();
  py::object kept;
  if (keep) kept = first_grads_with(grad_handles_.data());
  const UsesKept uses(kept_slots_);
  if (swaps) {  // first: not even another thread may see weights in a gradient
    kept_slots_->take(swapped_grads_.data());
  }
  change_weights();
  try {
    run([&] {
      if (!measured) ops_.grad_norm(table_, params, device_, op_cache_.get());
      ops_.perturb(table_, params, device_, op_cache_.get());
    });
  } catch (...) {  // the weights are back
    if (swaps) kept_slots_->clear();
    throw;
  }
  become(after);
  if (keep && PyObject_SetAttr(step_state_.ptr(), name_of_first_grads(), kept.ptr()) != 0) {
    throw py::error_already_set();
  }
  if (swapped_.size() < grad_handles_.size()) tensors().clear_grads(grad_handles_.data(), count());
  return true;
}

py::list KeptGrads::as_list() const {
  const py::object ops = py::module_::import("torch").attr("ops").attr("rst_fused");
  return ops.attr("_tensors_in_slots")(reinterpret_cast<intptr_t>(slots.get()));
}

py::object Plan::first_grads_of(const py::dict& by_parameter) {
  std::vector<AtenTensorHandle> handles;
  for (const py::handle& param : active_) handles.push_back(tensor_ref(by_parameter[param]).handle);
  return first_grads_with(handles.data());
}

py::object Plan::first_grads_with(const AtenTensorHandle* handles) {
  if (first_ == nullptr || first_grads_.ref_count() > 1) {
    first_grads_ = py::cast(std::make_unique<KeptGrads>(tensors().make_slots(count())));
    first_ = first_grads_.cast<KeptGrads*>();
  }
  first_grads_kept_ = true;
  tensors().fill_slots(first_->slots.get(), handles);
  return first_grads_;
}

void Plan::release_first_grads() {
  if (!first_grads_kept_ || first_grads_.ref_count() > 1) return;
  first_grads_kept_ = false;
  first_->clear();
}

// Whether StepState has those that this plan keeps.
bool Plan::has_first_grads() const {
  const auto kept = py::reinterpret_steal<py::object>(PyObject_GetAttr(step_state_.ptr(), name_of_first_grads()));
  if (!kept) throw py::error_already_set();
  return first_ != nullptr && kept.is(first_grads_);
}

bool Plan::update(std::vector<double> rows, bool restores, bool mixing, double scale, uintptr_t grad_scale,
                  uintptr_t found_inf, uint64_t seed, uint64_t step, const py::dict& after) {
  if (mixing && !has_first_grads()) return false;
  py::object first_grads = first_grads_;  // another thread may step while this one computes
  if (!restores) {
    forget_kept();
  } else if (!read_kept()) {
    return false;
  }
  if (!collect(true, restores, mixing)) return false;
  const size_t columns = kRuleInfos[rule_].columns;
  if (rows.size() != row_count() * columns) throw py::value_error("rows do not have the columns of the rule");
  std::vector<double> steps;
  for (size_t row = 0; row < counters(); ++row) steps.push_back(counter(row) + 1.0);
  OpParams params;
  params.rule = rule_;
  params.flag = option_;
  params.hyperparams = rows.data();
  params.steps = steps.empty() ? nullptr : steps.data();
  params.grad_multiplier = (maximize_ ? -1 : 1) / scale;
  params.restoring = restores;
  params.seed = seed;
  params.step = step;
  params.on_device.grad_scale = reinterpret_cast<const float*>(grad_scale);
  params.on_device.found_inf = reinterpret_cast<const float*>(found_inf);
  const UsesKept uses(kept_slots_);
  change_weights();
  run([&] { ops_.update(table_, params, device_, op_cache_.get()); });
  for (size_t row = 0; row < counters(); ++row) counter(row) += 1;
  tensors().bump_versions(tensors_.data() + count(), static_cast<int64_t>(counters()));
  become(after);
  if (restores && kept_slots_ != nullptr) kept_slots_->clear();
  first_grads = py::none();
  release_first_grads();
  return true;
}

bool Plan::restore(const py::dict& after) {
  if (!in_place(0, count()) || !in_place(counters_end_, backups_end_)) return false;
  if (masters_end_ > counters_end_ && !same_state()) return false;
  if (!read_kept()) return false;
  for (size_t i = 0; i < grad_strides_.size(); ++i) {  // without the gradients, which may be gone
    View views[kOperands];
    for (Operand operand : {kParam, kMaster}) views[operand] = views_[i][operand];
    views[kBackup] = backup_of(i);
    set_layout(table_.tensors[i], views);
  }
  cut();
  const bool served = same_layout_;
  if (served) {
    change_weights();
    ops_.restore(table_, OpParams{}, device_, nullptr);  // rare
    become(after);
    if (kept_slots_ != nullptr) kept_slots_->clear();
    release_first_grads();
  }
  table_.chunks.clear();
  return served;
}

bool Plan::grad_norm(uintptr_t stats, int64_t part, bool adaptive, double eta) {
  if (part < 0) throw py::index_error("part is negative");
  if (!collect_for_norm()) return false;
  OpParams params;
  params.adaptive = adaptive;
  params.eta = eta;
  params.stats = reinterpret_cast<double*>(stats);
  const bool whole = parts_.empty() && part == 0, known = part < static_cast<int64_t>(parts_.size());
  const Table& table = whole ? table_ : known ? renewed(parts_[part]) : nothing_;
  void* const cache = whole ? op_cache_.get() : known ? parts_[part].cache.get() : nullptr;
  run([&] { ops_.grad_norm(table, params, device_, cache); });
  return true;
}

py::object Plan::held() {
  if (slots_ == nullptr) slots_.reset(tensors().make_slots(count()));
  tensors().fill_slots(slots_.get(), grad_handles_.data());
  py::bytes addresses(nullptr, static_cast<size_t>(count()) * sizeof(void*));
  char* const to = PyBytes_AS_STRING(addresses.ptr());
  for (size_t i = 0; i < grad_handles_.size(); ++i) {
    std::memcpy(to + i * sizeof(void*), &table_.tensors[i].data[kGrad], sizeof(void*));
  }
  return addresses;
}

void Plan::release() {
  if (slots_ != nullptr) tensors().empty_slots(slots_.get());
}

}  // namespace rst
