// Whether a launch plan still fits: parameters, gradients, state and hyperparameters.
#include "plan/plan.h"

#include <algorithm>

namespace rst {

namespace {

const CoreApi* core_api = nullptr;

}  // namespace

void connect(py::object core) {
  core_api = static_cast<const CoreApi*>(PyCapsule_GetPointer(core.ptr(), kCoreCapsule));
  if (core_api == nullptr) throw py::error_already_set();
}

const CoreApi& core() { return *core_api; }
bool can_plan() { return core_api->has_autograd_symbols(); }

void TensorListHandle::reset(int64_t handle) {
  const int64_t before = std::exchange(handle_, handle);
  if (before != 0) core().release(before);
}

Plan::Plan(bool gpu, py::list groups, py::list everything, py::list active, std::vector<int64_t> sizes, int64_t handle,
           int64_t watched, int64_t idle, const Positions& masters, const std::vector<Positions>& states,
           const Positions& backups, py::dict state)
    : ops_(gpu ? *core().gpu : core().cpu),
      gpu_(gpu),
      held_(handle),
      watched_(watched),
      idle_(idle),
      groups_(py::cast<std::vector<py::object>>(groups)),
      everything_(everything),
      active_(active),
      state_(state) {
  const size_t n = active.size();
  entries_.resize(n);
  views_.resize(n);
  grad_handles_.resize(n);
  table_.tensors.resize(n);
  std::vector<TensorFacts> facts(n);
  size_t dims = 0;
  for (size_t i = 0; i < n; ++i) {
    if (!core().facts_of(held_, static_cast<int64_t>(i), facts[i]) ||
        !core().describe(facts[i].dtype, table_.tensors[i])) {
      throw py::value_error("a parameter is not an ordinary tensor");
    }
    dims += facts[i].ndim;
  }
  shapes_.resize(3 * dims);
  int64_t* shape = shapes_.data();
  size_t row = 0;
  int64_t left = 0;
  for (size_t i = 0; i < n; ++i) {
    for (; left == 0; ++row) left = sizes.at(row);
    --left;
    const TensorFacts& p = facts[i];
    Entry& entry = entries_[i];
    Tensor& t = table_.tensors[i];
    device_ = p.device;
    entry.dtype = p.dtype;
    entry.ndim = p.ndim;
    entry.shape = shape;
    std::copy(p.sizes, p.sizes + p.ndim, shape);
    std::copy(p.strides, p.strides + p.ndim, shape + p.ndim);
    shape += 3 * p.ndim;
    t.state_dtype = masters[i] < 0 ? t.dtype : DType::Float;
    t.row = static_cast<int>(row) - 1;
    t.index = static_cast<int64_t>(i);
    views_[i][kParam] = {p.data, p.ndim, entry.sizes(), entry.strides()};
    layouts_.push_back({p.data, p.ndim, entry.strides()});
  }
  add(masters, kMaster);
  masters_ = static_cast<int64_t>(layouts_.size()) - count();
  if (states.size() > kStates) throw py::value_error("there are more state tensors than any base optimizer has");
  for (size_t s = 0; s < states.size(); ++s) add(states[s], static_cast<Operand>(kState0 + s));
  add(backups, kBackup);
  for (const auto& views : views_) {
    for (Operand operand : {kParam, kState0, kState1, kState2, kMaster}) {
      if (may_overlap(views[operand].ndim, views[operand].sizes, views[operand].strides)) {
        throw py::value_error("a parameter or its state is written, but several of its elements share memory");
      }
    }
  }
  state_dicts_.push_back({state_.ptr(), 0});
  walk_state([&](PyObject* object) {
    kept_.append(py::reinterpret_borrow<py::object>(object));
    state_seen_.push_back(object);
    if (PyDict_Check(object)) state_dicts_.push_back({object, 0});
    return true;
  });
}

// Visits what opt.state holds without hashing a key: key, value, and for a value that is a dict its values.
template <class Visit>
void Plan::walk_state(Visit visit) const {
  PyObject *key, *value, *name, *item;
  for (Py_ssize_t at = 0; PyDict_Next(state_.ptr(), &at, &key, &value);) {
    if (!visit(key) || !visit(value)) return;
    if (!PyDict_Check(value)) continue;
    for (Py_ssize_t inner = 0; PyDict_Next(value, &inner, &name, &item);) {
      if (!visit(item)) return;
    }
  }
}

bool Plan::same_state() {
#if PY_VERSION_HEX < 0x030C0000
  // Before Python 3.12 a dict counts its changes (PEP 509), which spares reading hundreds of them.
  bool changed = false;
  constexpr size_t kPrefetchDistance = 8;  // dicts, like tensors, are scattered over memory
  for (size_t i = 0; i < state_dicts_.size(); ++i) {
    if (i + kPrefetchDistance < state_dicts_.size()) __builtin_prefetch(state_dicts_[i + kPrefetchDistance].first);
    auto& [dict, version] = state_dicts_[i];
    const uint64_t now = reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
    changed = changed || now != version;
    version = now;
  }
  if (!changed) return true;
#endif
  size_t next = 0;
  bool same = true;
  walk_state([&](PyObject* object) {
    same = next < state_seen_.size() && state_seen_[next++] == object;
    return same;
  });
  same = same && next == state_seen_.size();
  if (!same) state_dicts_.front().second = 0;  // not a version: compare again next time
  return same;
}

void Plan::add(const Positions& positions, Operand operand) {
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (positions[i] < 0) continue;
    TensorFacts t;
    if (!core().facts_of(held_, positions[i], t)) throw py::value_error("state is not an ordinary tensor");
    auto shape = std::make_unique<int64_t[]>(2 * t.ndim + 1);
    std::copy(t.sizes, t.sizes + t.ndim, shape.get());
    std::copy(t.strides, t.strides + t.ndim, shape.get() + t.ndim);
    views_[i][operand] = {t.data, t.ndim, shape.get(), shape.get() + t.ndim};
    copies_.push_back(std::move(shape));
    if (positions[i] < watched_) layouts_.push_back({t.data, 0, nullptr});
  }
}

bool Plan::fits(size_t index, const TensorFacts& grad) {
  Entry& entry = entries_[index];
  const int ndim = entry.ndim;
  if (grad.dtype != entry.dtype || grad.device != device_ || grad.ndim != ndim ||
      !equal(grad.sizes, entry.sizes(), ndim)) {
    return false;
  }
  const bool known = entry.has_layout && equal(grad.strides, entry.grad_strides(), ndim);
  if (known && !table_.chunks.empty()) {
    table_.tensors[index].data[kGrad] = grad.data;
  } else {
    std::copy(grad.strides, grad.strides + ndim, entry.grad_strides());
    entry.has_layout = true;
    // torch gives the imaginary part of a conjugated tensor as a view that is negated when it is read. Such a view
    // never fills its memory, unless it has one element.
    const bool single = std::all_of(grad.sizes, grad.sizes + ndim, [](int64_t size) { return size == 1; });
    entry.may_be_negated = single || !is_dense(grad.ndim, grad.sizes, grad.strides);
    table_.chunks.clear();  // the table must be rebuilt
  }
  entry.grad = grad.data;
  return true;
}

void Plan::set_all_layouts() {
  for (size_t i = 0; i < entries_.size(); ++i) {
    View views[kOperands];
    for (int s = 0; s < kOperands; ++s) views[s] = views_[i][s];
    const Entry& entry = entries_[i];
    views[kGrad] = {entry.grad, entry.ndim, entry.sizes(), entry.grad_strides()};
    if (first_grads_ != 0) {
      TensorFacts first;
      core().facts_of(first_grads_, static_cast<int64_t>(i), first);  // a gradient that was read before
      views[kFirstGrad] = {first.data, first.ndim, first.sizes, first.strides};
    }
    set_layout(table_.tensors[i], views);
  }
  cut();
}

void Plan::cut() {
  table_.cut();
  const auto& tensors = table_.tensors;
  same_layout_ = !gpu_ || std::none_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.strided(); });
}

static bool is_constant(PyObject* x) {
  if (PyTuple_CheckExact(x)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(x); ++i) {
      if (!is_constant(PyTuple_GET_ITEM(x, i))) return false;
    }
    return true;
  }
  return x == Py_None || PyBool_Check(x) || PyFloat_CheckExact(x) || PyLong_CheckExact(x) || PyUnicode_CheckExact(x);
}

static bool is_named(PyObject* key, const char* name) {
  return PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, name) == 0;
}

// Visits names and values of all hyperparameters; false as soon as visit returns false, or if a group is a subclass of
// dict, which may hold more than it shows.
template <class Visit>
static bool walk_hyperparams(const py::list& groups, Visit visit) {
  PyObject *key, *value;
  for (const py::handle& group : groups) {
    if (!PyDict_CheckExact(group.ptr())) return false;
    for (Py_ssize_t at = 0; PyDict_Next(group.ptr(), &at, &key, &value);) {
      if (PyList_CheckExact(value) && (is_named(key, "params") || is_named(key, "param_names"))) continue;
      if (!visit(key) || !visit(value)) return false;
    }
  }
  return true;
}

bool Plan::same_hyperparams(const py::list& groups) {
  size_t next = 0;
  const size_t size = hyperparams_seen_.size();
  if (size > 0 &&
      walk_hyperparams(groups, [&](PyObject* x) { return next < size && hyperparams_seen_[next++] == x; }) &&
      next == size) {
    return true;
  }
  hyperparams_seen_.clear();
  hyperparams_kept_ = py::list();
  const bool constant = walk_hyperparams(groups, [&](PyObject* x) {
    hyperparams_kept_.append(py::reinterpret_borrow<py::object>(x));
    hyperparams_seen_.push_back(x);
    return is_constant(x);
  });
  if (!constant) {
    hyperparams_seen_.clear();
    hyperparams_kept_ = py::list();
  }
  return false;
}

int64_t Plan::poll(const py::list& groups) {
  if (!same_hyperparams(groups)) ++hyperparams_version_;
  return hyperparams_version_ << 2 | int64_t{perturbed_} << 1 | int64_t{same_parameters(groups)};
}

bool Plan::same_parameters(const py::list& groups) const {
  static PyObject* const name = PyUnicode_InternFromString("params");
  size_t next = 0, position = 0;
  for (const py::handle& group : groups) {
    if (position >= groups_.size() || group.ptr() != groups_[position++].ptr()) return false;
    PyObject* const params = PyDict_Check(group.ptr()) ? PyDict_GetItemWithError(group.ptr(), name) : nullptr;
    if (params == nullptr || !PyList_Check(params)) {
      PyErr_Clear();
      return false;
    }
    const size_t size = static_cast<size_t>(PyList_GET_SIZE(params));
    if (next + size > everything_.size()) return false;
    for (size_t i = 0; i < size; ++i, ++next) {
      if (PyList_GET_ITEM(params, i) != PyList_GET_ITEM(everything_.ptr(), next)) return false;
    }
  }
  return next == everything_.size() && position == groups_.size();
}

bool Plan::companions_in_place(bool updating) {
  const int64_t end = updating ? watched_ : count() + masters_;
  return core().in_place(held_, count(), end, layouts_.data()) && (!updating || same_state());
}

bool Plan::read_grads() {
  const auto seen = [](void* plan, int64_t i, const TensorFacts& grad) {
    return static_cast<Plan*>(plan)->fits(static_cast<size_t>(i), grad);
  };
  return core().read_grads(held_, count(), layouts_.data(), grad_handles_.data(), seen, this);
}

bool Plan::collect(bool updating) {
  if (!read_grads() || !none_is_negated()) return false;
  if (!companions_in_place(updating) || core().has_grads(held_, idle_)) return false;
  if (table_.chunks.empty()) set_all_layouts();
  return same_layout_;
}

int Plan::visit(visitproc visitor, void* arg) const {
  for (const py::object& group : groups_) {
    if (const int stop = visitor(group.ptr(), arg)) return stop;
  }
  for (const py::object* object :
       std::initializer_list<const py::object*>{&everything_, &active_, &state_, &kept_, &hyperparams_kept_}) {
    if (const int stop = visitor(object->ptr(), arg)) return stop;
  }
  return 0;
}

// A destructor may still call the plan: poll finds no groups then, and restoring needs no Python.
void Plan::clear() {
  const auto groups = std::exchange(groups_, {});
  const auto state = std::exchange(state_, py::dict());
  const std::array lists{std::exchange(everything_, py::list()), std::exchange(active_, py::list()),
                         std::exchange(kept_, py::list()), std::exchange(hyperparams_kept_, py::list())};
  hyperparams_seen_.clear();
  state_seen_.clear();
  state_dicts_.clear();
}

// Calls Python, which may run code that drops or replaces a gradient: so they are read again afterwards.
bool Plan::none_is_negated() {
  using Seen = std::pair<void*, bool>;
  const auto seen = [&] {
    std::vector<Seen> all;
    for (const Entry& entry : entries_) all.emplace_back(entry.grad, entry.may_be_negated);
    return all;
  };
  const auto may_be = [](const Entry& entry) { return entry.may_be_negated; };
  if (std::none_of(entries_.begin(), entries_.end(), may_be)) return true;
  const auto before = seen();
  for (size_t i = 0; i < before.size(); ++i) {
    if (before[i].second && active_[i].attr("grad").attr("is_neg")().cast<bool>()) return false;
  }
  return read_grads() && seen() == before;
}

}  // namespace rst
