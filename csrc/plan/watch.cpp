// Whether the Python objects that a launch plan was made from are the same: parameter groups, hyperparameters, state.
#include "plan/plan.h"

namespace rst {

namespace {

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

void watch_dicts() {
#if PY_VERSION_HEX >= 0x030C0000
  if (dict_watcher < 0) dict_watcher = PyDict_AddWatcher(&note_change);
  if (dict_watcher < 0) PyErr_Clear();
#endif
}

// Visits what opt.state holds without hashing a key: key, value, and for a value that is a dict its values. False as
// soon as visit returns false.
template <class Visit>
static bool walk_state(const py::dict& state, Visit visit) {
  PyObject *key, *value, *name, *item;
  for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
    if (!visit(key) || !visit(value)) return false;
    if (!PyDict_Check(value)) continue;
    for (Py_ssize_t inner = 0; PyDict_Next(value, &inner, &name, &item);) {
      if (!visit(item)) return false;
    }
  }
  return true;
}

// Whether walk(visit) visits the objects of a list, in their order, and no others.
template <class Walk>
static bool shows(const py::list& objects, Walk walk) {
  PyObject* const list = objects.ptr();
  Py_ssize_t next = 0;
  const auto same = [&](PyObject* object) {
    return next < PyList_GET_SIZE(list) && PyList_GET_ITEM(list, next++) == object;
  };
  return walk(same) && next == PyList_GET_SIZE(list);
}

void Plan::watch_state() {
  state_dicts_.push_back({state_.ptr(), 0});
  walk_state(state_, [&](PyObject* object) {
    state_seen_.append(py::handle(object));
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
  const bool same = shows(state_seen_, [&](auto visit) { return walk_state(state_, visit); });
#if PY_VERSION_HEX >= 0x030C0000
  if (same) changes_seen_ = changes;
#else
  if (!same) state_dicts_.front().second = 0;  // not a version: compare again next time
#endif
  return same;
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
  const auto walk = [&](auto visit) { return walk_hyperparams(groups, visit); };
  if (!hyperparams_seen_.empty() && shows(hyperparams_seen_, walk)) return true;
  hyperparams_seen_ = py::list();
  const bool constant = walk([&](PyObject* x) {
    hyperparams_seen_.append(py::handle(x));
    return is_constant(x);
  });
  if (!constant) hyperparams_seen_ = py::list();
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
    if (position >= groups_.size() || group.ptr() != PyList_GET_ITEM(groups_.ptr(), position++)) return false;
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

}  // namespace rst
