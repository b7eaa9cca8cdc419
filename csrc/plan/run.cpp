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
  core().bump_versions(tensors_.data(), count());
  if (gpu_ || table_.bytes.back() < kBrief) {  // a launch is brief, and memory stays until the stream is done with it
    run();
    return;
  }
  struct Held {  // taken out of the plan: another thread that steps meanwhile needs its own
    Slots& home;
    Slots mine;
    ~Held() {  // with Python's lock again
      core().empty_slots(mine);
      home.reset(mine.release());
    }
  } held{slots_, Slots(slots_ != 0 ? slots_.release() : core().make_slots(count()))};
  core().fill_slots(held.mine, grad_handles_.data());
  py::gil_scoped_release unlocked;
  run();
}

void Plan::become(const py::dict& after) {
  PyObject *name, *value;
  for (Py_ssize_t at = 0; PyDict_Next(after.ptr(), &at, &name, &value);) {
    if (PyObject_SetAttr(step_state_.ptr(), name, value) != 0) throw py::error_already_set();
  }
}

bool Plan::perturb(uintptr_t stats, std::vector<double> rho, bool adaptive, double eta, bool stochastic, uint64_t seed,
                   uint64_t step, bool keep, const py::dict& after) {
  if (!collect(false, false, nullptr)) return false;
  if (rho.size() != row_count()) throw py::value_error("rho does not have a number for each row");
  OpParams params;
  params.adaptive = adaptive;
  params.eta = eta;
  params.stochastic = stochastic;
  params.seed = seed;
  params.step = step;
  double* stats_data = reinterpret_cast<double*>(stats);
  py::object kept;
  if (keep) kept = first_grads_with(grad_handles_.data());
  run([&] {
    ops_.grad_norm(table_, params, stats_data, device_);
    ops_.perturb(table_, params, stats_data, rho.data(), static_cast<int>(rho.size()), device_);
  });
  become(after);
  if (keep) {
    step_state_.attr("first_grads") = kept;
    note_first_grads(kept.cast<FirstGrads*>());
  }
  core().clear_grads(grad_handles_.data(), count());
  return true;
}

static uint64_t last_id = 0;

FirstGrads::FirstGrads(int64_t slots, py::list params) : id(++last_id), slots(slots), params(std::move(params)) {}

py::dict FirstGrads::by_parameter() const {
  py::dict found;
  const py::list grads =
      py::module_::import("torch").attr("ops").attr("rst_fused").attr("_tensors_in_slots")(static_cast<int64_t>(slots));
  for (size_t i = 0; i < params.size(); ++i) found[params[i]] = grads[i];
  return found;
}

py::object Plan::first_grads_of(const py::dict& by_parameter) {
  std::vector<void*> handles;
  for (const py::handle& param : active_) handles.push_back(tensor_ref(by_parameter[param]).handle);
  return first_grads_with(handles.data());
}

py::object Plan::first_grads_with(void* const* handles) {
  const int64_t slots = first_slots_ != 0 ? first_slots_.release() : core().make_slots(count());
  py::object made = py::cast(std::make_unique<FirstGrads>(slots, active_));
  core().fill_slots(slots, handles);
  return made;
}

FirstGrads* Plan::first_grads_in(const py::object& given) const {
  if (!py::isinstance<FirstGrads>(given)) return nullptr;
  auto* const first = given.cast<FirstGrads*>();
  return first->params.is(active_) ? first : nullptr;
}

// Whether they are tensors like the gradients; and where the table knows them, whether they are still there. The table
// goes on only if each has the strides of its second gradient.
bool Plan::first_grads_in_place(const FirstGrads& first) {
  struct Context {
    Plan& plan;
    const FirstGrads& first;
    const bool noted;
  } context{*this, first, first.id == first_grads_id_ && !table_.chunks.empty()};
  const auto seen = [](void* given, int64_t i, void* data, const TensorFacts* facts) {
    const auto& [plan, first, noted] = *static_cast<Context*>(given);
    const auto index = static_cast<size_t>(i);
    if (facts != nullptr || plan.first_grad_words_[index] != plan.grad_words_[index]) {
      const Entry& entry = plan.entries_[index];
      TensorFacts g;
      if (!core().facts_of(core().slot(first.slots, i), g) || g.dtype != entry.dtype || g.device != plan.device_ ||
          g.ndim != entry.ndim || !equal(g.sizes, entry.sizes(), g.ndim)) {
        return false;
      }
      if (!equal(g.strides, entry.grad_strides(), g.ndim)) plan.table_.chunks.clear();
    }
    return !noted || data == plan.table_.tensors[index].data[kFirstGrad];
  };
  return core().read_slots(first.slots, first_grad_words_.data(), seen, &context);
}

// The first gradients are where the table has the gradients, or there are none. Those of the second pass mostly have
// the same layout, and first_grads_in_place sees where they do not. For tensors that are visited by strides the table
// is rebuilt.
void Plan::note_first_grads(const FirstGrads* first) {
  first_grads_id_ = first == nullptr ? 0 : first->id;
  for (Tensor& t : table_.tensors) {
    t.data[kFirstGrad] = first != nullptr ? t.data[kGrad] : nullptr;
    if (t.strided()) table_.chunks.clear();
  }
}

bool Plan::first_grads_lost() const {
  return std::any_of(table_.tensors.begin(), table_.tensors.end(),
                     [](const Tensor& t) { return t.has(kFirstGrad) && t.data[kFirstGrad] == t.data[kGrad]; });
}

bool Plan::update(std::vector<double> rows, bool restores, bool mixing, double scale, const Addresses& on_device,
                  const py::dict& after) {
  const py::object kept =
      mixing ? step_state_.attr("first_grads") : py::object();  // until the end, when StepState drops it
  FirstGrads* const first = mixing ? first_grads_in(kept) : nullptr;
  if (mixing && first == nullptr) return false;
  if (!collect(true, restores, first) || (first != nullptr && first_grads_lost())) return false;
  const RuleInfo& rule = kRuleInfos[rule_];
  if (rows.size() != row_count() * rule.columns) throw py::value_error("rows do not have the columns of the rule");
  if (rule.counts_steps) {  // the number of this step comes last in each row
    for (size_t row = 0; row < counters_.size(); ++row) {
      rows.insert(rows.begin() + static_cast<int64_t>((row + 1) * rule.row_size() - 1), *counter(row) + 1.0);
    }
  }
  OpParams params;
  params.rule = rule_;
  params.flag = option_;
  params.hyperparams = rows.data();
  params.grad_multiplier = (maximize_ ? -1 : 1) / scale;
  params.restoring = restores;
  cuda::DeviceScalars scalars;
  scalars.grad_scale = reinterpret_cast<const float*>(on_device[0]);
  scalars.found_inf = reinterpret_cast<const float*>(on_device[1]);
  run([&] { ops_.update(table_, params, scalars, device_); });
  for (size_t row = 0; row < counters_.size(); ++row) *counter(row) += 1;
  core().bump_versions(counters_.data(), static_cast<int64_t>(counters_.size()));
  become(after);
  if (first != nullptr) {
    core().empty_slots(first->slots);
    first_slots_.reset(first->slots.release());
    note_first_grads(nullptr);
  }
  return true;
}

bool Plan::restore(const py::dict& after) {
  if (!in_place(0, backups_end_) || (masters_end_ > count() && !same_state())) return false;
  for (size_t i = 0; i < entries_.size(); ++i) {  // without the gradients, which may be gone
    View views[kOperands];
    for (Operand operand : {kParam, kBackup, kMaster}) views[operand] = views_[i][operand];
    set_layout(table_.tensors[i], views);
  }
  cut();
  const bool served = same_layout_;
  if (served) {
    core().bump_versions(tensors_.data(), count());
    ops_.restore(table_, OpParams{}, device_);
    become(after);
  }
  table_.chunks.clear();
  first_grads_id_ = 0;
  return served;
}

}  // namespace rst
