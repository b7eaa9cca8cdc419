// A launch plan: the chunk table of one optimizer, kept between steps. A call reads p.grad of every parameter, checks
// that all addresses, shapes and dtypes are those of the table, and runs the core: no lists are boxed.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>

#include "core_api.h"
#include "dlpack_abi.h"

namespace rst {

namespace py = pybind11;

class Plan {
 public:
  // everything: all parameters in the order of their groups. active: those with a gradient, in the order of the ops;
  // idle: those without, which must stay so. sizes: how many active ones
  // share each row of numbers. The other lists go with `active`: tensors, or None where a parameter has none.
  // `handle` holds the tensors of active, masters, buffers, buffers2 in that order, without the Nones. `state` is the
  // optimizer's state: a step must find the same tensors in it.
  Plan(py::list everything, py::list active, py::list idle, std::vector<int64_t> sizes, py::list backups, py::list buffers,
       py::list buffers2, py::list masters, py::dict state, int64_t handle);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Whether these lists, one after another, still hold the parameters of the plan.
  bool same_parameters(const py::list& groups) const;
  // Takes the gradients: for a perturbation out of p.grad, which becomes None; for a step (`updating`) it leaves them
  // there, but the state must be in place too. False, with nothing changed, if anything is not as it was when the plan
  // was made: then make another one.
  bool collect(bool updating);
  // Norm and perturbation with the gradients taken; they are kept inside if `keep`.
  void perturb(uintptr_t stats, std::vector<double> rho, bool adaptive, double eta, bool stochastic, uint64_t seed,
               uint64_t step, bool keep);
  // One update of all parameters, restored first if perturbed. `mixing` uses the gradients that perturb kept.
  void sgd_step(const std::vector<std::array<double, 5>>& rows, bool nesterov, bool maximize, bool mixing);
  void adam_step(const std::vector<std::array<double, 7>>& rows, bool decoupled, bool maximize, bool mixing);
  bool perturbed() const { return perturbed_; }
  // Undoes a perturbation. False, with nothing done, if a parameter no longer lies where it was.
  bool restore();
  // Leaves the rest of a step under way to the caller: the plan is as before perturb, though the weights are not.
  // Returns the gradients that perturb kept, or an empty list.
  py::list hand_over();

 private:
  struct Entry {
    PyObject* param;
    dlpack::DataType dtype;
    std::vector<int64_t> sizes, strides, grad_strides;
    void* grad = nullptr;
  };
  void add(const py::list& streams, Stream stream);
  template <class Visit>
  void walk_state(Visit visit) const;
  bool same_state() const;
  // Whether the parameters, and for an update their state, are where they were.
  bool in_place(bool updating) const;
  bool read(PyObject* tensor, dlpack::Tensor& out) const;
  bool fits(Entry& entry, const dlpack::Tensor& grad, size_t index);
  void place_all();
  void drop(std::vector<PyObject*>& references);
  void begin_update(Call& call, bool maximize, bool mixing);
  void end_update();

  struct Held {  // released also if the constructor throws
    int64_t handle;
    ~Held() { core_release(handle); }
  };
  static void core_release(int64_t handle);

  Held held_;
  py::list everything_, active_, idle_;
  py::dict state_;
  py::list kept_;  // references that keep companions and state alive
  std::vector<PyObject*> state_seen_;    // keys and values of the optimizer's state, and the values of each value
  std::vector<Entry> entries_;
  size_t masters_ = 0;                   // how many tensors after the parameters the handle holds first
  std::vector<void*> addresses_;         // of everything the handle holds
  std::vector<std::unique_ptr<int64_t[]>> shapes_;  // copies: a tensor may free its own when it is resized
  std::vector<PyObject*> grads_;         // references, from collect until they are used
  std::vector<PyObject*> first_grads_;   // references, from a perturb that keeps them until the update
  std::vector<std::array<View, kStreams>> views_;
  Table table_;
  bool perturbed_ = false;
};

void connect(py::object core, py::object exchange, py::object tensor_type);
const CoreApi& core();
bool can_plan();

}  // namespace rst
