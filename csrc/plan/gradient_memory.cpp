// Gradients that take the weights of their parameters while these are perturbed: whether nobody else can see them.
#include <algorithm>
#include <utility>

#include "plan/plan.h"
#include "plan/tensor_words.h"

namespace rst {

namespace {

// The weak references of a Python object: a list that begins where its type says.
bool has_weak_references(PyObject* object) {
  const Py_ssize_t offset = Py_TYPE(object)->tp_weaklistoffset;
  return offset != 0 && *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset) != nullptr;
}

// Whether a TensorImpl or StorageImpl has `references` in C++, and its Python object, if there is one, none at all.
// That object is kept by torch, with one reference in each direction.
bool has_only(const uint64_t* words, uint64_t references, int object_word) {
  const ImplLayout& layout = known_layout();
  const uint64_t found = words[layout.references], expected = layout.one_reference + references - 1;
  if (found == expected) return true;
  if (found != ((expected + 1) | layout.object_bit)) return false;
  auto* const object = reinterpret_cast<PyObject*>(words[object_word]);
  return object != nullptr && Py_REFCNT(object) == 1 && !has_weak_references(object);
}

// Where strides of dimensions of size 1 mean nothing.
bool lies_like(const TensorFacts& p, const int64_t* strides) {
  for (int d = 0; d < p.ndim; ++d) {
    if (p.sizes[d] > 1 && strides[d] != p.strides[d]) return false;
  }
  return true;
}

uintptr_t bytes_of(const TensorFacts& facts, const Tensor& tensor) {
  int64_t bytes = size_of(tensor.dtype) * (tensor.complex ? 2 : 1);
  for (int d = 0; d < facts.ndim; ++d) bytes *= facts.sizes[d];
  return static_cast<uintptr_t>(bytes);
}

struct Piece {
  const uint64_t* storage;
  uintptr_t begin, end;
  bool operator<(const Piece& other) const {
    return storage != other.storage ? storage < other.storage : begin < other.begin;
  }
};

// Whether these are all that refers to their storages, as where FSDP2 cuts the gradients of a module from one; and none
// overlaps another.
bool share_among_themselves(std::vector<Piece> pieces, int object_word) {
  std::sort(pieces.begin(), pieces.end());
  for (size_t first = 0, last; first < pieces.size(); first = last) {
    for (last = first + 1; last < pieces.size() && pieces[last].storage == pieces[first].storage; ++last) {
      if (pieces[last].begin < pieces[last - 1].end) return false;
    }
    if (!has_only(pieces[first].storage, last - first, object_word)) return false;
  }
  return true;
}

}  // namespace

bool has_weak_references(const py::handle& tensor) {
  const ImplLayout& layout = known_layout();
  constexpr int kStrong = 32;  // bits of the word of both counts
  const auto seen = [&](const uint64_t* words) {
    return (words[layout.references] & ~layout.object_bit) >> kStrong != layout.one_reference >> kStrong;
  };
  const auto* const impl = *reinterpret_cast<const uint64_t* const*>(tensor_ref(tensor).handle);
  return seen(impl) || seen(reinterpret_cast<const uint64_t*>(impl[layout.storage]));
}

bool Plan::own_gradients() {
  const ImplLayout& layout = known_layout();
  std::vector<Piece> shared;
  for (size_t k = 0; k < swapped_.size(); ++k) {
    const size_t i = swapped_[k];
    swapped_grads_[k] = grad_handles_[i];
    Tensor& tensor = table_.tensors[i];
    if (!lies_like(layouts_[i], grad_strides_[i])) return false;
    if (!lent_) {
      const auto* const impl = *reinterpret_cast<const uint64_t* const*>(grad_handles_[i]);
      if (!has_only(impl, 1, layout.object)) return false;
      const auto* const storage = reinterpret_cast<const uint64_t*>(impl[layout.storage]);
      if (storage[layout.storage_context] != storage[layout.storage_data]) return false;
      if (!has_only(storage, 1, layout.storage_object)) {
        const auto begin = reinterpret_cast<uintptr_t>(tensor.data[kGrad]);
        shared.push_back({storage, begin, begin + bytes_of(layouts_[i], tensor)});
      }
    }
    tensor.data[kBackup] = tensor.data[kGrad];
  }
  kept_in_table_ = !swapped_.empty();
  return shared.empty() || share_among_themselves(std::move(shared), layout.storage_object);
}

bool Plan::read_kept() {
  if (swapped_.empty()) return true;
  const auto seen = [](void* context, int64_t k, void* data, const TensorFacts* facts) {
    Plan& plan = *static_cast<Plan*>(context);
    const size_t i = plan.swapped_[static_cast<size_t>(k)];
    if (facts != nullptr && !(is_like(*facts, plan.layouts_[i]) && lies_like(plan.layouts_[i], facts->strides))) {
      return false;
    }
    plan.table_.tensors[i].data[kBackup] = data;
    return true;
  };
  kept_in_table_ = true;
  return tensors().read_slots(kept_slots_->slots.get(), kept_words_.data(), seen, this);
}

void Plan::forget_kept() {
  if (!std::exchange(kept_in_table_, false)) return;
  for (size_t i : swapped_) table_.tensors[i].data[kBackup] = nullptr;
}

View Plan::backup_of(size_t index) const {
  if (views_[index][kBackup].data != nullptr || !kept_in_table_) return views_[index][kBackup];
  void* const kept = table_.tensors[index].data[kBackup];  // of a parameter that is swapped, else null
  return kept == nullptr ? View{} : View{kept, layouts_[index].ndim, layouts_[index].sizes, layouts_[index].strides};
}

}  // namespace rst
