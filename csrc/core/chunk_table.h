// The chunk table: all tensors of one call, cut into chunks that threads or blocks share. Knows nothing of torch.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtypes.h"
#include "math/shard.h"

namespace rst {

// The tensors that belong to one parameter. Absent ones are null.
enum Operand : int { kParam, kGrad, kBackup, kFirstGrad, kState0, kState1, kState2, kMaster, kOperands };
constexpr int kStates = 3;
constexpr bool is_state(int operand) { return operand >= kState0 && operand < kState0 + kStates; }
constexpr unsigned bit(int operand) { return 1u << operand; }

// How a 16-bit parameter has weights in fp32: not at all; as a copy, which takes the place of a backup; or, beside
// bfloat16, as the 16 bits that the parameter (or its backup) lacks, in an int16: see Remainder in math/sam_math.h.
enum class Master : int { None, Copy, Remainder };
constexpr int kMasters = 3;

// One parameter with its companions. A complex tensor is stored as pairs of scalars: `numel` counts scalars.
struct Tensor {
  int64_t numel = 0;
  DType dtype = DType::Float;        // of param, grad, first_grad and backup
  DType state_dtype = DType::Float;  // of states: dtype, or Float beside a master; but see rounds_state
  bool remainder = false;            // the master is one
  bool complex = false;
  bool rounds_state = false;  // the first state is bfloat16, and rounded stochastically when it is written
  int row = 0;                // which row of hyperparameters
  int64_t index = 0;          // position among all parameters of the model: picks the random bits
  int64_t state_index = 0;    // the same of its state
  Shard shard;                // likewise
  void* data[kOperands] = {};
  // Empty unless the companions differ in memory layout. Then `sizes` in elements, and the `strides` in elements of
  // each operand, one operand after another. Elements are then visited in row-major order.
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;

  DType dtype_of(int operand) const {
    if (operand == kState0 && rounds_state) return DType::BFloat16;
    if (operand == kMaster) return remainder ? DType::BFloat16 : state_dtype;  // of so many bytes
    return is_state(operand) ? state_dtype : dtype;
  }
  bool has(int operand) const { return data[operand] != nullptr; }
  Master master() const { return !has(kMaster) ? Master::None : remainder ? Master::Remainder : Master::Copy; }
  // The operand that the weights are read from, with a remainder that completes them; `perturbed`: from a backup.
  Operand source(bool perturbed) const {
    if (master() == Master::Copy) return kMaster;
    return perturbed && has(kBackup) ? kBackup : kParam;
  }
  bool strided() const { return !sizes.empty(); }
};

struct Chunk {
  int64_t begin;  // in scalars
  int32_t count;
  int32_t tensor;
};

constexpr int64_t kChunk = 16384;  // scalars; it fixes the order of summation, so it must not depend on the machine
constexpr int64_t kGather = 1024;  // scalars gathered at a time from strided tensors

struct Table {
  std::vector<Tensor> tensors;
  std::vector<Chunk> chunks;
  std::vector<int64_t> bytes;  // bytes[c]: bytes of one operand in the chunks before c; one entry more than chunks

  void cut();  // fills chunks and bytes from tensors
};

// One tensor as a binding passes it.
struct View {
  void* data = nullptr;
  int ndim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
};

// Sets data, numel, sizes and strides of `tensor` from one view per operand (data null: absent; all of one shape).
// Elements are visited in the order of the parameter's strides, largest first, whatever the companions' strides are.
void set_layout(Tensor& tensor, const View (&views)[kOperands]);

// Sets the shards of all tensors from offset, run and stride of each; a run of 0 is the whole tensor. Without numbers
// nothing is a shard. False, with nothing set, if their number is wrong, or one is negative.
bool set_shards(Table& table, const std::vector<int64_t>& numbers);

// Sets the state_index of all tensors; without numbers it is the position in the table. False likewise.
bool set_state_indices(Table& table, const std::vector<int64_t>& numbers);

// True if two or more indices may reach the same address.
bool may_overlap(int ndim, const int64_t* sizes, const int64_t* strides);
// True if the elements fill a block of memory without gaps, in any order of dimensions.
bool is_dense(int ndim, const int64_t* sizes, const int64_t* strides);

// How kernels run on several threads: parallel(n, fn, context) calls fn(k, context) once for every k in [0, n).
struct Threads {
  int count = 1;
  void (*parallel)(int n, void (*fn)(int k, void* context), void* context) = nullptr;
};

// The first chunk of part k of n, so that parts carry about the same number of bytes.
int64_t first_chunk(const Table& table, int k, int n);
// How many threads are worth waking for so much data.
int useful_threads(const Table& table, int operands, int available);

// Copies scalars [begin, begin + count) of a strided operand to or from a packed buffer.
void gather(const Tensor& tensor, int operand, int64_t begin, int64_t count, void* packed);
void scatter(const Tensor& tensor, int operand, int64_t begin, int64_t count, const void* packed);

}  // namespace rst
