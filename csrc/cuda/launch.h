// The ops on a GPU: a table of tensors in, kernel launches out. Knows nothing of torch, and of CUDA only the launcher
// it is given, so that the same code can be tested without a GPU.
#pragma once

#include <memory>

#include "core/chunk_table.h"
#include "core/params.h"
#include "cuda/args.h"

namespace rst::cuda {

// How kernels are started: on one stream of one device. `args` holds kernel.bytes and may be reused at once.
struct Launcher {
  void (*launch)(const GpuKernel& kernel, unsigned blocks, const void* args, const Launcher& self);
  int device = 0;
  void* stream = nullptr;
};

// The launches of one op.
struct OpLaunches {
  virtual ~OpLaunches() = default;
};

// What a caller may keep that calls again with the same table, in which only addresses change: which tensors go into
// which launch, and the arguments, in which then addresses and numbers alone are written anew. 32 KiB for each launch
// of the norm, the perturbation and the update, with and without ASAM or mixing. Numbers must travel by value, or not,
// in all calls alike.
class LaunchCache {
 public:
  enum Op : int {
    kNorm,
    kPerturb = kNorm + 2,
    kPerturbShards = kPerturb + 2,
    kUpdate = kPerturbShards + 2,
    kOps = kUpdate + 8 * kRuleVariants
  };
  static constexpr int update(int variant, bool mixing, bool rounding, bool remainders) {
    return kUpdate + 8 * variant + 4 * mixing + 2 * rounding + remainders;
  }
  std::unique_ptr<OpLaunches>& of(int op) { return launches_[op]; }

 private:
  std::unique_ptr<OpLaunches> launches_[kOps];
};

// How many doubles grad_norm needs to work in.
int64_t norm_partials(const Table& table);

// As in cpu/run.h; all pointers in the table, stats and partials are the device's. In the table every tensor must have
// the memory layout of its companions. `cache` may be null.
void grad_norm(const Table& table, const OpParams& params, double* partials, const Launcher& launcher,
               LaunchCache* cache = nullptr);
// stats <- the norm over parts, from `count` sums of squares.
void finish_norm(const double* squares, int64_t count, double* stats, const Launcher& launcher);
void perturb(const Table& table, const OpParams& params, const Launcher& launcher, LaunchCache* cache = nullptr);
void restore(const Table& table, const OpParams& params, const Launcher& launcher);
void update(const Table& table, const OpParams& params, const Launcher& launcher, LaunchCache* cache = nullptr);

}  // namespace rst::cuda
