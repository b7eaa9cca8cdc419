// What _C (the kernels, behind torch's stable ABI) offers to _plan_ext (launch plans of the eager path): the ops on
// torch's threads, and what plans ask of tensors and gradients. Passed as a capsule; both modules are built together.
#pragma once

#include "cpu/run.h"
#include "cuda/launch.h"

// As in the stable ABI, whose headers plans do not include: a reference to a tensor.
struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;

namespace rst {

constexpr const char* kCoreCapsule = "rst_fused._C.core";

constexpr int32_t kOnCpu = -1;

// A tensor as a plan knows it: a place where the pointer to its TensorImpl is, which is what the stable ABI calls a
// handle. That of a parameter is in the Python object, which may get another TensorImpl at any time
// (torch.utils.swap_tensors): `impl`, the one it had when the plan was made, then serves prefetching alone.
struct TensorRef {
  AtenTensorHandle handle;
  const void* impl;
};

// What kernels are told about a tensor. Sizes and strides belong to the tensor, or to the plan that noted them.
struct TensorFacts : View {
  int32_t device = kOnCpu;  // the index of a GPU, or kOnCpu
  int32_t dtype = 0;        // torch's number for it
};

// For a handful of dimensions faster than memcmp.
inline bool equal(const int64_t* a, const int64_t* b, int ndim) {
  for (int d = 0; d < ndim; ++d) {
    if (a[d] != b[d]) return false;
  }
  return true;
}

// Whether a tensor could take the place of the other: they may differ in address and strides.
inline bool is_like(const TensorFacts& a, const TensorFacts& b) {
  return a.dtype == b.dtype && a.device == b.device && a.ndim == b.ndim && equal(a.sizes, b.sizes, a.ndim);
}

// The words of a TensorImpl that hold sizes, strides (of up to five dimensions), storage offset, dtype, device and
// dispatch keys: while they stay the same, so do all of these. Comparing them costs less than a call for each.
constexpr int kWords = 15, kDtypeWord = 13, kKeysWord = 14;
struct TensorWords {
  uint64_t words[kWords];  // the first is the number of dimensions
  int64_t begin, end;      // of the tensor's elements in its storage, in bytes
};
// Tensors that agree in all words share them, so that those of a model stay in the cache. Null: not known.
using KnownWords = const TensorWords*;

// Where torch keeps what a plan compares, in words of 8 bytes. It is found out when the package is loaded
// (plan/tensor_words.cpp); a torch that keeps it elsewhere (`first_word` is 0) is asked for each fact by itself.
struct ImplLayout {
  int first_word = 0;                  // in a TensorImpl: TensorWords
  uint64_t dtype_bits = ~uint64_t{0};  // those of the word of dtype and device that mean anything
  int storage = 0;                     // in a TensorImpl: its StorageImpl
  int storage_data = 0, storage_bytes = 0, storage_special = 0;  // in a StorageImpl
  uint64_t special_bit = 0;  // of storage_special: asking for the address does more than that, as in copy on write
  // In both: the word of the reference counts, its value for one reference, and the bit that says that there is a
  // Python object, which is a reference of its own; and where that object is. `references` is 0 if this is not known.
  int references = 0, object = 0, storage_object = 0;
  uint64_t one_reference = 0, object_bit = 0;
  // In a StorageImpl: what its memory is freed by. That is the address, where torch has allocated it for this tensor,
  // and an object of its own where the memory is that of somebody else: NumPy's, DLPack's, a file's, another process's.
  int storage_context = 0;
};

// Called with the gradient of the parameter at `index` while it is in the cache; after false it is not called again,
// but by other threads: see read_grads. `facts` is null where they are those of the last call, but for the address.
using SeenGrad = bool(void* context, int64_t index, void* data, const TensorFacts* facts);

// The ops, on torch's threads or on the current stream of a GPU. `cache`: what they may keep between calls with one
// table, or null.
using Op = void(const Table& table, const OpParams& params, int32_t device, void* cache);
struct CoreOps {
  Op *grad_norm, *perturb, *restore, *update;
  void (*finish_norm)(const double* squares, int64_t count, double* stats, int32_t device);
  void* (*make_cache)();  // null where there is nothing to keep
  void (*release_cache)(void* cache);
};

// What plans ask of tensors and gradients. In the calls of every step, one serves all tensors.
class TensorApi {
 public:
  virtual bool has_autograd_symbols() = 0;  // whether the functions below can be called
  // False if the tensor is not an ordinary strided tensor with memory on the CPU or a GPU.
  virtual bool facts_of(AtenTensorHandle handle, TensorFacts& facts) = 0;
  virtual bool describe(int32_t torch_dtype, Tensor& tensor) = 0;
  virtual void set_impl_layout(const ImplLayout& layout) = 0;
  // Whether tensors [begin, end) are what `layouts` says. `words`: theirs at the last call. `on_threads`: many are
  // compared on torch's threads.
  virtual bool in_place(const TensorRef* tensors, int64_t begin, int64_t end, const TensorFacts* layouts,
                        KnownWords* words, bool on_threads) = 0;
  // Reads the gradients of the first `count` tensors. False if a tensor is not in place, if a gradient is missing, is
  // not an ordinary strided tensor or is negated when it is read, or if `seen` returns false. `grads` receives their
  // handles; it must hold those of the last call, or null. `grad_words`: those of the gradients at the last call. With
  // threads, `seen` is called on several of them without facts, and then perhaps again for all.
  virtual bool read_grads(const TensorRef* tensors, int64_t count, const TensorFacts* layouts, KnownWords* words,
                          AtenTensorHandle* grads, KnownWords* grad_words, SeenGrad* seen, void* context,
                          bool on_threads) = 0;
  virtual bool has_grads(const TensorRef* tensors, int64_t count) = 0;         // whether any of them has one
  virtual void clear_grads(const AtenTensorHandle* grads, int64_t count) = 0;  // p.grad = None, for those of read_grads
  virtual void bump_versions(const TensorRef* tensors, int64_t count) = 0;     // tells autograd that they change

  // Slots keep gradients alive: a list that is made once costs no allocation later. fill_slots takes as many gradients
  // as there are slots, none of them null; of these, clear_grads makes the handles undefined. The op
  // rst_fused::_tensors_in_slots gives them to Python.
  virtual void* make_slots(int64_t count) = 0;
  virtual void fill_slots(void* slots, const AtenTensorHandle* grads) = 0;
  virtual void move_to_slots(void* slots, const AtenTensorHandle* grads) = 0;      // p.grad = None; the slots are empty
  virtual bool facts_in_slot(void* slots, int64_t index, TensorFacts& facts) = 0;  // as facts_of
  // As read_grads, of the gradients in slots.
  virtual bool read_slots(void* slots, KnownWords* grad_words, SeenGrad* seen, void* context) = 0;
  virtual void empty_slots(void* slots) = 0;
  virtual void release_slots(void* slots) = 0;

 protected:
  ~TensorApi() = default;
};
TensorApi& tensor_api();  // for the module _C

struct CoreApi {
  CoreOps cpu;
  const CoreOps* gpu;  // null where the extension was built without CUDA
  TensorApi* tensors;

  std::vector<const KernelTable*> (*runnable_kernels)();
  bool (*select_kernels)(const char* name);
  const KernelTable& (*kernels)();
  const KernelTable& (*kernels_from_memory)();
  int64_t (*cache_bytes)();
  int64_t (*core_cache_bytes)();
  int64_t (*non_temporal_threshold)(int threads);
  void (*set_non_temporal_threshold)(int64_t bytes);

  // Null where the extension was built without CUDA.
  const char* (*cuda_description)();
  int (*driver_version)();   // see cuda/launcher.h
  bool (*has_stream_api)();  // whether torch can be asked for its current CUDA stream
  // Sends the launches of GPU ops on CPU tensors to `launch` (null: nowhere); see cuda_target.h.
  void (*simulate_gpu)(void (*launch)(const cuda::GpuKernel&, unsigned, const void*, const cuda::Launcher&),
                       bool scalars_on_device, bool hyperparams_by_value);
};

}  // namespace rst
