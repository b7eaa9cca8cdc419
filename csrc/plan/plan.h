// A launch plan: the chunk table of one optimizer, kept between steps. It is a cache: each call compares every tensor
// that a kernel is going to read or write with what the table says, and runs the kernels: no lists are boxed. It
// decides nothing about a step, and where a step stands it reads from, and writes to, the optimizer's StepState.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <utility>

#include "torch/plan_api.h"

namespace rst {

namespace py = pybind11;

const CoreApi& core();
inline TensorApi& tensors() { return *core().tensors; }

// A list of tensors that _C keeps.
struct ReleaseSlots {
  void operator()(void* slots) const { tensors().release_slots(slots); }
};
using Slots = std::unique_ptr<void, ReleaseSlots>;
// What the ops keep between the calls of a plan.
using OpCache = std::unique_ptr<void, void (*)(void*)>;

// Gradients of the first pass that StepState has as long as they are needed. For G-RST they are the first gradients, in
// the order of StepState.saved, which has every active parameter of the plan then. Else they hold weights: those of the
// parameters that were moved.
struct KeptGrads {
  explicit KeptGrads(void* slots) : slots(slots) {}
  py::list as_list() const;
  // Takes these out of p.grad.
  void take(const AtenTensorHandle* grads) {
    if (full) clear();
    tensors().move_to_slots(slots.get(), grads);
    full = true;
  }
  void clear() {
    stale = users > 0;
    if (stale) return;
    tensors().empty_slots(slots.get());
    full = false;
  }

  Slots slots;
  bool full = false;   // of weights
  int users = 0;       // kernels that run without Python's lock
  bool stale = false;  // to be emptied once these are done
};

// While kernels read or write what is kept. Made and destroyed with Python's lock.
class UsesKept {
 public:
  explicit UsesKept(KeptGrads* kept) : kept_(kept) {
    if (kept_ != nullptr) ++kept_->users;
  }
  UsesKept(const UsesKept&) = delete;
  ~UsesKept() {
    if (kept_ != nullptr && --kept_->users == 0 && kept_->stale) kept_->clear();
  }

 private:
  KeptGrads* kept_;
};

class Plan {
 public:
  // groups: the parameter groups, in a list of the plan's own. everything: all parameters in their order. active: those
  // with a gradient, in the order of the ops; idle: the others. sizes: how many active parameters share each row of
  // hyperparameters. masters, states, backups: the companions of the active parameters, or None. steps: the step
  // counter of each row, where the rule counts steps: a number in float32 on the CPU; row_groups: the group of each
  // row, by number. state: the optimizer's state, in which an update must find the same tensors. step_state: its
  // StepState. gpu: which kernels run. rule, option, maximize: of an update. parts: for each active parameter the
  // number of the part whose norm it belongs to, all in part 0 where it is empty. shards: as those of perturb_.
  // indices: as those of an update that rounds its first state stochastically; empty: it does not.
  // swapped: which of the active parameters, by number, have neither master nor backup: perturb writes their weights
  // where their gradients were, which then nobody else may have. lent: whether that is so has been found out by the
  // caller, who has the gradients from elsewhere.
  Plan(bool gpu, py::list groups, py::list everything, py::list active, py::list idle, std::vector<int64_t> sizes,
       py::list masters, std::vector<py::list> states, py::list backups, py::list steps,
       std::vector<int64_t> row_groups, int rule, bool option, bool maximize, py::dict state, py::object step_state,
       std::vector<int64_t> parts, std::vector<int64_t> shards, std::vector<int64_t> indices,
       std::vector<int64_t> swapped, bool lent);

  // Compares the parameter groups with the plan. Bit 0: whether they are its groups and still hold its parameters; from
  // bit 1 on a number that changes whenever a hyperparameter may have changed.
  int64_t poll(const py::list& groups);

  // The three phases. False, with nothing changed, if anything is not as it was when the plan was made. `after`: the
  // fields of StepState that change, in the same call as the weights, so that no interrupt can fall between.

  // Norm and perturbation with the current gradients, which are taken out of p.grad, and kept if `keep`. `measured`:
  // the norm is in the stats already.
  bool perturb(uintptr_t stats, std::vector<double> rho, bool adaptive, double eta, bool stochastic, uint64_t seed,
               uint64_t step, bool keep, bool measured, const py::dict& after);
  // One update of all parameters, counted in their step counters. rows: the hyperparameters, row after row. `restores`:
  // the parameters are perturbed. `mixing` uses the gradients that perturb kept. Gradients are divided by the scale of
  // AMP: `scale`, or on a GPU what is at the address `grad_scale` (0: none), with found_inf beside it. seed, step:
  // where a state is rounded.
  bool update(std::vector<double> rows, bool restores, bool mixing, double scale, uintptr_t grad_scale,
              uintptr_t found_inf, uint64_t seed, uint64_t step, const py::dict& after);
  bool restore(const py::dict& after);

  // The norm of one part, of the current gradients of either pass, into `stats`; false, with nothing written, as above.
  bool grad_norm(uintptr_t stats, int64_t part, bool adaptive, double eta);

  // For kernels that are started in Python: what an update, or a perturbation, compares; and what a norm does. The
  // addresses of the gradients as bytes, while the gradients are held until `release`; None if anything is not as it
  // was. First gradients are not compared. And what follows the kernels, each in one call.
  py::object match(bool updating, bool restores) { return collect(updating, restores, false) ? held() : py::none(); }
  py::object match_norm() { return collect_for_norm() ? held() : py::none(); }
  void release();
  void clear_grads() { tensors().clear_grads(grad_handles_.data(), count()); }
  void bump_versions() { tensors().bump_versions(tensors_.data(), count()); }

  // Makes first gradients that this plan can use, from one for each active parameter.
  py::object first_grads_of(const py::dict& by_parameter);

  // The gradients that hold weights, in the order of `swapped`. keep: as a plan before this one has left them.
  py::object kept() const { return kept_; }
  // Whether `perturb` and `match` find out who else refers to a gradient.
  bool sees_references() const { return !lent_; }
  void keep(const py::list& grads);

  // For Python's garbage collector, which finds cycles such as a group that holds its own scheduler.
  int visit(visitproc visitor, void* arg) const;
  void clear();

 private:
  // The parameters of one part of the norm.
  struct Part {
    std::vector<size_t> members;
    Table table;
    OpCache cache;
  };
  const Table& renewed(Part& part);  // its table, with the gradients of the last collection

  // Adds a tensor to tensors_ and layouts_.
  const TensorFacts& note(const py::handle& tensor);
  int64_t* copy(const int64_t* numbers, int count);
  void add_params(const std::vector<int64_t>& sizes);
  void add(const py::list& tensors, Operand operand);
  void add_swapped(const std::vector<int64_t>& swapped);
  void hold_companions();
  void watch_state();

  // Reads and compares the gradients, and all other tensors of the call. No Python may run between this and the
  // kernels: another thread may drop a gradient.
  bool collect(bool updating, bool restores, bool mixing);
  // The same of what a norm reads: parameters, masters, gradients.
  bool collect_for_norm();
  py::object held();  // holds the gradients that were collected, and returns their addresses
  bool same_parameters(const py::list& groups) const;
  // Whether every hyperparameter is the object it was at the last poll, and one that cannot change.
  bool same_hyperparams(const py::list& groups);
  bool same_state();
  bool in_place(int64_t begin, int64_t end);
  // Whether nobody else can see the memory of the gradients that weights are going to be written to, which lie like
  // their parameters. Puts them into the table as backups.
  bool own_gradients();
  bool read_kept();    // puts what is kept into the table as backups
  void forget_kept();  // takes it out
  View backup_of(size_t index) const;
  // If false, the table may be half renewed: kernels may run only after a call that returned true.
  bool read_grads();
  bool fits(size_t index, const TensorFacts& grad);
  // Whether the rows of a group are at different steps, for the ops would join them otherwise.
  bool steps_differ() const;
  // Of the steps of a row, once the counters were found in place.
  float& counter(size_t row) const { return *static_cast<float*>(layouts_[grad_strides_.size() + row].data); }
  void set_all_layouts(bool mixing);
  // Cuts the table, and those of the parts, once every tensor has its layout.
  void cut();
  void add_parts(const std::vector<int64_t>& parts);
  void add_rounding(const py::list& states, const std::vector<int64_t>& indices);
  py::object first_grads_with(const AtenTensorHandle* handles);
  bool has_first_grads() const;
  // Frees those that nobody needs any more: a perturbation may have been abandoned without this plan.
  void release_first_grads();
  // Whether they are like the second ones, none of which was written over its first one. Puts them into the table.
  bool read_first_grads();
  void set_mixing(bool mixing);
  // Runs kernels.
  template <class Run>
  void run(Run run);
  void change_weights() { tensors().bump_versions(tensors_.data(), count()); }  // tells autograd
  void become(const py::dict& after);

  size_t row_count() const { return table_.tensors.empty() ? 0 : table_.tensors.back().row + 1; }
  size_t counters() const { return static_cast<size_t>(counters_end_ - count()); }
  int64_t count() const { return static_cast<int64_t>(grad_strides_.size()); }

  const CoreOps& ops_;
  const OpCache op_cache_;
  const bool gpu_;
  const int rule_;
  const bool option_, maximize_;
  int32_t device_ = kOnCpu;
  py::list groups_, everything_, active_, idle_;
  py::dict state_;
  py::object step_state_;
  py::list state_seen_;  // keys and values of the optimizer's state, and the values of each value
  std::vector<std::pair<PyObject*, uint64_t>> state_dicts_;  // and their versions at the last call
  uint64_t changes_seen_ = 0;                                // of all dicts that plans watch
  py::list hyperparams_seen_;                                // names and values of the hyperparameters of all groups
  int64_t hyperparams_version_ = 0;
  std::vector<TensorRef> tensors_;    // parameters, then step counters, masters, backups and states
  std::vector<TensorFacts> layouts_;  // of these
  std::vector<KnownWords> words_, grad_words_, first_grad_words_;  // of these, and of the gradients
  // Their sizes and strides, of which a tensor may free its own: in blocks that stay where they are, side by side.
  std::vector<std::vector<int64_t>> shapes_;
  std::vector<int64_t*> grad_strides_;  // in these; those of the parameter until a gradient is seen
  int64_t counters_end_ = 0, masters_end_ = 0, backups_end_ = 0;
  std::vector<TensorRef> idle_tensors_;
  std::vector<int64_t> row_groups_;
  std::vector<AtenTensorHandle> grad_handles_;
  Slots companions_;                     // all tensors but the parameters
  Slots slots_;                          // for the gradients, while others may run
  py::object first_grads_ = py::none();  // made once, and again while somebody has the last ones
  KeptGrads* first_ = nullptr;
  bool first_grads_kept_ = false;    // whether there may be any in it
  bool mixes_ = false;               // whether the table has first gradients
  bool first_grads_differ_ = false;  // in strides, from the second ones
  // Parameters without a backup, their gradients in the last collection, and these while they hold weights.
  std::vector<size_t> swapped_;
  bool lent_ = false;
  std::vector<AtenTensorHandle> swapped_grads_;
  py::object kept_ = py::none();
  KeptGrads* kept_slots_ = nullptr;
  std::vector<KnownWords> kept_words_;
  bool kept_in_table_ = false;
  std::vector<std::array<View, kOperands>> views_;
  Table table_;
  std::vector<Part> parts_;  // empty where the whole table is one
  Table nothing_;            // of a part without parameters
  bool same_layout_ = true;  // false: tensors of a parameter differ in layout, which GPU kernels do not serve
};

void connect(py::object core);
// To be told of changes of dicts, where Python can tell.
void watch_dicts();
// Whether plans can work with this torch and this Python.
bool can_plan();
// Whether they compare words, rather than ask torch for each fact of a tensor.
bool knows_impl_layout();
// Whether they can tell that nobody else refers to a gradient.
bool knows_references();
// Whether C++ has weak references to a tensor or its storage. Only where references are known, and of one with memory.
bool has_weak_references(const py::handle& tensor);
TensorRef tensor_ref(const py::handle& tensor);

}  // namespace rst
