// How a launch plan is made, and how it goes.
#include <algorithm>

#include "plan/plan.h"
#include "plan/tensor_words.h"

namespace rst {

namespace {

const CoreApi* core_api = nullptr;
ptrdiff_t impl_offset = 0;  // of the pointer to the TensorImpl in a Python tensor; 0: not found
ImplLayout impl_layout;

bool is_remainder(const py::handle& master) {
  return master.attr("dtype").is(py::module_::import("torch").attr("int16"));
}

}  // namespace

void connect(py::object core) {
  core_api = static_cast<const CoreApi*>(PyCapsule_GetPointer(core.ptr(), kCoreCapsule));
  if (core_api == nullptr) throw py::error_already_set();
  impl_offset = find_impl_offset();
  impl_layout = find_impl_layout();
  tensors().set_impl_layout(impl_layout);
  watch_dicts();
}

const CoreApi& core() { return *core_api; }
bool knows_impl_layout() { return impl_layout.first_word != 0; }
bool knows_references() { return impl_layout.references != 0; }
const ImplLayout& known_layout() { return impl_layout; }
bool can_plan() { return tensors().has_autograd_symbols() && impl_offset != 0; }

TensorRef tensor_ref(const py::handle& tensor) {
  static const py::handle type = py::object(py::module_::import("torch").attr("Tensor")).release();
  if (!py::isinstance(tensor, type)) throw py::type_error("not a tensor: " + py::repr(tensor).cast<std::string>());
  char* const at = reinterpret_cast<char*>(tensor.ptr()) + impl_offset;
  return {reinterpret_cast<AtenTensorHandle>(at), *reinterpret_cast<const void* const*>(at)};
}

Plan::Plan(bool gpu, py::list groups, py::list everything, py::list active, py::list idle, std::vector<int64_t> sizes,
           py::list masters, std::vector<py::list> states, py::list backups, py::list steps,
           std::vector<int64_t> row_groups, int rule, bool option, bool maximize, py::dict state, py::object step_state,
           std::vector<int64_t> parts, std::vector<int64_t> shards, std::vector<int64_t> indices,
           std::vector<int64_t> swapped, bool lent)
    : ops_(gpu && core().gpu != nullptr ? *core().gpu : core().cpu),  // without CUDA its ops are never called
      op_cache_(ops_.make_cache == nullptr ? nullptr : ops_.make_cache(), ops_.release_cache),
      gpu_(gpu),
      rule_(rule),
      option_(option),
      maximize_(maximize),
      groups_(groups),
      everything_(everything),
      active_(active),
      idle_(idle),
      state_(state),
      step_state_(step_state),
      row_groups_(std::move(row_groups)),
      lent_(lent) {
  if (rule < 0 || rule >= kRules) throw py::index_error("rule is not the number of a base optimizer");
  if (states.size() > kStates) throw py::value_error("more state tensors than a rule has");
  add_params(sizes);
  for (const py::handle& step : steps) note(step);
  counters_end_ = static_cast<int64_t>(tensors_.size());
  add(masters, kMaster);
  masters_end_ = static_cast<int64_t>(tensors_.size());
  add(backups, kBackup);
  backups_end_ = static_cast<int64_t>(tensors_.size());
  for (size_t k = 0; k < states.size(); ++k) add(states[k], static_cast<Operand>(kState0 + k));
  for (size_t i = 0; i < grad_strides_.size(); ++i) {
    if (masters[i].is_none()) continue;
    Tensor& t = table_.tensors[i];
    t.state_dtype = DType::Float;
    t.remainder = is_remainder(masters[i]);
    if (t.remainder && t.dtype != DType::BFloat16) throw py::value_error("a remainder of what is not bfloat16");
  }
  if (!indices.empty() && !states.empty()) add_rounding(states[0], indices);
  add_parts(parts);
  if (!set_shards(table_, shards)) throw py::value_error("shards are not three numbers >= 0 per active parameter");
  for (const py::handle& tensor : idle_) idle_tensors_.push_back(tensor_ref(tensor));
  add_swapped(swapped);
  hold_companions();
  words_.resize(tensors_.size());
  grad_words_.resize(grad_strides_.size());
  first_grad_words_.resize(grad_strides_.size());
  watch_state();
}

int64_t* Plan::copy(const int64_t* numbers, int count) {
  constexpr size_t kBlock = 1024;
  const auto size = static_cast<size_t>(count);
  if (shapes_.empty() || shapes_.back().size() + size > shapes_.back().capacity()) {
    shapes_.emplace_back().reserve(std::max(size, kBlock));
  }
  std::vector<int64_t>& block = shapes_.back();
  block.resize(block.size() + size);
  return std::copy_n(numbers, size, block.data() + block.size() - size) - size;
}

const TensorFacts& Plan::note(const py::handle& tensor) {
  tensors_.push_back(tensor_ref(tensor));
  TensorFacts& facts = layouts_.emplace_back();
  if (!tensors().facts_of(tensors_.back().handle, facts)) throw py::value_error("not an ordinary tensor");
  facts.sizes = copy(facts.sizes, facts.ndim);
  facts.strides = copy(facts.strides, facts.ndim);
  return facts;
}

void Plan::add_params(const std::vector<int64_t>& sizes) {
  const size_t n = active_.size();
  views_.resize(n);
  grad_handles_.resize(n);
  table_.tensors.resize(n);
  size_t row = 0;
  int64_t left = 0;
  for (size_t i = 0; i < n; ++i) {
    for (; left == 0; ++row) left = sizes.at(row);
    --left;
    const TensorFacts& p = note(active_[i]);
    Tensor& t = table_.tensors[i];
    if (!tensors().describe(p.dtype, t)) throw py::value_error("a parameter has a dtype that no kernel serves");
    device_ = p.device;
    t.state_dtype = t.dtype;
    t.row = static_cast<int>(row) - 1;
    t.index = static_cast<int64_t>(i);
    views_[i][kParam] = p;
    grad_strides_.push_back(copy(p.strides, p.ndim));
  }
}

void Plan::add(const py::list& tensors, Operand operand) {
  for (size_t i = 0; i < grad_strides_.size(); ++i) {
    const py::object tensor = tensors[i];
    if (!tensor.is_none()) views_[i][operand] = note(tensor);
  }
}

void Plan::add_rounding(const py::list& states, const std::vector<int64_t>& indices) {
  if (!set_state_indices(table_, indices)) throw py::value_error("indices are not one number per active parameter");
  for (size_t i = 0; i < grad_strides_.size(); ++i) {
    TensorFacts facts;
    Tensor state;
    const bool known =
        tensors().facts_of(tensor_ref(states[i]).handle, facts) && tensors().describe(facts.dtype, state);
    Tensor& t = table_.tensors[i];
    t.rounds_state = known && state.dtype == DType::BFloat16;
    const bool empty = views_[i][kParam].data == nullptr;  // and so is its master, by which the dtype of state is known
    const bool served = empty || t.state_dtype == DType::BFloat16 || (t.state_dtype == DType::Float && !t.complex);
    if (t.rounds_state && !served) throw py::value_error("a bfloat16 state beside a dtype that is not served with it");
  }
}

void Plan::add_parts(const std::vector<int64_t>& parts) {
  nothing_.cut();
  if (!parts.empty() && parts.size() != grad_strides_.size()) {
    throw py::value_error("parts does not have a number for each active parameter");
  }
  constexpr int64_t kMostParts = 1 << 16;
  for (int64_t part : parts) {
    if (part < 0 || part >= kMostParts) throw py::index_error("parts holds a number that is negative, or too large");
  }
  const int64_t last = parts.empty() ? 0 : *std::max_element(parts.begin(), parts.end());
  if (last == 0) return;  // the table serves as it is
  for (int64_t part = 0; part <= last; ++part) {
    parts_.push_back({{}, {}, {ops_.make_cache == nullptr ? nullptr : ops_.make_cache(), ops_.release_cache}});
  }
  for (size_t i = 0; i < parts.size(); ++i) parts_[parts[i]].members.push_back(i);
}

void Plan::add_swapped(const std::vector<int64_t>& swapped) {
  for (int64_t i : swapped) {
    if (i < 0 || i >= count()) throw py::index_error("swapped holds a number that is no active parameter");
    const auto& views = views_[i];
    const bool copied = views[kMaster].data != nullptr && !table_.tensors[i].remainder;
    if (views[kBackup].data != nullptr || copied) {
      throw py::value_error("a parameter that is swapped has a backup or a master copy");
    }
    const TensorFacts& p = layouts_[i];
    if (!is_dense(p.ndim, p.sizes, p.strides)) throw py::value_error("a parameter that is swapped has gaps");
    swapped_.push_back(static_cast<size_t>(i));
  }
  if (swapped_.empty()) return;
  if (!lent_ && !knows_references()) throw py::value_error("this torch does not show who refers to a gradient");
  kept_ = py::cast(std::make_unique<KeptGrads>(tensors().make_slots(static_cast<int64_t>(swapped_.size()))));
  kept_slots_ = kept_.cast<KeptGrads*>();
  kept_words_.resize(swapped_.size());
  swapped_grads_.resize(swapped_.size());
}

void Plan::keep(const py::list& grads) {
  if (grads.size() != swapped_.size()) throw py::value_error("not a tensor for each parameter that is swapped");
  std::vector<AtenTensorHandle> handles;
  for (const py::handle& grad : grads) handles.push_back(tensor_ref(grad).handle);
  if (kept_slots_ == nullptr) return;
  tensors().fill_slots(kept_slots_->slots.get(), handles.data());
  kept_slots_->full = true;
}

// Parameters may get another TensorImpl at any time, and torch.utils.swap_tensors asks that nobody but Python holds
// them. All other tensors are held here: then the pointers to their TensorImpls are read from one place.
void Plan::hold_companions() {
  const auto companions = static_cast<int64_t>(tensors_.size()) - count();
  if (companions == 0) return;
  std::vector<AtenTensorHandle> handles;
  for (auto i = static_cast<size_t>(count()); i < tensors_.size(); ++i) handles.push_back(tensors_[i].handle);
  companions_.reset(tensors().make_slots(companions));
  tensors().fill_slots(companions_.get(), handles.data());
  for (auto i = static_cast<size_t>(count()); i < tensors_.size(); ++i) {
    tensors_[i].handle = reinterpret_cast<AtenTensorHandle>(&tensors_[i].impl);
  }
}

int Plan::visit(visitproc visitor, void* arg) const {
  for (const py::object* object :
       std::initializer_list<const py::object*>{&groups_, &everything_, &active_, &idle_, &state_, &step_state_,
                                                &state_seen_, &hyperparams_seen_, &first_grads_, &kept_}) {
    if (const int stop = visitor(object->ptr(), arg)) return stop;
  }
  return 0;
}

// A destructor may still call the plan: poll finds no groups then, and no tensor is looked at any more.
void Plan::clear() {
  tensors_.clear();
  grad_strides_.clear();
  idle_tensors_.clear();
  counters_end_ = masters_end_ = backups_end_ = 0;
  table_ = Table();
  parts_.clear();
  first_ = kept_slots_ = nullptr;
  first_grads_kept_ = false;
  swapped_.clear();
  state_dicts_.clear();
  for (py::list* list : {&groups_, &everything_, &active_, &idle_, &state_seen_, &hyperparams_seen_}) {
    *list = py::list();
  }
  state_ = py::dict();
  step_state_ = first_grads_ = kept_ = py::none();
  companions_.reset();
}

}  // namespace rst
