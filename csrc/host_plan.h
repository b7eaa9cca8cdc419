// A launch plan: the chunk table of one optimizer, kept between steps. A call looks at the gradient of every parameter,
// checks that all addresses, shapes and dtypes are those of the table, and runs the core: no lists are boxed.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <utility>

#include "core_api.h"

namespace rst {

namespace py = pybind11;

// A list of tensors that _C holds, by its handle; 0 for none.
class HeldTensors {
 public:
  explicit HeldTensors(int64_t handle = 0) : handle_(handle) {}
  HeldTensors(const HeldTensors&) = delete;
  HeldTensors& operator=(const HeldTensors&) = delete;
  ~HeldTensors() { reset(); }
  operator int64_t() const { return handle_; }
  void reset(int64_t handle = 0);
  int64_t give_away() { return std::exchange(handle_, 0); }

 private:
  int64_t handle_;
};

class Plan {
 public:
  using Positions = std::vector<int64_t>;
  // groups: the parameter groups. everything: all parameters in their order. active: those with a gradient, in the order
  // of the ops; sizes: how many of them share each row of numbers. `handle` holds the tensors of the plan: active, masters and
  // buffers, which must stay where they are (`watched` tensors in all), then backups, then from position `idle` on the
  // parameters without a gradient. masters, buffers, buffers2, backups: the position of each active parameter's companion
  // among them, or -1.
  // `state` is the optimizer's state: a step must find the same tensors in it. `gpu`: which kernels run.
  Plan(bool gpu, py::list groups, py::list everything, py::list active, std::vector<int64_t> sizes, int64_t handle,
       int64_t watched, int64_t idle, const Positions& masters, const Positions& buffers, const Positions& buffers2,
       const Positions& backups, py::dict state);

  // Looks at the parameter groups. Bit 0: whether they are those of the plan and still hold its parameters; bit 1:
  // whether the plan has perturbed them; from bit 2 on a number that changes whenever a hyperparameter may have changed.
  int64_t look(const py::list& groups);
  // Norm and perturbation with the gradients of now, which are taken out of p.grad and kept inside if `keep`. False, with
  // nothing changed, if anything is not as it was when the plan was made: then make another one.
  bool perturb(uintptr_t stats, std::vector<double> rho, bool adaptive, double eta, bool stochastic, uint64_t seed,
               uint64_t step, bool keep);
  // One update of all parameters, restored first if perturbed; false as above. `mixing` uses the gradients that perturb
  // kept. Gradients are divided by the scale of AMP, a number, or on a GPU by the one at the first address, with
  // found_inf at the second.
  using Addresses = std::array<uintptr_t, 2>;  // 0: none
  bool sgd_step(const std::vector<std::array<double, 5>>& rows, bool nesterov, bool maximize, bool mixing, double scale,
                const Addresses& there);
  bool adam_step(const std::vector<std::array<double, 7>>& rows, bool decoupled, bool maximize, bool mixing, double scale,
                 const Addresses& there);
  bool perturbed() const { return perturbed_; }
  // Undoes a perturbation. False, with nothing done, if a parameter no longer lies where it was.
  bool restore();
  // Leaves the rest of a step under way to the caller: the plan is as before perturb, though the weights are not.
  // Returns a handle of the gradients that perturb kept, or 0.
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
    bool placed = false;  // the last of them are those of a gradient
    bool may_be_negated = false;

    const int64_t* sizes() const { return shape; }
    const int64_t* strides() const { return shape + ndim; }
    int64_t* grad_strides() const { return shape + 2 * ndim; }
  };
  void add(const Positions& positions, Stream stream);
  // Looks at the gradients, and for an update at all state. Nobody may run Python from here to the kernels: another thread
  // may drop a gradient.
  bool collect(bool updating);
  bool same_parameters(const py::list& groups) const;
  // Whether every hyperparameter is the object it was at the last look, one that cannot change.
  bool same_numbers(const py::list& groups);
  template <class Visit>
  void walk_state(Visit visit) const;
  bool same_state();
  // Whether the master copies, and for an update all state, are where they were.
  bool companions_in_place(bool updating);
  // May leave the table half renewed if false: kernels come after a whole look alone.
  bool read_grads();
  bool fits(size_t index, const TensorFacts& grad);
  bool none_is_negated();
  void place_all();
  // Cuts the table once every tensor has its place.
  void cut();
  // Empty slots: those given, or new ones.
  HeldTensors taken(HeldTensors& slots) const;
  void note_first_grads();
  void drop_first_grads();
  // Whether a second gradient was written where the first one lies, which it replaced.
  bool first_grads_lost() const;
  template <class Run>
  void run(Run run);
  template <class Step>
  bool update(Call& call, bool maximize, bool mixing, double scale, Step step);

  int64_t count() const { return static_cast<int64_t>(entries_.size()); }

  const CoreOps& ops_;
  const bool gpu_;
  int32_t device_ = kOnCpu;
  HeldTensors held_;
  int64_t watched_, idle_, masters_ = 0;
  std::vector<py::object> groups_;
  py::list everything_, active_;
  py::dict state_;
  py::list kept_;                      // references that keep the state alive
  std::vector<PyObject*> state_seen_;  // keys and values of the optimizer's state, and the values of each value
  std::vector<std::pair<PyObject*, uint64_t>> state_dicts_;  // and their versions when last looked at
  std::vector<PyObject*> numbers_seen_;  // names and values of the hyperparameters of all groups
  py::list numbers_kept_;                // references that keep the values alive
  int64_t numbers_version_ = 0;
  std::vector<Entry> entries_;
  std::vector<int64_t> shapes_;        // of all entries, side by side, for every step reads them
  std::vector<Place> places_;          // of all watched tensors
  std::vector<void*> grad_handles_;
  HeldTensors slots_;                  // for the gradients, while others may run
  HeldTensors first_grads_;            // from a perturb that keeps them until the update
  HeldTensors first_slots_;            // for the next ones
  std::vector<std::unique_ptr<int64_t[]>> copies_;  // of the shapes of state: a tensor may free its own when it is resized
  std::vector<std::array<View, kStreams>> views_;
  Table table_;
  bool alike_ = true;  // false: the kernels of a GPU would need tensors to lie alike that do not
  bool perturbed_ = false;
};

void connect(py::object core);
const CoreApi& core();
bool can_plan();

}  // namespace rst
