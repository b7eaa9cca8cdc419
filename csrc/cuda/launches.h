// Which tensors of a table go into which launch, and how those launches are filled and started.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/launch.h"

namespace rst::cuda {

inline int64_t chunks_in(const Tensor& tensor, int32_t chunk) { return (tensor.numel + chunk - 1) / chunk; }

// `A`: the Args of the kernels.
template <class A>
class Launches final : public OpLaunches {
  static_assert(sizeof(A) <= kArgumentBytes, "a launch must fit into the arguments of a kernel");

 public:
  bool arranged() const { return chunk_ > 0; }
  bool empty() const { return launches_.empty(); }
  void add(const GpuKernel& kernel) { launches_.emplace_back(&kernel, 0); }  // without tensors

  // Tensors of one kernel go together; kernels follow one another in the order of their first tensors. `kernel_of`
  // gives the kernel of a tensor, or null for one that is not served here.
  template <class KernelOf>
  void arrange(const Table& table, int32_t chunk, int most_rows, KernelOf kernel_of) {
    std::vector<Launch> launches;  // an exception leaves none
    std::vector<const GpuKernel*> kernels;
    for (const Tensor& tensor : table.tensors) {
      const GpuKernel* kernel = tensor.numel > 0 ? kernel_of(tensor) : nullptr;
      if (kernel != nullptr && std::find(kernels.begin(), kernels.end(), kernel) == kernels.end()) {
        kernels.push_back(kernel);
      }
    }
    for (const GpuKernel* kernel : kernels) {
      bool begin = true;
      for (size_t t = 0; t < table.tensors.size(); ++t) {
        const Tensor& tensor = table.tensors[t];
        if (tensor.numel == 0 || kernel_of(tensor) != kernel) continue;
        if (begin || !launches.back().takes(tensor, chunk, most_rows)) launches.emplace_back(kernel, tensor.row);
        launches.back().add(tensor, static_cast<int32_t>(t), chunk);
        begin = false;
      }
    }
    launches_ = std::move(launches);
    chunk_ = chunk;
  }

  // `operands_of` gives what a kernel works on, in the order of its enum in args.h; `write_row(row, r, tensor)` fills
  // the r-th row of the table for the kernel of that tensor. `columns`: of hyperparameters in device memory.
  template <class OperandsOf, class WriteRow>
  void start(const Table& table, const LaunchParams& params, int columns, const Launcher& launcher,
             OperandsOf operands_of, WriteRow write_row) {
    int64_t blocks = 0;
    started_ = 0;
    for (Launch& launch : launches_) {
      A& args = *launch.args;
      const int tensors = static_cast<int>(launch.tensors.size());
      for (int i = 0; i < tensors; ++i) {
        const auto data = operands_of(table.tensors[launch.tensors[i]]);
        for (int s = 0; s < A::kOperands; ++s) args.data[s][i] = data[s];
      }
      args.params = params;
      args.params.chunk = chunk_;
      args.params.first_partial = blocks;
      args.params.tensors = tensors;
      args.params.last = started_ + 1 == launches_.size();
      DeviceScalars& on_device = args.params.on_device;
      if (on_device.hyperparams != nullptr) on_device.hyperparams += int64_t{launch.first_row} * columns;
      if (on_device.steps != nullptr) on_device.steps += launch.first_row;
      const int rows = std::min(launch.rows, kRows);
      for (int r = 0; r < rows; ++r) write_row(args.rows[r], launch.first_row + r, table.tensors[launch.tensors[0]]);
      launcher.launch(*launch.kernel, std::max(launch.blocks, 1u), &args, launcher);
      blocks += launch.blocks;
      ++started_;
    }
  }

  // The tensors of the launches that the last start() has made: of all, unless it threw.
  std::vector<Tensor> started(const Table& table) const {
    std::vector<Tensor> found;
    for (size_t k = 0; k < started_; ++k) {
      for (int32_t t : launches_[k].tensors) found.push_back(table.tensors[t]);
    }
    return found;
  }

 private:
  struct Launch {
    const GpuKernel* kernel;
    int first_row, rows = 0;
    unsigned blocks = 0;
    std::vector<int32_t> tensors;    // of the table
    std::unique_ptr<A> args{new A};  // not cleared: entries after the last tensor are never read

    Launch(const GpuKernel* kernel, int first_row) : kernel(kernel), first_row(first_row) {}
    bool takes(const Tensor& tensor, int32_t chunk, int most_rows) const {
      constexpr int64_t kMostBlocks = 0x7fffffff;
      return tensors.size() < static_cast<size_t>(A::kTensors) && tensor.row - first_row < most_rows &&
             blocks + chunks_in(tensor, chunk) <= kMostBlocks;
    }
    void add(const Tensor& tensor, int32_t t, int32_t chunk) {
      const size_t i = tensors.size();
      tensors.push_back(t);
      args->numel[i] = tensor.numel;
      args->first_chunk[i] = static_cast<int32_t>(blocks);
      args->index[i] = static_cast<int32_t>(A::kState ? tensor.state_index : tensor.index);
      if constexpr (A::kShards) args->shard[i] = tensor.shard;
      args->row[i] = static_cast<uint16_t>(tensor.row - first_row);
      blocks += static_cast<unsigned>(chunks_in(tensor, chunk));
      args->first_chunk[i + 1] = static_cast<int32_t>(blocks);
      rows = tensor.row - first_row + 1;
    }
  };

  std::vector<Launch> launches_;
  int32_t chunk_ = 0;  // 0: not arranged
  size_t started_ = 0;
};

// In the cache, or made for this call and then owned by `own`.
template <class A>
Launches<A>& launches_in(LaunchCache* cache, int op, std::unique_ptr<OpLaunches>& own) {
  std::unique_ptr<OpLaunches>& place = cache == nullptr ? own : cache->of(op);
  if (place == nullptr) place = std::make_unique<Launches<A>>();
  return static_cast<Launches<A>&>(*place);
}

}  // namespace rst::cuda
