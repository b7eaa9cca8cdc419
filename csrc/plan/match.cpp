// Whether a launch plan still fits: parameters, gradients, state and hyperparameters.
#include "plan/plan.h"
#include "plan/tensor_words.h"

#include <algorithm>
#include <numeric>

namespace rst {

namespace {

const CoreApi* core_api = nullptr;
ptrdiff_t impl_offset = 0;  // of the pointer to the TensorImpl in a Python tensor; 0: not found

#if PY_VERSION_HEX >= 0x030C0000
// From Python 3.12 on a dict says when it changes, instead of counting its changes.
int dict_watcher = -1;  // there are eight for all of a process; without one, state is compared entry by entry
uint64_t dict_changes = 0;

int note_change(PyDict_WatchEvent, PyObject*, PyObject*, PyObject*) {
  ++dict_changes;
  return 0;
}
#endif

}  // namespace

void connect(py::object core) {
  core_api = static_cast<const CoreApi*>(PyCapsule_GetPointer(core.ptr(), kCoreCapsule));
  if (core_api == nullptr) throw py::error_already_set();
  impl_offset = find_impl_offset();
  core_api->set_first_word(find_first_word());
#if PY_VERSION_HEX >= 0x030C0000
  if (dict_watcher < 0) dict_watcher = PyDict_AddWatcher(&note_change);
  if (dict_watcher < 0) PyErr_Clear();
#endif
}

const CoreApi& core() { return *core_api; }
bool can_plan() { return core_api->has_autograd_symbols() && impl_offset != 0; }

TensorRef tensor_ref(const py::handle& tensor) {
  char* const at = reinterpret_cast<char*>(tensor.ptr()) + impl_offset;
  return {at, *reinterpret_cast<const void* const*>(at)};
}

void Slots::reset(int64_t handle) {
  const int64_t before = std::exchange(handle_, handle);
  if (before != 0) core().release_slots(before);
}

Plan::Plan(bool gpu, py::list groups, py::list everything, py::list active, py::list idle, std::vector<int64_t> sizes,
           py::list masters, std::vector<py::list> states, py::list backups, py::list steps,
           std::vector<int64_t> row_groups, py::dict state, py::object step_state)
    : ops_(gpu ? *core().gpu : core().cpu),
      gpu_(gpu),
      groups_(py::cast<std::vector<py::object>>(groups)),
      everything_(everything),
      active_(active),
      idle_(idle),
      state_(state),
      step_state_(step_state),
      row_groups_(std::move(row_groups)) {
  if (states.size() > kStates) throw py::value_error("more state tensors than a rule has");
  add_params(sizes);
  add(masters, kMaster);
  masters_end_ = static_cast<int64_t>(tensors_.size());
  add(backups, kBackup);
  backups_end_ = static_cast<int64_t>(tensors_.size());
  for (size_t k = 0; k < states.size(); ++k) add(states[k], static_cast<Operand>(kState0 + k));
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (views_[i][kMaster].data != nullptr) table_.tensors[i].state_dtype = DType::Float;
  }
  for (const py::handle& tensor : idle_) idle_tensors_.push_back(tensor_ref(tensor));
  for (const py::handle& step : steps) {
    counters_.push_back(tensor_ref(step));
    kept_.append(step);
  }
  hold_companions();
  words_.resize(tensors_.size());
  grad_words_.resize(entries_.size());
  watch_state();
}

void Plan::add_params(const std::vector<int64_t>& sizes) {
  const size_t n = active_.size();
  entries_.resize(n);
  views_.resize(n);
  grad_handles_.resize(n);
  table_.tensors.resize(n);
  std::vector<TensorFacts> facts(n);
  size_t dims = 0;
  for (size_t i = 0; i < n; ++i) {
    tensors_.push_back(tensor_ref(active_[i]));
    if (!core().facts_of(tensors_[i].handle, facts[i]) || !core().describe(facts[i].dtype, table_.tensors[i])) {
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
    t.state_dtype = t.dtype;
    t.row = static_cast<int>(row) - 1;
    t.index = static_cast<int64_t>(i);
    views_[i][kParam] = {p.data, p.ndim, entry.sizes(), entry.strides()};
    layouts_.push_back({p.data, p.device, p.dtype, p.ndim, entry.shape});
  }
}

void Plan::add(const py::list& tensors, Operand operand) {
  for (size_t i = 0; i < entries_.size(); ++i) {
    const py::object tensor = tensors[i];
    if (tensor.is_none()) continue;
    const TensorRef ref = tensor_ref(tensor);
    TensorFacts t;
    if (!core().facts_of(ref.handle, t)) throw py::value_error("state is not an ordinary tensor");
    auto shape = std::make_unique<int64_t[]>(2 * t.ndim + 1);
    std::copy(t.sizes, t.sizes + t.ndim, shape.get());
    std::copy(t.strides, t.strides + t.ndim, shape.get() + t.ndim);
    views_[i][operand] = {t.data, t.ndim, shape.get(), shape.get() + t.ndim};
    tensors_.push_back(ref);
    layouts_.push_back({t.data, t.device, t.dtype, t.ndim, shape.get()});
    copies_.push_back(std::move(shape));
    kept_.append(tensor);
  }
}

// Parameters may get another TensorImpl at any time, and torch.utils.swap_tensors asks that nobody but Python holds them.
// Their companions are held here: then the pointers to their TensorImpls are read from one place.
void Plan::hold_companions() {
  const auto companions = static_cast<int64_t>(tensors_.size()) - count();
  if (companions == 0) return;
  std::vector<void*> handles;
  for (auto i = static_cast<size_t>(count()); i < tensors_.size(); ++i) handles.push_back(tensors_[i].handle);
  companions_.reset(core().make_slots(companions));
  core().fill_slots(companions_, handles.data());
  for (auto i = static_cast<size_t>(count()); i < tensors_.size(); ++i) {
    tensors_[i].handle = static_cast<void*>(&tensors_[i].impl);
  }
}

void Plan::watch_state() {
  state_dicts_.push_back({state_.ptr(), 0});
  walk_state([&](PyObject* object) {
    kept_.append(py::reinterpret_borrow<py::object>(object));
    state_seen_.push_back(object);
    if (PyDict_Check(object)) state_dicts_.push_back({object, 0});
    return true;
  });
#if PY_VERSION_HEX >= 0x030C0000
  for (const auto& entry : state_dicts_) {
    if (dict_watcher >= 0 && PyDict_Watch(dict_watcher, entry.first) != 0) throw py::error_already_set();
  }
  changes_seen_ = dict_changes;
#endif
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
#if PY_VERSION_HEX >= 0x030C0000
  if (dict_watcher >= 0 && changes_seen_ == dict_changes) return true;
  const uint64_t changes = dict_changes;
#else
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
#if PY_VERSION_HEX >= 0x030C0000
  if (same) changes_seen_ = changes;
#else
  if (!same) state_dicts_.front().second = 0;  // not a version: compare again next time
#endif
  return same;
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

void Plan::set_all_layouts(const FirstGrads* first) {
  for (size_t i = 0; i < entries_.size(); ++i) {
    View views[kOperands];
    for (int s = 0; s < kOperands; ++s) views[s] = views_[i][s];
    const Entry& entry = entries_[i];
    views[kGrad] = {entry.grad, entry.ndim, entry.sizes(), entry.grad_strides()};
    if (first != nullptr) {
      TensorFacts g;
      core().facts_of(core().slot(first->slots, static_cast<int64_t>(i)), g);  // which were compared before
      views[kFirstGrad] = {g.data, g.ndim, g.sizes, g.strides};
    }
    set_layout(table_.tensors[i], views);
  }
  first_grads_id_ = first == nullptr ? 0 : first->id;
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
  return hyperparams_version_ << 1 | int64_t{same_parameters(groups)};
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

bool Plan::in_place(int64_t begin, int64_t end) {
  return core().in_place(tensors_.data(), begin, end, layouts_.data(), words_.data());
}

bool Plan::read_grads() {
  const auto seen = [](void* context, int64_t i, void* data, const TensorFacts* grad) {
    Plan& plan = *static_cast<Plan*>(context);
    const auto index = static_cast<size_t>(i);
    if (grad != nullptr) return plan.fits(index, *grad);
    plan.entries_[index].grad = data;
    plan.table_.tensors[index].data[kGrad] = data;  // if the table is to be rebuilt, it reads the entry
    return true;
  };
  return core().read_grads(tensors_.data(), count(), layouts_.data(), words_.data(), grad_handles_.data(),
                           grad_words_.data(), seen, this);
}

float* Plan::counter(size_t row) const {
  TensorFacts t;
  const bool there = core().facts_of(counters_[row].handle, t) && t.device == kOnCpu;
  const auto elements = there ? std::accumulate(t.sizes, t.sizes + t.ndim, int64_t{1}, std::multiplies<>()) : 0;
  static const int32_t float32 = [] {  // torch's number for it
    Tensor described;
    int32_t dtype = 0;
    while (!core().describe(dtype, described) || described.dtype != DType::Float || described.complex) ++dtype;
    return dtype;
  }();
  return elements == 1 && t.dtype == float32 ? static_cast<float*>(t.data) : nullptr;
}

bool Plan::steps_differ() const {
  for (size_t a = 0; a < counters_.size(); ++a) {
    const float* const count = counter(a);
    if (count == nullptr) return false;
    for (size_t b = 0; b < a; ++b) {
      if (row_groups_[a] == row_groups_[b] && *counter(b) == *count) return false;
    }
  }
  return true;
}

bool Plan::collect(bool updating, bool restores, const FirstGrads* first) {
  if (!read_grads() || !none_is_negated()) return false;
  const bool reads_backups = restores || !updating;
  if (!in_place(count(), reads_backups ? backups_end_ : masters_end_) || !steps_differ()) return false;
  if (updating && !in_place(backups_end_, static_cast<int64_t>(tensors_.size()))) return false;
  if ((updating || masters_end_ > count()) && !same_state()) return false;
  if (core().has_grads(idle_tensors_.data(), static_cast<int64_t>(idle_tensors_.size()))) return false;
  if (first != nullptr && !first_grads_in_place(*first)) return false;
  if (first == nullptr && first_grads_id_ != 0) note_first_grads(nullptr);
  if (first != nullptr && first->id != first_grads_id_) table_.chunks.clear();
  if (table_.chunks.empty()) set_all_layouts(first);
  return same_layout_;
}

int Plan::visit(visitproc visitor, void* arg) const {
  for (const py::object& group : groups_) {
    if (const int stop = visitor(group.ptr(), arg)) return stop;
  }
  for (const py::object* object : std::initializer_list<const py::object*>{&everything_, &active_, &idle_, &state_,
                                                                           &step_state_, &kept_, &hyperparams_kept_}) {
    if (const int stop = visitor(object->ptr(), arg)) return stop;
  }
  return 0;
}

// A destructor may still call the plan: poll finds no groups then, and no tensor is looked at any more.
void Plan::clear() {
  tensors_.clear();
  companions_.reset();
  entries_.clear();
  idle_tensors_.clear();
  counters_.clear();
  masters_end_ = backups_end_ = 0;
  table_ = Table();
  const auto groups = std::exchange(groups_, {});
  const py::object state = std::exchange(state_, py::dict()), step_state = std::exchange(step_state_, py::none());
  const std::array lists{std::exchange(everything_, py::list()), std::exchange(active_, py::list()),
                         std::exchange(idle_, py::list()), std::exchange(kept_, py::list()),
                         std::exchange(hyperparams_kept_, py::list())};
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
