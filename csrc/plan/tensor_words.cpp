#include "plan/tensor_words.h"

#include <malloc.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <tuple>
#include <vector>

#include "torch/plan_api.h"

namespace rst {

namespace py = pybind11;

namespace {

using Words = std::vector<uint64_t>;

uintptr_t impl_of(const py::object& tensor) { return tensor.attr("_cdata").cast<uintptr_t>(); }

// Of the TensorImpl: as many as its memory has. A tensor of torch 2.11 has one more than those of later versions.
Words words_of(const py::object& tensor) {
  auto* const from = reinterpret_cast<uint64_t*>(impl_of(tensor));
  return Words(from, from + malloc_usable_size(from) / sizeof(uint64_t));
}

}  // namespace

// torch says where the TensorImpl of a tensor is (Tensor._cdata), and the Python object is searched for that address.
ptrdiff_t find_impl_offset() {
  const py::object torch = py::module_::import("torch");
  ptrdiff_t found = 0;
  for (int n = 0; n < 2; ++n) {
    const py::object tensor = torch.attr("empty")(n);
    const auto* words = reinterpret_cast<const uintptr_t*>(tensor.ptr());
    const auto size = static_cast<ptrdiff_t>(Py_TYPE(tensor.ptr())->tp_basicsize / sizeof(uintptr_t));
    const auto* const at = std::find(words, words + size, impl_of(tensor));
    const ptrdiff_t offset = at == words + size ? 0 : (at - words) * static_cast<ptrdiff_t>(sizeof(uintptr_t));
    if (n > 0 && offset != found) return 0;
    found = offset;
  }
  return found;
}

static py::object make(const char* dtype) {
  const py::object torch = py::module_::import("torch");
  return torch.attr("empty")(py::make_tuple(7, 11, 13), py::arg("dtype") = torch.attr(dtype));
}

// Of a tensor that is made where memory was full of `fill`: an allocator gives out again what was freed last.
static Words words_made_over(unsigned char fill) {
  size_t bytes = 0;
  {
    const py::object tensor = make("float32");
    bytes = malloc_usable_size(reinterpret_cast<void*>(impl_of(tensor)));
  }
  auto* const memory = static_cast<volatile unsigned char*>(std::malloc(bytes));
  for (size_t i = 0; memory != nullptr && i < bytes; ++i) memory[i] = fill;
  std::free(const_cast<unsigned char*>(memory));
  return words_of(make("float32"));
}

// Expected in a TensorImpl: the number of dimensions, sizes and strides with room for five each, storage offset, number
// of elements, then dtype and device in one word and the dispatch keys in the last one. A tensor is made for each.
static void find_words(ImplLayout& found) {
  const py::object torch = py::module_::import("torch");
  const py::object base = make("float32"), wide = make("float64");
  const py::object view =
      torch.attr("empty")(2000).attr("as_strided")(py::make_tuple(7, 11, 13), py::make_tuple(143, 13, 1), 5);
  const py::object negated = base.attr("_neg_view")();
  const Words words = words_of(base);
  const uint64_t sizes[] = {3, 7, 11, 13}, strides[] = {143, 13, 1};
  const auto at = std::search(words.begin(), words.end(), std::begin(sizes), std::end(sizes));
  const auto first = static_cast<int>(at - words.begin());
  constexpr int kStrides = 6, kOffset = 11, kNumel = 12;
  if (first == 0 || words.end() - at < kWords) return;
  // In bits that torch does not set, tensors differ by what was in memory.
  const uint64_t unset = words_made_over(0x00)[first + kDtypeWord] ^ words_made_over(0xff)[first + kDtypeWord];
  const auto differs = [&](const py::object& other, int word) {
    const Words theirs = words_of(other);
    for (int i = 0; i <= kNumel; ++i) {
      if (i != word && theirs[first + i] != words[first + i]) return false;
    }
    const uint64_t bits = theirs[first + word] ^ words[first + word];
    return (word == kDtypeWord ? bits & ~unset : bits) != 0;
  };
  const bool fits = std::equal(std::begin(strides), std::end(strides), words.begin() + first + kStrides) &&
                    words[first + kNumel] == 1001 && differs(wide, kDtypeWord) && differs(view, kOffset) &&
                    differs(negated, kKeysWord);
  if (fits) {
    found.first_word = first;
    found.dtype_bits = ~unset;
  }
}

namespace {

// Of a StorageImpl: no more than every torch that this is built for has in one.
constexpr int kStorageWordsRead = 8;
using StorageWords = std::array<uint64_t, kStorageWordsRead>;

uintptr_t storage_of(const py::object& tensor) { return impl_of(tensor.attr("untyped_storage")()); }

StorageWords storage_words_of(const py::object& tensor) {
  StorageWords words;
  std::copy_n(reinterpret_cast<const uint64_t*>(storage_of(tensor)), kStorageWordsRead, words.begin());
  return words;
}

// The only word with this value, or 0.
template <class Words>
int only(const Words& words, uint64_t value) {
  const auto at = std::find(words.begin(), words.end(), value);
  const bool once = at != words.end() && std::find(at + 1, words.end(), value) == words.end();
  return once ? static_cast<int>(at - words.begin()) : 0;
}

}  // namespace

// Expected in a TensorImpl and a StorageImpl: their counts of references in the second word. torch makes the Python
// object of a storage when it is asked for it.
static void find_references(ImplLayout& found) {
  constexpr int kReferences = 1;
  const py::object tensor = make("float32");
  const Words words = words_of(tensor);
  auto* const storage = reinterpret_cast<const uint64_t*>(words[found.storage]);
  const uint64_t one = storage[kReferences];
  const py::object object = tensor.attr("untyped_storage")();
  const uint64_t bit = storage[kReferences] - (one + 1);
  const auto objects = reinterpret_cast<uint64_t>(object.ptr());
  const size_t storage_words = malloc_usable_size(const_cast<uint64_t*>(storage)) / sizeof(uint64_t);
  found.object = only(words, reinterpret_cast<uint64_t>(tensor.ptr()));
  found.storage_object = only(Words(storage, storage + storage_words), objects);
  const py::object lent = py::module_::import("torch").attr("from_dlpack")(tensor);
  const StorageWords own = storage_words_of(tensor), others = storage_words_of(lent);
  const uint64_t address = own[found.storage_data];
  int context = found.storage_data + 1;
  while (context < kStorageWordsRead && !(own[context] == address && others[context] != address)) ++context;
  const bool is_one_bit = bit != 0 && (bit & (bit - 1)) == 0 && (one & bit) == 0;
  if (!is_one_bit || words[kReferences] != (one | bit) || found.object == 0 || found.storage_object == 0) return;
  if (context == kStorageWordsRead) return;
  found.storage_context = context;
  found.references = kReferences;
  found.one_reference = one;
  found.object_bit = bit;
}

static auto places(const ImplLayout& x) {
  return std::tie(x.storage, x.storage_data, x.storage_bytes, x.storage_special, x.special_bit);
}

static ImplLayout found_impl_layout() {
  const py::object torch = py::module_::import("torch");
  ImplLayout found;
  for (int n = 0; n < 2; ++n) {
    // A view, whose address is not that of its storage; and an odd number of bytes, which no pointer looks like.
    const int bytes = 30011 + 2 * n;
    const py::object tensor = torch.attr("empty")(bytes, py::arg("dtype") = torch.attr("uint8"));
    const py::object view = tensor.attr("narrow")(0, 1, 7);
    ImplLayout here;
    here.storage = only(words_of(view), storage_of(tensor));
    const StorageWords before = storage_words_of(view);
    // The context of an allocation is mostly its address: the first of both words is the address.
    const auto address = view.attr("untyped_storage")().attr("data_ptr")().cast<uint64_t>();
    here.storage_data = static_cast<int>(std::find(before.begin(), before.end(), address) - before.begin());
    here.storage_bytes = only(before, static_cast<uint64_t>(bytes));
    const py::object lazy = torch.attr("_lazy_clone")(tensor);  // from here on both are copied when they are written
    const StorageWords after = storage_words_of(view);
    for (int i = here.storage_bytes + 1; i < kStorageWordsRead && here.special_bit == 0; ++i) {
      here.storage_special = i;
      here.special_bit = after[i] & ~before[i];
    }
    const bool complete = here.storage != 0 && here.storage_data != 0 && here.storage_data < kStorageWordsRead &&
                          here.storage_bytes != 0 && here.special_bit != 0;
    if (!complete || (n > 0 && places(here) != places(found))) return {};
    found = here;
  }
  find_words(found);
  find_references(found);
  return found;
}

ImplLayout find_impl_layout() {
  try {
    return found_impl_layout();
  } catch (py::error_already_set&) {  // in a mode such as FakeTensorMode, tensors that are made are of another kind
    return {};
  }
}

}  // namespace rst
