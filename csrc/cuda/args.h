// What a GPU kernel is given, by value: the tensors of a launch travel as kernel arguments, so nothing is copied to the
// device first, and a CUDA graph keeps its own copy. Shared by host and device code; knows nothing of torch or CUDA.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace rst::cuda {

// 32,764 bytes of kernel arguments in builds with CUDA 13, 4 KiB in others. CUDA 12.1 allows more, too, but not with
// every driver that runs it. The build says which.
#ifndef RST_CUDA_ARGUMENT_BYTES
#define RST_CUDA_ARGUMENT_BYTES 32764
#endif
constexpr int kArgumentBytes = RST_CUDA_ARGUMENT_BYTES;
constexpr int kThreads = 512;                             // of every block
constexpr int kRows = kArgumentBytes >= 32764 ? 64 : 12;  // rows of hyperparameters in one launch

// The same for all tensors of a launch. What is not null in `on_device` is read there instead.
struct LaunchParams : CommonParams {
  double* partials;  // grad_norm: one sum per chunk of all launches
  int64_t first_partial, all_partials;
  int32_t tensors, chunk;  // chunk: elements that one block works on
  bool last;               // launch of an op: that of grad_norm finishes the sum
};

// What an update makes of a row of hyperparameters, once per call. V: what it computes in.
template <class Rule, class V>
struct PreparedRow {
  typename Rule::template Step<V> step;
  Mix<V> mix;

  template <class Row>
  static RST_HD PreparedRow of(const Row& row, double grad_multiplier, bool flag) {
    return {Rule::template Step<V>::prepare(row, grad_multiplier, flag), Mix<V>::of(row(Rule::kGamma))};
  }
};

// A row of hyperparameters as it travels: prepared on the host, or as it was given where the kernel reads a part of it
// in device memory and has to prepare it.
template <class Rule>
union UpdateRow {
  PreparedRow<Rule, float> of_float;
  PreparedRow<Rule, double> of_double;
  double given[Rule::kColumns + 1];  // the step count last
};
struct NoRow {};

// One launch over tensors with `Operands` operands each. `More`: bytes for each tensor that a derived struct adds.
template <int Operands_, class Row_, int More = 0>
struct Args {
  using Row = Row_;
  static constexpr int kOperands = Operands_;
  static constexpr int kTensors = (kArgumentBytes - static_cast<int>(sizeof(LaunchParams) + kRows * sizeof(Row)) - 16) /
                                  (8 + 8 * kOperands + 10 + More);
  static constexpr bool kShards = false;  // whether there is room for what is known of shards
  static constexpr bool kState = false;   // whether random bits are those of the state
  LaunchParams params;
  Row rows[kRows];
  int64_t numel[kTensors];  // scalars: a complex number counts as two
  void* data[kOperands][kTensors];
  int32_t first_chunk[kTensors + 1];  // the blocks of tensor t are those from first_chunk[t] to first_chunk[t + 1]
  int32_t index[kTensors];            // among all parameters of the model: picks the random bits
  uint16_t row[kTensors];
};

// The operands of each kernel, in the order of Args::data. copy: the backup, or a master copy. rest: a remainder, else
// null.
enum NormOperand : int { kNormGrad, kNormWeight, kNormRest, kNormOperands };
enum PerturbOperand : int { kPerturbParam, kPerturbGrad, kPerturbCopy, kPerturbRest, kPerturbOperands };
enum RestoreOperand : int { kRestoreParam, kRestoreSource, kRestoreOperands };
enum MixOperand : int { kMixGrad, kMixFirst, kMixOperands };
// source: where w is read, the backup, the master copy or the parameter itself. The states of the rule follow, and
// where there are remainders, these: as one more operand for all, they would take room of tensors in every launch.
enum UpdateOperand : int { kUpdateParam, kUpdateGrad, kUpdateSource, kUpdateFirst, kUpdateState0 };

using NormArgs = Args<kNormOperands, NoRow>;
using PerturbArgs = Args<kPerturbOperands, double>;  // rho
struct PerturbShardArgs : Args<kPerturbOperands, double, sizeof(Shard)> {
  static constexpr bool kShards = true;
  Shard shard[kTensors];
};
using RestoreArgs = Args<kRestoreOperands, NoRow>;
using MixArgs = Args<kMixOperands, double>;  // gamma
template <class Rule, int States, bool Remainders = false>
struct UpdateArgs : Args<kUpdateState0 + States + Remainders, UpdateRow<Rule>> {
  static constexpr bool kRemainders = Remainders;
};
// Of kernels that round the first state stochastically.
template <class Rule, int States, bool Remainders = false>
struct RoundingUpdateArgs : Args<kUpdateState0 + States + Remainders, UpdateRow<Rule>, sizeof(Shard)> {
  static constexpr bool kRemainders = Remainders, kShards = true, kState = true;
  Shard shard[RoundingUpdateArgs::kTensors];
};

// Of finish_norm, which has no tensors of parameters.
struct FinishArgs {
  const double* squares;
  int64_t count;
  double* stats;
};

struct GpuKernel {
  const char* name;      // as in the PTX
  const void* function;  // for cudaLaunchKernel
  int bytes;             // of its arguments
};

}  // namespace rst::cuda
