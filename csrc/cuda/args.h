// What a GPU kernel is given, by value: the tensors of a launch travel as kernel arguments, so nothing is copied to the
// device first, and a CUDA graph keeps its own copy. Shared by host and device; knows nothing of torch or CUDA.
#pragma once

#include <cstdint>

namespace rst::cuda {

// 32,764 bytes of kernel arguments from CUDA 13 on, 4 KiB before. The build says which.
#ifndef RST_CUDA_ARGUMENT_BYTES
#define RST_CUDA_ARGUMENT_BYTES 32764
#endif
constexpr int kArgumentBytes = RST_CUDA_ARGUMENT_BYTES;
constexpr int kThreads = 512;  // of every block
constexpr int kRows = 8;       // rows of hyperparameters in one launch
constexpr int kNumbers = 7;    // in a row: Adam takes the most

// The same for all tensors of a launch.
struct Common {
  double rows[kRows][kNumbers];     // hyperparameters in the order of the schema, Adam's step count behind them
  const double* device_rows;        // or, if not null, as device tensors
  const double* device_steps;
  const int64_t* rng;               // [seed, step]; null: the two below
  uint64_t seed, step;
  double* stats;                    // see rst_fused/_schemas.py
  double* partials;                 // grad_norm: one sum per chunk of all launches
  const float* grad_scale;          // of AMP, or null
  const float* found_inf;
  double eta;
  double direction;                 // 1, or -1 to maximize
  int64_t first_partial, all_partials;
  int32_t tensors, chunk;           // chunk: elements that one block works on
  int32_t columns;                  // of device_rows
  bool last;                        // grad_norm: the launch that finishes the sum
  bool stochastic, nesterov, decoupled;
};

// One launch over tensors with `Streams` companions each (the parameter included).
template <int Streams>
struct Args {
  static constexpr int kTensors =
      (kArgumentBytes - static_cast<int>(sizeof(Common)) - 16) / (8 + 8 * Streams + 4 + 4 + 2);
  Common common;
  int64_t numel[kTensors];  // scalars: a complex number counts as two
  void* data[Streams][kTensors];
  int32_t first_chunk[kTensors + 1];  // the blocks of tensor t are those from first_chunk[t] to first_chunk[t + 1]
  int32_t index[kTensors];            // among all parameters of the model: picks the random bits
  uint16_t row[kTensors];
};

// Which companions each kernel takes, in the order of Args::data.
enum NormStream : int { kNormGrad, kNormWeight, kNormStreams };
enum PerturbStream : int { kPerturbParam, kPerturbGrad, kPerturbCopy, kPerturbStreams };  // copy: backup or master
enum RestoreStream : int { kRestoreParam, kRestoreSource, kRestoreStreams };
enum MixStream : int { kMixGrad, kMixFirst, kMixStreams };
// source: where w is read, the backup, the master or the parameter itself.
enum SgdStream : int { kSgdParam, kSgdGrad, kSgdSource, kSgdFirst, kSgdBuffer, kSgdStreams };
enum AdamStream : int { kAdamParam, kAdamGrad, kAdamSource, kAdamFirst, kAdamBuffer, kAdamBuffer2, kAdamStreams };

struct GpuKernel {
  const char* name;      // as in the PTX
  const void* function;  // what cudaLaunchKernel wants
  int bytes;             // of its arguments
};

}  // namespace rst::cuda
