// What a launch plan asks of tensors and gradients at every step.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <mutex>
#include <unordered_set>

#include "torch/autograd.h"

namespace rst {

namespace {

ImplLayout impl_layout;
constexpr uint64_t kMostDimensions = 5;  // of those that a TensorImpl holds itself

const uint64_t* words_of(AtenTensorHandle tensor) {
  return static_cast<const uint64_t*>(impl_of(tensor)) + impl_layout.first_word;
}

bool same_words(AtenTensorHandle tensor, KnownWords known) {
  if (known == nullptr) return false;
  const uint64_t* const words = words_of(tensor);
  uint64_t different = 0;
  for (int i = 0; i < kDtypeWord; ++i) different |= words[i] ^ known->words[i];
  different |= (words[kDtypeWord] ^ known->words[kDtypeWord]) & impl_layout.dtype_bits;
  for (int i = kDtypeWord + 1; i < kWords; ++i) different |= words[i] ^ known->words[i];
  return different == 0;
}

const void* word_of(AtenTensorHandle tensor, int word) {
  return static_cast<const void* const*>(impl_of(tensor))[word];
}

// Reads the address of a tensor that has these words. False if its storage ends before its last element, or if only
// torch can tell.
bool read_data(AtenTensorHandle tensor, KnownWords known, void*& data) {
  const auto* const storage = static_cast<const uint64_t*>(word_of(tensor, impl_layout.storage));
  if ((storage[impl_layout.storage_special] & impl_layout.special_bit) != 0) return false;
  if (static_cast<int64_t>(storage[impl_layout.storage_bytes]) < known->end) return false;
  char* const begin = reinterpret_cast<char*>(storage[impl_layout.storage_data]);
  const bool has_none = begin == nullptr || known->begin == known->end;
  data = has_none ? nullptr : begin + known->begin;
  return true;
}

// Kept for as long as the process lives: there are as many as models have kinds of tensors.
KnownWords shared_words(AtenTensorHandle tensor, const TensorFacts& facts) {
  if (impl_layout.first_word == 0 || words_of(tensor)[0] > kMostDimensions) return nullptr;
  static std::mutex lock;
  static std::deque<TensorWords> all;
  const std::lock_guard<std::mutex> locked(lock);
  const auto same = [&](const TensorWords& known) { return same_words(tensor, &known); };
  const auto found = std::find_if(all.begin(), all.end(), same);
  if (found != all.end()) return &*found;
  all.emplace_back();
  std::copy_n(words_of(tensor), kWords, all.back().words);
  read_extent(tensor, facts, all.back().begin, all.back().end);
  return &all.back();
}

// Whether it is what it was at the last call, by its words alone.
bool is_unchanged(const TensorRef& tensor, const TensorFacts& layout, KnownWords words) {
  void* data = nullptr;
  return same_words(tensor.handle, words) && read_data(tensor.handle, words, data) && data == layout.data;
}

bool is_in_place(const TensorRef& tensor, const TensorFacts& layout, KnownWords& words) {
  if (is_unchanged(tensor, layout, words)) return true;
  TensorFacts facts;
  if (!read_facts(tensor.handle, facts) || facts.data != layout.data || !is_like(facts, layout) ||
      !equal(facts.strides, layout.strides, layout.ndim)) {
    return false;
  }
  words = shared_words(tensor.handle, facts);
  return true;
}

// Whether torch negates the elements when it reads them: it gives the imaginary part of a conjugated tensor as such a
// view. While its words stay the same, so does this.
bool is_negated(AtenTensorHandle tensor) {
  AtenTensorHandle own = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor, &own));
  StableIValue stack = torch::stable::detail::from(StableTensor(own));
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_neg", "", &stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack);
}

// Reads the address of a gradient that is like that of the last call, by its words alone. It has none in a storage that
// was freed, and without elements.
bool read_unchanged(AtenTensorHandle grad, KnownWords words, void*& data) {
  return same_words(grad, words) && read_data(grad, words, data) && data != nullptr;
}

bool is_seen(AtenTensorHandle grad, KnownWords& words, SeenGrad* seen, void* context, int64_t index) {
  void* data = nullptr;
  if (read_unchanged(grad, words, data)) return seen(context, index, data, nullptr);
  TensorFacts facts;
  if (!read_facts(grad, facts) || is_negated(grad) || !seen(context, index, facts.data, &facts)) return false;
  words = shared_words(grad, facts);
  return true;
}

// Handles of slots come back from Python, so those that exist are known.
std::mutex slots_lock;
std::unordered_set<void*> all_slots;

TensorList& slots_at(void* slots) { return *static_cast<TensorList*>(slots); }

TensorList tensors_in_slots(int64_t handle) {
  void* const slots = reinterpret_cast<void*>(handle);
  const std::lock_guard<std::mutex> locked(slots_lock);
  STD_TORCH_CHECK(all_slots.count(slots) != 0, "rst_fused::_tensors_in_slots: ", handle, " is not a handle of slots");
  TensorList tensors;
  for (const StableTensor& tensor : slots_at(slots)) {
    StableTensor copy;  // of the reference: the slot itself is emptied later
    TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors(tensor.get(), copy.get()));
    tensors.push_back(std::move(copy));
  }
  return tensors;
}

// The objects that torch keeps for a tensor are scattered over memory, and reading each would wait for it: the tensor,
// its storage, what autograd knows about it, its gradient and the gradient's storage. So they are prefetched, each of
// them this many tensors before the next.
constexpr int64_t kPrefetchDistance = 4;

// All lines of an object, which may begin anywhere in the first.
void prefetch(const void* object, int bytes = 1) {
  constexpr int kLine = 64;
  const char* p = static_cast<const char*>(object);
  for (int i = 0; i < bytes - 1; i += kLine) __builtin_prefetch(p + i);
  __builtin_prefetch(p + bytes - 1);
}

// Guesses, which cost time but no correctness if they are wrong: the size of these objects as far as they are read, and
// which words of a tensor point to what autograd knows about it and to its version counter, in the versions of torch
// that this is written for.
void prefetch_impl(const void* impl) { prefetch(impl, 0xb0); }
constexpr int kAutograd = 3, kVersion = 5;
void prefetch_storage(AtenTensorHandle tensor) { prefetch(word_of(tensor, impl_layout.storage), 0x40); }
void prefetch_tensor(const TensorRef& tensor) {
  prefetch(tensor.handle);
  prefetch_impl(tensor.impl);
}

// Calls last(i) for every i of [begin, end), and before it each of `steps`, the first one for an i that is furthest
// ahead.
template <class Last, class... Steps>
void visit(int64_t begin, int64_t end, Last last, Steps... steps) {
  constexpr int64_t kLead = sizeof...(steps) * kPrefetchDistance;
  for (int64_t i = begin - kLead; i < end; ++i) {
    int64_t ahead = i + kLead;
    const auto turn = [&](auto step) {
      if (ahead >= begin && ahead < end) step(ahead);
      ahead -= kPrefetchDistance;
    };
    (turn(steps), ...);
    turn(last);
  }
}

// Whether check(from, to) holds for all parts of [0, count), of which each has a thread; without threads false, with
// nothing checked. Comparing many tensors waits for memory, which several threads do at once. A check must touch no
// count of references, for that may wait for Python's lock, which the caller has; and write only what belongs to its
// part.
template <class Check>
bool holds_on_threads(int64_t count, Check check) {
  constexpr int64_t kPerThread = 250;  // tensors; fewer are compared before another thread is awake
  if (count < 2 * kPerThread || impl_layout.first_word == 0) return false;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count / kPerThread);
  if (threads <= 1) return false;
  std::atomic<bool> holds{true};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t k, int64_t end) {
    for (; k < end; ++k) {
      if (!check(k * count / threads, (k + 1) * count / threads)) holds = false;
    }
  });
  return holds;
}

// What a handle points to is a pointer that owns its TensorImpl, or says that there is none. Exchanging two of them
// touches no count of references.
const void*& impl_at(AtenTensorHandle handle) { return *reinterpret_cast<const void**>(handle); }

// Makes tensors undefined, as a gradient of None is. at(i): the handle of one.
template <class At>
void clear(int64_t count, At at) {
  visit(
      0, count, [&](int64_t i) { TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors(undefined.get(), at(i))); },
      [&](int64_t i) { prefetch(at(i)); }, [&](int64_t i) { prefetch(impl_of(at(i))); });
}

// Whether check(i) holds for all of these tensors; after one that it does not hold for, it is not called.
template <class Check>
bool visit_tensors(const TensorRef* tensors, int64_t begin, int64_t end, Check check) {
  bool fine = true;
  visit(
      begin, end, [&](int64_t i) { fine = fine && check(i); }, [&](int64_t i) { prefetch_tensor(tensors[i]); },
      [&](int64_t i) { prefetch_storage(tensors[i].handle); });
  return fine;
}

// The same of tensors and their gradients, all of which must be there: `grads` receives their handles.
template <class Check>
bool visit_grads(const TensorRef* tensors, int64_t begin, int64_t end, AtenTensorHandle* grads, Check check) {
  bool fine = true;
  visit(
      begin, end, [&](int64_t i) { fine = fine && check(i); },
      [&](int64_t i) {
        prefetch_tensor(tensors[i]);
        prefetch(grads[i]);  // where p.grad was at the last call
      },
      [&](int64_t i) {
        const AtenTensorHandle tensor = tensors[i].handle;
        prefetch_storage(tensor);
        prefetch(word_of(tensor, kAutograd));
        prefetch(word_of(tensor, kVersion));  // for bump_versions
      },
      [&](int64_t i) {
        grads[i] = grad_of(tensors[i].handle);
        if (grads[i] == nullptr) {
          fine = false;
        } else {
          prefetch_impl(impl_of(grads[i]));
        }
      },
      [&](int64_t i) {
        if (fine) prefetch_storage(grads[i]);
      });
  return fine;
}

class Tensors final : public TensorApi {
 public:
  bool has_autograd_symbols() override { return torch_grad != nullptr && torch_bump_version != nullptr; }

  bool facts_of(AtenTensorHandle handle, TensorFacts& facts) override { return read_facts(handle, facts); }

  bool describe(int32_t torch_dtype, Tensor& tensor) override {
    return rst::describe(torch::stable::detail::to<ScalarType>(torch::stable::detail::from(torch_dtype)), tensor);
  }

  void set_impl_layout(const ImplLayout& layout) override { impl_layout = layout; }

  bool read_grads(const TensorRef* tensors, int64_t count, const TensorFacts* layouts, KnownWords* words,
                  AtenTensorHandle* grads, KnownWords* grad_words, SeenGrad* seen, void* context,
                  bool on_threads) override {
    const auto unchanged = [&](int64_t i) {
      void* data = nullptr;
      return is_unchanged(tensors[i], layouts[i], words[i]) && read_unchanged(grads[i], grad_words[i], data) &&
             seen(context, i, data, nullptr);
    };
    const auto part = [&](int64_t from, int64_t to) { return visit_grads(tensors, from, to, grads, unchanged); };
    if (on_threads && holds_on_threads(count, part)) return true;
    return visit_grads(tensors, 0, count, grads, [&](int64_t i) {
      return is_in_place(tensors[i], layouts[i], words[i]) && is_seen(grads[i], grad_words[i], seen, context, i);
    });
  }

  bool in_place(const TensorRef* tensors, int64_t begin, int64_t end, const TensorFacts* layouts, KnownWords* words,
                bool on_threads) override {
    const auto unchanged = [&](int64_t i) { return is_unchanged(tensors[i], layouts[i], words[i]); };
    const auto part = [&](int64_t from, int64_t to) {
      return visit_tensors(tensors, begin + from, begin + to, unchanged);
    };
    if (on_threads && holds_on_threads(end - begin, part)) return true;
    return visit_tensors(tensors, begin, end, [&](int64_t i) { return is_in_place(tensors[i], layouts[i], words[i]); });
  }

  bool has_grads(const TensorRef* tensors, int64_t count) override {
    for (int64_t i = 0; i < count; ++i) {
      if (grad_of(tensors[i].handle) != nullptr) return true;
    }
    return false;
  }

  void clear_grads(const AtenTensorHandle* grads, int64_t count) override {
    clear(count, [&](int64_t i) { return grads[i]; });
  }

  void bump_versions(const TensorRef* tensors, int64_t count) override {
    for (int64_t i = 0; i < count; ++i) torch_bump_version(tensors[i].handle);
  }

  void* make_slots(int64_t count) override {
    auto* const slots = new TensorList(count);
    const std::lock_guard<std::mutex> locked(slots_lock);
    all_slots.insert(slots);
    return slots;
  }

  void fill_slots(void* slots, const AtenTensorHandle* grads) override {
    for (const StableTensor& slot : slots_at(slots)) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors(*grads++, slot.get()));
    }
  }

  void move_to_slots(void* slots, const AtenTensorHandle* grads) override {
    const TensorList& tensors = slots_at(slots);
    visit(
        0, static_cast<int64_t>(tensors.size()),
        [&](int64_t i) { std::swap(impl_at(grads[i]), impl_at(tensors[i].get())); },
        [&](int64_t i) { prefetch(tensors[i].get()); });
  }

  bool facts_in_slot(void* slots, int64_t index, TensorFacts& facts) override {
    return read_facts(slots_at(slots)[index].get(), facts);
  }

  bool read_slots(void* slots, KnownWords* grad_words, SeenGrad* seen, void* context) override {
    const TensorList& tensors = slots_at(slots);
    const auto slot = [&](int64_t i) { return tensors[i].get(); };
    bool fine = true;
    visit(
        0, static_cast<int64_t>(tensors.size()),
        [&](int64_t i) { fine = fine && is_seen(slot(i), grad_words[i], seen, context, i); },
        [&](int64_t i) { prefetch(slot(i)); }, [&](int64_t i) { prefetch_impl(impl_of(slot(i))); },
        [&](int64_t i) { prefetch_storage(slot(i)); });
    return fine;
  }

  void empty_slots(void* slots) override {
    const TensorList& tensors = slots_at(slots);
    clear(static_cast<int64_t>(tensors.size()), [&](int64_t i) { return tensors[i].get(); });
  }

  void release_slots(void* slots) override {
    {
      const std::lock_guard<std::mutex> locked(slots_lock);
      all_slots.erase(slots);
    }
    delete &slots_at(slots);
  }
};

}  // namespace

TensorApi& tensor_api() {
  static Tensors api;
  return api;
}

STABLE_TORCH_LIBRARY_FRAGMENT(rst_fused, m) { m.def("_tensors_in_slots(int slots) -> Tensor[]"); }
STABLE_TORCH_LIBRARY_IMPL(rst_fused, CompositeExplicitAutograd, m) {
  m.impl("_tensors_in_slots", TORCH_BOX(&tensors_in_slots));
}

}  // namespace rst
