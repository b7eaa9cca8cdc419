#include "plan/tensor_words.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>

#include "torch/plan_api.h"

namespace rst {

namespace py = pybind11;

namespace {

// Of a TensorImpl: as many as every torch that this is built for has in one.
constexpr int kWordsRead = 22;
using Words = std::array<uint64_t, kWordsRead>;

uintptr_t impl_of(const py::object& tensor) { return tensor.attr("_cdata").cast<uintptr_t>(); }

Words words_of(const py::object& tensor) {
  Words words;
  const auto* const from = reinterpret_cast<const uint64_t*>(impl_of(tensor));
  std::copy(from, from + kWordsRead, words.begin());
  return words;
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

// Expected: the number of dimensions, sizes and strides with room for five each, storage offset, number of elements,
// then dtype and device in one word and the dispatch keys in the last one. A tensor is made for each of them.
int find_first_word() {
  const py::object torch = py::module_::import("torch");
  const auto make = [&](const char* dtype) {
    return torch.attr("empty")(py::make_tuple(7, 11, 13), py::arg("dtype") = torch.attr(dtype));
  };
  const py::object base = make("float32"), wide = make("float64");
  const py::object view =
      torch.attr("empty")(2000).attr("as_strided")(py::make_tuple(7, 11, 13), py::make_tuple(143, 13, 1), 5);
  const py::object negated = base.attr("_neg_view")();
  const Words words = words_of(base);
  const uint64_t sizes[] = {3, 7, 11, 13}, strides[] = {143, 13, 1};
  const auto* const at = std::search(words.begin(), words.end(), std::begin(sizes), std::end(sizes));
  const auto first = static_cast<int>(at - words.begin());
  constexpr int kStrides = 6, kOffset = 11, kNumel = 12, kDtype = 13, kKeys = 14;
  if (first == 0 || first + kWords > kWordsRead) return 0;
  const auto differs = [&](const py::object& other, int word) {
    const Words theirs = words_of(other);
    for (int i = 0; i <= kNumel; ++i) {
      if (i != word && theirs[first + i] != words[first + i]) return false;
    }
    return theirs[first + word] != words[first + word];
  };
  const bool found = std::equal(std::begin(strides), std::end(strides), words.begin() + first + kStrides) &&
                     words[first + kNumel] == 1001 && differs(wide, kDtype) && differs(view, kOffset) &&
                     differs(negated, kKeys);
  return found ? first : 0;
}

}  // namespace rst
