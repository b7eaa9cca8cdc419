// A launch plan: the chunk table of one optimizer, kept between steps. A call reads the gradient of every parameter,
// checks that all addresses, shapes and dtypes are those of the table, and runs the kernels: no lists are boxed.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <utility>

#include "torch/plan_api.h"

namespace rst {

namespace py = pybind11;

// A list of tensors that _C holds, by its handle; 0 for none.
class TensorListHandle {
 public:
  explicit TensorListHandle(int64_t handle = 0) : handle_(handle) {}
  TensorListHandle(const TensorListHandle&) = delete;
  TensorListHandle& operator=(const TensorListHandle&) = delete;
  ~TensorListHandle() { reset(); }
  operator int64_t() const { return handle_; }
  void reset(int64_t handle = 0);
  int64_t release() { return std::exchange(handle_, 0); }

 private:
  int64_t handle_;
};

class Plan {
 public:
  using Positions = std::vector<int64_t>;
  // groups: the parameter groups. everything: all parameters in their order. active: those with a gradient, in the
  // order of the ops; sizes: how many of them share each row of hyperparameters. `handle` holds the tensors of the
  // plan: active, masters and states, which must stay where they are (`watched` tensors in all), then backups, then
  // from position `idle` on the parameters without a gradient. masters, states, backups: the position of
  // each active parameter's companion among them, or -1. `state` is the optimizer's state: a step must find the same
  // tensors in it. `gpu`: which kernels run.
  Plan(bool gpu, py::list groups, py::list everything, py::list active, std::vector<int64_t> sizes, int64_t handle,
       int64_t watched, int64_t idle, const Positions& masters, const std::vector<Positions>& states,
       const Positions& backups, py::dict state);

  // Compares the parameter groups with the plan. Bit 0: whether they are its groups and still hold its parameters; bit
  // 1: whether the plan has perturbed them; from bit 2 on a number that changes whenever a hyperparameter may have
  // changed.
  int64_t poll(const py::list& groups);
  // Norm and perturbation with the current gradients, which are taken out of p.grad, and held by the plan if `keep`.
  // False, with nothing changed, if anything is not as it was when the plan was made: then make another one.
  bool perturb(uintptr_t stats, std::vector<double> rho, bool adaptive, double eta, bool stochastic, uint64_t seed,
               uint64_t step, bool keep);
  // One update of all parameters by the base optimizer with the number `rule`, restored first if perturbed; false as
  // above. hyperparams: a row per entry of sizes, with the step count last for rules that count steps. `mixing` uses
  // the gradients that perturb kept. Gradients are divided by the scale of AMP: by `scale`, or on a GPU by the one at
  // the first address of `on_device`, with found_inf at the second.
  using Addresses = std::array<uintptr_t, 2>;  // 0: none
  bool update(int rule, const std::vector<std::vector<double>>& hyperparams, bool flag, bool maximize, bool mixing,
              double scale, const Addresses& on_device);
  bool perturbed() const { return perturbed_; }
  // Undoes a perturbation. False, with nothing done, if a parameter is no longer where it was.
  bool restore();
  // Leaves the rest of a step to the caller: the plan is as before perturb, though the weights are not. Returns a
  // handle of the gradients that perturb kept, or 0.
  int64_t hand_over();

  // For Python's garbage collector, which finds cycles such as a group that holds its own scheduler.
  int visit(visitproc visitor, void* arg) const;
  void clear();

 private:
  struct Entry {
    int32_t dtype;  // torch's number
    int ndim;
    int64_t* shape;  // in shapes_: sizes, strides of the parameter, strides of its gradient
    void* grad = nullptr;
    bool has_layout = false;  // grad_strides are those of a gradient
    bool may_be_negated = false;

    const int64_t* sizes() const { return shape; }
    const int64_t* strides() const { return shape + ndim; }
    int64_t* grad_strides() const { return shape + 2 * ndim; }
  };
  void add(const Positions& positions, Operand operand);
  // Reads and validates the gradients, and for an update all state. No Python may run between this and the kernels:
  // another thread may drop a gradient.
  bool collect(bool updating);
  bool same_parameters(const py::list& groups) const;
  // Whether every hyperparameter is the object it was at the last poll, and one that cannot change.
  bool same_hyperparams(const py::list& groups);
  template <class Visit>
  void walk_state(Visit visit) const;
  bool same_state();
  // Whether the master copies, and for an update all state, are where they were.
  bool companions_in_place(bool updating);
  // If false, the table may be half renewed: kernels may run only after a call that returned true.
  bool read_grads();
  bool fits(size_t index, const TensorFacts& grad);
  bool none_is_negated();
  void set_all_layouts();
  // Cuts the table once every tensor has its layout.
  void cut();
  // Empty slots: those given, or new ones.
  TensorListHandle taken(TensorListHandle& slots) const;
  void note_first_grads();
  void drop_first_grads();
  // Whether a second gradient was written over the first one.
  bool first_grads_lost() const;
  template <class Run>
  void run(Run run);

  int64_t count() const { return static_cast<int64_t>(entries_.size()); }

  const CoreOps& ops_;
  const bool gpu_;
  int32_t device_ = kOnCpu;
  TensorListHandle held_;
  int64_t watched_, idle_, masters_ = 0;
  std::vector<py::object> groups_;
  py::list everything_, active_;
  py::dict state_;
  py::list kept_;                      // references that keep the state alive
  std::vector<PyObject*> state_seen_;  // keys and values of the optimizer's state, and the values of each value
  std::vector<std::pair<PyObject*, uint64_t>> state_dicts_;  // and their versions at the last call
  std::vector<PyObject*> hyperparams_seen_;                  // names and values of the hyperparameters of all groups
  py::list hyperparams_kept_;                                // references that keep the values alive
  int64_t hyperparams_version_ = 0;
  std::vector<Entry> entries_;
  std::vector<int64_t> shapes_;          // of all entries, side by side, since every step reads them
  std::vector<ExpectedLayout> layouts_;  // of all watched tensors
  std::vector<void*> grad_handles_;
  TensorListHandle slots_;        // for the gradients, while others may run
  TensorListHandle first_grads_;  // from a perturb that keeps them until the update
  TensorListHandle first_slots_;  // for the next ones
  // Copies of the shapes of state: a tensor may free its own when it is resized.
  std::vector<std::unique_ptr<int64_t[]>> copies_;
  std::vector<std::array<View, kOperands>> views_;
  Table table_;
  bool same_layout_ = true;  // false: tensors of a parameter differ in layout, which GPU kernels do not serve
  bool perturbed_ = false;
};

void connect(py::object core);
const CoreApi& core();
bool can_plan();

}  // namespace rst
