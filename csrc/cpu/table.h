// The chunk table: all tensors of one call, cut into pieces that threads share. Knows nothing of torch.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/dtypes.h"

namespace rst {

enum class DType : int { Float = 0, Double = 1, BFloat16 = 2, Half = 3 };
constexpr int kDTypes = 4;
inline int64_t size_of(DType t) { return t == DType::Float ? 4 : t == DType::Double ? 8 : 2; }

// The tensors that belong to one parameter. Absent ones are null.
enum Stream : int { kParam, kGrad, kBackup, kFirstGrad, kBuffer, kBuffer2, kMaster, kStreams };

// One parameter with its companions. Complex tensors are stored as scalars in pairs: `numel` counts scalars.
struct Tensor {
  int64_t numel = 0;
  DType dtype = DType::Float;        // of param, grad, first_grad and backup
  DType state_dtype = DType::Float;  // of the buffers: dtype, or Float beside a master copy
  bool complex = false;
  int row = 0;         // which row of hyperparameters
  int64_t index = 0;   // position among all parameters of the model: picks the random bits
  void* data[kStreams] = {};
  // Not empty when the companions do not lie alike in memory: `sizes` (in elements), and `strides` (in elements) of
  // each stream, one after another. Elements are then visited in row-major order.
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;

  DType dtype_of(int stream) const { return stream == kMaster || stream == kBuffer || stream == kBuffer2 ? state_dtype : dtype; }
  bool strided() const { return !sizes.empty(); }
};

struct Chunk {
  int64_t begin;  // in scalars
  int32_t count;
  int32_t tensor;
};

constexpr int64_t kChunk = 16384;   // scalars; fixes the order of summation, so it never depends on the machine
constexpr int64_t kGather = 1024;   // scalars gathered at a time from strided tensors

struct Table {
  std::vector<Tensor> tensors;
  std::vector<Chunk> chunks;
  std::vector<int64_t> bytes;  // bytes[c]: bytes of one stream in the chunks before c; one entry more than chunks

  void cut();  // fills chunks and bytes from tensors
};

// One tensor as a face of the package hands it over.
struct View {
  void* data = nullptr;
  int ndim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
};

// Sets data, numel, sizes and strides of `tensor` from one view per stream (data null: absent; all of one shape).
// Elements are visited in the order of the parameter's strides, largest first, whatever those of its companions are.
void place(Tensor& tensor, const View (&views)[kStreams]);

// True if two or more indices may reach the same address.
bool may_overlap(int ndim, const int64_t* sizes, const int64_t* strides);
// True if the elements fill a block of memory without gaps, in whatever order of dimensions.
bool is_dense(int ndim, const int64_t* sizes, const int64_t* strides);

// How the core runs on several threads: parallel(n, fn, context) calls fn(k, context) once for every k in [0, n).
struct Threads {
  int count = 1;
  void (*parallel)(int n, void (*fn)(int k, void* context), void* context) = nullptr;
};

// The first chunk of part k of n, so that parts carry about the same number of bytes.
int64_t first_chunk(const Table& table, int k, int n);
// How many threads are worth waking for so much data.
int useful_threads(const Table& table, int streams, int available);

// Copies scalars [begin, begin + count) of a strided stream to or from a packed buffer.
void gather(const Tensor& tensor, int stream, int64_t begin, int64_t count, void* packed);
void scatter(const Tensor& tensor, int stream, int64_t begin, int64_t count, const void* packed);

}  // namespace rst
