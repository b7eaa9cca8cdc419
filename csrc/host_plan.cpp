#include "host_plan.h"

namespace rst {

namespace {

const CoreApi* core_api = nullptr;
const dlpack::ExchangeApi* exchange_api = nullptr;
PyTypeObject* tensor_class = nullptr;
PyObject* grad_name = nullptr;
PyGetSetDef* grad_property = nullptr;  // the getter and setter behind torch.Tensor.grad, found once

PyObject* get_grad(PyObject* param) { return grad_property->get(param, grad_property->closure); }

void set_grad(PyObject* param, PyObject* grad) {
  if (grad_property->set(param, grad, grad_property->closure) != 0) throw py::error_already_set();
}

}  // namespace

void connect(py::object core, py::object exchange, py::object tensor_type) {
  core_api = static_cast<const CoreApi*>(PyCapsule_GetPointer(core.ptr(), kCoreCapsule));
  if (core_api == nullptr) throw py::error_already_set();
  tensor_class = reinterpret_cast<PyTypeObject*>(tensor_type.ptr());
  grad_name = PyUnicode_InternFromString("grad");
  PyObject* found = _PyType_Lookup(tensor_class, grad_name);
  if (found == nullptr || Py_TYPE(found) != &PyGetSetDescr_Type || exchange.is_none()) return;
  grad_property = reinterpret_cast<PyGetSetDescrObject*>(found)->d_getset;
  auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange.ptr(), dlpack::kCapsule));
  if (api == nullptr) throw py::error_already_set();
  if (api->major == dlpack::kMajor && api->tensor_from_py_object != nullptr) exchange_api = api;
}

const CoreApi& core() { return *core_api; }
bool can_plan() { return exchange_api != nullptr && grad_property != nullptr; }

bool Plan::read(PyObject* tensor, dlpack::Tensor& out) const {
  if (exchange_api->tensor_from_py_object(tensor, &out) == 0) {
    out.data = static_cast<char*>(out.data) + out.byte_offset;
    return true;
  }
  PyErr_Clear();  // a tensor that DLPack cannot describe: the plan does not fit, and the caller says why
  return false;
}

Plan::Plan(py::list everything, py::list active, py::list idle, std::vector<int64_t> sizes, py::list backups, py::list buffers,
           py::list buffers2, py::list masters, py::dict state, int64_t handle)
    : held_{handle}, everything_(everything), active_(active), idle_(idle), state_(state) {
  const size_t n = active.size();
  entries_.resize(n);
  views_.resize(n);
  table_.tensors.resize(n);
  size_t row = 0;
  int64_t left = 0;
  for (size_t i = 0; i < n; ++i) {
    for (; left == 0; ++row) left = sizes.at(row);
    --left;
    Entry& entry = entries_[i];
    entry.param = PyList_GET_ITEM(active.ptr(), i);
    dlpack::Tensor p;
    if (!read(entry.param, p)) throw py::value_error("a parameter cannot be described by DLPack");
    entry.dtype = p.dtype;
    entry.sizes.assign(p.sizes, p.sizes + p.ndim);
    const int64_t* strides = core().held_strides(handle, static_cast<int64_t>(i));  // as torch has them, for later
    entry.strides.assign(strides, strides + p.ndim);
    Tensor& t = table_.tensors[i];
    t.complex = p.dtype.code == 5;
    const int bits = t.complex ? p.dtype.bits / 2 : p.dtype.bits;
    t.dtype = bits == 64 ? DType::Double : bits == 32 ? DType::Float : p.dtype.code == 4 ? DType::BFloat16 : DType::Half;
    t.state_dtype = PyList_GET_ITEM(masters.ptr(), i) == Py_None ? t.dtype : DType::Float;
    t.row = static_cast<int>(row) - 1;
    t.index = static_cast<int64_t>(i);
    views_[i][kParam] = {p.data, p.ndim, entry.sizes.data(), entry.strides.data()};
  }
  add(backups, kBackup);
  add(buffers, kBuffer);
  add(buffers2, kBuffer2);
  add(masters, kMaster);
  for (const auto& views : views_) {
    for (Stream s : {kParam, kBuffer, kBuffer2, kMaster}) {
      if (may_overlap(views[s].ndim, views[s].sizes, views[s].strides)) {
        throw py::value_error("a parameter or its state is written, but several of its elements share memory");
      }
    }
  }
  walk_state([&](PyObject* object) {
    kept_.append(py::reinterpret_borrow<py::object>(object));
    state_seen_.push_back(object);
    return true;
  });
  const int64_t held = core().held_count(handle);
  for (int64_t i = 0; i < held; ++i) addresses_.push_back(core().held_address(handle, i));
}

Plan::~Plan() {
  drop(grads_);
  drop(first_grads_);
}

void Plan::core_release(int64_t handle) { core().release(handle); }

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

bool Plan::same_state() const {
  size_t next = 0;
  bool same = true;
  walk_state([&](PyObject* object) {
    same = next < state_seen_.size() && state_seen_[next++] == object;
    return same;
  });
  return same && next == state_seen_.size();
}

void Plan::add(const py::list& tensors, Stream stream) {
  kept_.append(tensors);
  for (size_t i = 0; i < entries_.size(); ++i) {
    PyObject* item = PyList_GET_ITEM(tensors.ptr(), i);
    if (item == Py_None) continue;
    dlpack::Tensor t;
    if (!read(item, t)) throw py::value_error("a state tensor cannot be described by DLPack");
    auto shape = std::make_unique<int64_t[]>(2 * t.ndim + 1);
    std::copy(t.sizes, t.sizes + t.ndim, shape.get());
    std::copy(t.strides, t.strides + t.ndim, shape.get() + t.ndim);
    views_[i][stream] = {t.data, t.ndim, shape.get(), shape.get() + t.ndim};
    shapes_.push_back(std::move(shape));
    if (stream == kMaster) ++masters_;
  }
}

void Plan::drop(std::vector<PyObject*>& references) {
  for (PyObject* object : references) Py_DECREF(object);
  references.clear();
}

bool Plan::fits(Entry& entry, const dlpack::Tensor& grad, size_t index) {
  const int ndim = static_cast<int>(entry.sizes.size());
  if (grad.device.type != 1 || grad.ndim != ndim || grad.dtype.code != entry.dtype.code ||
      grad.dtype.bits != entry.dtype.bits || std::memcmp(grad.sizes, entry.sizes.data(), ndim * sizeof(int64_t)) != 0) {
    return false;
  }
  const bool known = entry.grad_strides.size() == static_cast<size_t>(ndim) &&
                     std::memcmp(grad.strides, entry.grad_strides.data(), ndim * sizeof(int64_t)) == 0;
  if (known && !table_.chunks.empty()) {
    table_.tensors[index].data[kGrad] = grad.data;
  } else {
    entry.grad_strides.assign(grad.strides, grad.strides + ndim);
    table_.chunks.clear();  // place this tensor anew
  }
  entry.grad = grad.data;
  return true;
}

void Plan::place_all() {
  for (size_t i = 0; i < entries_.size(); ++i) {
    View views[kStreams];
    for (int s = 0; s < kStreams; ++s) views[s] = views_[i][s];
    const Entry& entry = entries_[i];
    views[kGrad] = {entry.grad, static_cast<int>(entry.sizes.size()), entry.sizes.data(), entry.grad_strides.data()};
    if (!first_grads_.empty()) {
      dlpack::Tensor first;
      if (!read(first_grads_[i], first)) throw py::value_error("a gradient cannot be described by DLPack");
      views[kFirstGrad] = {first.data, first.ndim, first.sizes, first.strides};
    }
    place(table_.tensors[i], views);
  }
  table_.cut();
}

bool Plan::same_parameters(const py::list& groups) const {
  size_t next = 0;
  for (const py::handle& group : groups) {
    if (!PyList_Check(group.ptr())) return false;
    const size_t size = static_cast<size_t>(PyList_GET_SIZE(group.ptr()));
    if (next + size > everything_.size()) return false;
    for (size_t i = 0; i < size; ++i, ++next) {
      if (PyList_GET_ITEM(group.ptr(), i) != PyList_GET_ITEM(everything_.ptr(), next)) return false;
    }
  }
  return next == everything_.size();
}

bool Plan::in_place(bool updating) const {
  const int64_t handle = held_.handle;
  for (size_t i = 0; i < entries_.size(); ++i) {
    const std::vector<int64_t>& strides = entries_[i].strides;
    if (!strides.empty() && std::memcmp(core().held_strides(handle, static_cast<int64_t>(i)), strides.data(),
                                        strides.size() * sizeof(int64_t)) != 0) {
      return false;
    }
  }
  if (updating && !same_state()) return false;
  const size_t checked = updating ? addresses_.size() : entries_.size() + masters_;
  for (size_t i = 0; i < checked; ++i) {
    if (core().held_address(handle, static_cast<int64_t>(i)) != addresses_[i]) return false;
  }
  return true;
}

bool Plan::collect(bool updating) {
  const bool consume = !updating;
  drop(grads_);
  if (!in_place(updating)) return false;
  for (const py::handle& param : idle_) {
    PyObject* grad = get_grad(param.ptr());
    if (grad == nullptr) throw py::error_already_set();
    Py_DECREF(grad);
    if (grad != Py_None) return false;
  }
  grads_.reserve(entries_.size());
  for (size_t i = 0; i < entries_.size(); ++i) {
    PyObject* grad = get_grad(entries_[i].param);
    if (grad == nullptr) throw py::error_already_set();
    grads_.push_back(grad);
    dlpack::Tensor seen;
    if (Py_TYPE(grad) != tensor_class || !read(grad, seen) || !fits(entries_[i], seen, i)) {
      for (size_t k = 0; consume && k < i; ++k) set_grad(entries_[k].param, grads_[k]);
      drop(grads_);
      return false;
    }
    if (consume) set_grad(entries_[i].param, Py_None);  // now, while the parameter is in the cache
  }
  if (table_.chunks.empty()) place_all();
  return true;
}

}  // namespace rst
