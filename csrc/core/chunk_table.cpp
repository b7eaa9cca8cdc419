#include "core/chunk_table.h"

#include <algorithm>
#include <numeric>

namespace rst {

void Table::cut() {
  chunks.clear();
  bytes.assign(1, 0);
  for (size_t t = 0; t < tensors.size(); ++t) {
    for (int64_t begin = 0; begin < tensors[t].numel; begin += kChunk) {
      int64_t count = std::min(kChunk, tensors[t].numel - begin);
      chunks.push_back({begin, static_cast<int32_t>(count), static_cast<int32_t>(t)});
      bytes.push_back(bytes.back() + count * size_of(tensors[t].dtype));
    }
  }
}

static std::vector<int> by_stride(int ndim, const int64_t* sizes, const int64_t* strides) {
  std::vector<int> order;
  for (int d = 0; d < ndim; ++d) {
    if (sizes[d] > 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(), [&](int a, int b) { return strides[a] < strides[b]; });
  return order;
}

static bool is_empty(int ndim, const int64_t* sizes) { return std::find(sizes, sizes + ndim, 0) != sizes + ndim; }

bool may_overlap(int ndim, const int64_t* sizes, const int64_t* strides) {
  if (is_empty(ndim, sizes)) return false;
  int64_t reached = 0;  // the largest offset that the dimensions so far can reach
  for (int d : by_stride(ndim, sizes, strides)) {
    if (strides[d] <= reached) return true;
    reached += (sizes[d] - 1) * strides[d];
  }
  return false;
}

bool is_dense(int ndim, const int64_t* sizes, const int64_t* strides) {
  if (is_empty(ndim, sizes)) return true;
  int64_t expected = 1;
  for (int d : by_stride(ndim, sizes, strides)) {
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

void set_layout(Tensor& tensor, const View (&views)[kOperands]) {
  // A tensor without elements may have a null address; then there is nothing to visit either.
  int lead = kParam;
  while (lead < kOperands - 1 && views[lead].data == nullptr) ++lead;
  const View& first = views[lead];
  const int64_t scalars = tensor.complex ? 2 : 1;
  tensor.numel = first.data == nullptr ? 0 : scalars;
  for (int d = 0; d < first.ndim; ++d) tensor.numel *= first.sizes[d];
  tensor.sizes.clear();
  tensor.strides.clear();

  std::vector<int> order = by_stride(first.ndim, first.sizes, first.strides);
  bool same_layout = is_dense(first.ndim, first.sizes, first.strides);
  for (int s = 0; s < kOperands; ++s) {
    tensor.data[s] = views[s].data;
    if (views[s].data == nullptr) continue;
    for (int d : order) same_layout = same_layout && views[s].strides[d] == first.strides[d];
  }
  if (same_layout || tensor.numel <= scalars) return;
  tensor.strides.assign(static_cast<size_t>(kOperands) * order.size(), 0);
  for (size_t i = 0; i < order.size(); ++i) {
    const int d = order[order.size() - 1 - i];
    tensor.sizes.push_back(first.sizes[d]);
    for (int s = 0; s < kOperands; ++s) {
      if (views[s].data != nullptr) tensor.strides[s * order.size() + i] = views[s].strides[d];
    }
  }
}

bool set_shards(Table& table, const std::vector<int64_t>& numbers) {
  if (numbers.empty()) return true;
  if (numbers.size() != 3 * table.tensors.size()) return false;
  if (std::any_of(numbers.begin(), numbers.end(), [](int64_t number) { return number < 0; })) return false;
  const int64_t* next = numbers.data();
  for (Tensor& tensor : table.tensors) {
    tensor.shard = {next[0], next[1] == 0 ? Shard::kEndless : next[1], next[2]};
    next += 3;
  }
  return true;
}

bool set_state_indices(Table& table, const std::vector<int64_t>& numbers) {
  const bool in_order = numbers.empty();
  if (!in_order && numbers.size() != table.tensors.size()) return false;
  if (std::any_of(numbers.begin(), numbers.end(), [](int64_t n) { return n < 0 || n > INT32_MAX; })) return false;
  for (size_t i = 0; i < table.tensors.size(); ++i) {
    table.tensors[i].state_index = in_order ? static_cast<int64_t>(i) : numbers[i];
  }
  return true;
}

int64_t first_chunk(const Table& table, int k, int n) {
  int64_t wanted = static_cast<int64_t>(static_cast<double>(table.bytes.back()) * k / n);
  if (k >= n) return static_cast<int64_t>(table.chunks.size());
  return std::lower_bound(table.bytes.begin(), table.bytes.end() - 1, wanted) - table.bytes.begin();
}

int useful_threads(const Table& table, int operands, int available) {
  constexpr int64_t kBytesPerThread = 512 << 10;  // below that, waking a thread costs more than its share saves
  int64_t threads =
      std::min<int64_t>(table.bytes.back() * operands / kBytesPerThread, static_cast<int64_t>(table.chunks.size()));
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, available)));
}

// Calls copy(at, packed, size) for each element of the scalars [begin, begin + count), in row-major order: where it is,
// its offset among the packed ones, and its bytes.
template <class Copy>
static void walk(const Tensor& tensor, int operand, int64_t begin, int64_t count, Copy copy) {
  const int64_t scalars = tensor.complex ? 2 : 1, size = scalars * size_of(tensor.dtype_of(operand));
  char* const base = static_cast<char*>(tensor.data[operand]);
  const int ndim = static_cast<int>(tensor.sizes.size());
  const int64_t* strides = tensor.strides.data() + static_cast<int64_t>(operand) * ndim;
  std::vector<int64_t> index(ndim);
  int64_t offset = 0, rest = begin / scalars;
  for (int d = ndim - 1; d >= 0; --d) {
    index[d] = rest % tensor.sizes[d];
    rest /= tensor.sizes[d];
    offset += index[d] * strides[d];
  }
  for (int64_t i = 0; i < count / scalars; ++i) {
    copy(base + offset * size, i * size, size);
    for (int d = ndim - 1; d >= 0; --d) {
      offset += strides[d];
      if (++index[d] < tensor.sizes[d]) break;
      offset -= strides[d] * tensor.sizes[d];
      index[d] = 0;
    }
  }
}

void gather(const Tensor& tensor, int operand, int64_t begin, int64_t count, void* packed) {
  walk(tensor, operand, begin, count,
       [&](char* at, int64_t to, int64_t size) { std::memcpy(static_cast<char*>(packed) + to, at, size); });
}

void scatter(const Tensor& tensor, int operand, int64_t begin, int64_t count, const void* packed) {
  walk(tensor, operand, begin, count,
       [&](char* at, int64_t from, int64_t size) { std::memcpy(at, static_cast<const char*>(packed) + from, size); });
}

}  // namespace rst
