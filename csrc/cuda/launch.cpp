#include "cuda/launch.h"

#include <algorithm>
#include <array>
#include <memory>

#include "cuda/kernels.h"

namespace rst::cuda {

namespace {

// Elements per block: a power of two that depends only on the size of the model, so that sums do not depend on the GPU.
int32_t chunk_of(const Table& table) {
  constexpr int64_t kMostChunks = 32768;
  int64_t all = 0;
  for (const Tensor& tensor : table.tensors) all += tensor.numel;
  int32_t chunk = 16384;
  while (all / chunk > kMostChunks && chunk < (1 << 20)) chunk *= 2;
  return chunk;
}

int64_t chunks_in(const Tensor& tensor, int32_t chunk) { return (tensor.numel + chunk - 1) / chunk; }

// Hyperparameters and step counts, of which those that are null do not travel in the arguments of a launch.
struct Rows {
  const double *hyperparams = nullptr, *steps = nullptr;
  int columns = 0;
};

// Collects tensors into launches of one kernel after another and starts each when it is full.
template <int Operands>
class Launches {
  static_assert(sizeof(Args<Operands>) <= kArgumentBytes, "a launch must fit into the arguments of a kernel");

 public:
  // `done` receives the tensors of launches that have started.
  Launches(const LaunchParams& launch, Rows rows, const Launcher& launcher, std::vector<const Tensor*>* done = nullptr)
      : launch_(launch), rows_(rows), launcher_(launcher), done_(done) {}

  void add(const GpuKernel& kernel, const Tensor& tensor, const std::array<void*, Operands>& data) {
    const int64_t chunks = chunks_in(tensor, launch_.chunk);
    constexpr int64_t kMostBlocks = 0x7fffffff;  // in one launch
    const int reach = rows_.hyperparams != nullptr || rows_.steps != nullptr ? kRows : 1 << 16;
    if (count_ > 0 &&
        (count_ == Args<Operands>::kTensors || blocks_ + chunks > kMostBlocks || tensor.row - first_row_ >= reach)) {
      flush(kernel, false);
    }
    if (count_ == 0) first_row_ = tensor.row;
    Args<Operands>& args = *args_;
    args.numel[count_] = tensor.numel;
    for (int s = 0; s < Operands; ++s) args.data[s][count_] = data[s];
    args.first_chunk[count_] = static_cast<int32_t>(blocks_);
    args.index[count_] = static_cast<int32_t>(tensor.index);
    args.row[count_] = static_cast<uint16_t>(tensor.row - first_row_);
    ++count_;
    blocks_ += chunks;
    if (done_ != nullptr) waiting_.push_back(&tensor);
  }

  // Starts what has been added, or one block without a tensor. `last`: no launch of the op will follow.
  void flush(const GpuKernel& kernel, bool last) {
    Args<Operands>& args = *args_;
    args.params = launch_;
    args.params.first_partial = started_;
    args.params.tensors = count_;
    args.params.last = last;
    args.first_chunk[count_] = static_cast<int32_t>(blocks_);
    DeviceScalars& on_device = args.params.on_device;
    if (on_device.hyperparams != nullptr) on_device.hyperparams += static_cast<int64_t>(first_row_) * rows_.columns;
    if (on_device.steps != nullptr) on_device.steps += first_row_;
    const int rows = count_ == 0 ? 0 : args.row[count_ - 1] + 1;
    for (int r = 0; rows_.hyperparams != nullptr && r < rows; ++r) {
      std::copy_n(rows_.hyperparams + (first_row_ + r) * rows_.columns, rows_.columns, args.params.hyperparams[r]);
    }
    if (rows_.steps != nullptr) std::copy_n(rows_.steps + first_row_, rows, args.params.steps);
    launcher_.launch(kernel, static_cast<unsigned>(std::max<int64_t>(blocks_, 1)), &args, launcher_);
    if (done_ != nullptr) done_->insert(done_->end(), waiting_.begin(), waiting_.end());
    waiting_.clear();
    started_ += blocks_;
    blocks_ = 0;
    count_ = 0;
  }

 private:
  const LaunchParams& launch_;
  Rows rows_;
  const Launcher& launcher_;
  std::vector<const Tensor*>* done_;
  std::vector<const Tensor*> waiting_;  // in the launch that is being filled
  int count_ = 0, first_row_ = 0;
  int64_t blocks_ = 0, started_ = 0;
  // Not cleared: entries after the last tensor are never read.
  std::unique_ptr<Args<Operands>> args_{new Args<Operands>};
};

LaunchParams launch_params_of(const Table& table, const OpParams& params) {
  LaunchParams launch{};
  static_cast<CommonParams&>(launch) = params;
  launch.chunk = chunk_of(table);
  return launch;
}

int dtype(const Tensor& tensor) { return static_cast<int>(tensor.dtype); }

// Tensors of one kernel go together; kernels follow one another in the order of their first tensors. `operands_of`
// gives what a kernel works on, in the order of its enum in args.h.
template <int Operands, class Pick, class OperandsOf>
void for_each_kernel(const Table& table, const LaunchParams& launch, Rows rows, const Launcher& launcher, Pick pick,
                     OperandsOf operands_of, std::vector<const Tensor*>* started = nullptr) {
  std::vector<const GpuKernel*> kernels;
  for (const Tensor& tensor : table.tensors) {
    if (tensor.numel > 0 && std::find(kernels.begin(), kernels.end(), &pick(tensor)) == kernels.end()) {
      kernels.push_back(&pick(tensor));
    }
  }
  Launches<Operands> launches(launch, rows, launcher, started);
  for (const GpuKernel* kernel : kernels) {
    for (const Tensor& tensor : table.tensors) {
      if (tensor.numel > 0 && &pick(tensor) == kernel) launches.add(*kernel, tensor, operands_of(tensor));
    }
    launches.flush(*kernel, kernel == kernels.back());
  }
}

void* source_of(const Tensor& tensor, const OpParams& params) {
  if (tensor.has(kMaster)) return tensor.data[kMaster];
  return tensor.data[tensor.has(kBackup) && params.restoring ? kBackup : kParam];
}

template <class Rule>
void update_with(const Table& table, const OpParams& params, const Launcher& launcher) {
  constexpr int kOperands = kUpdateState0 + Rule::kMostStates;
  for_each_kernel<kOperands>(
      table, launch_params_of(table, params), {params.hyperparams, params.steps, Rule::kColumns}, launcher,
      [&](const Tensor& t) -> const GpuKernel& {
        return update_kernels[variant_of(params.rule, t)][dtype(t)][t.has(kFirstGrad)][t.has(kMaster)];
      },
      [&](const Tensor& t) {
        std::array<void*, kOperands> data{t.data[kParam], t.data[kGrad], source_of(t, params), t.data[kFirstGrad]};
        std::copy_n(t.data + kState0, Rule::kMostStates, &data[kUpdateState0]);
        return data;
      });
}

}  // namespace

int64_t norm_partials(const Table& table) {
  const int32_t chunk = chunk_of(table);
  int64_t all = 0;
  for (const Tensor& tensor : table.tensors) all += chunks_in(tensor, chunk);
  return all;
}

void grad_norm(const Table& table, const OpParams& params, double* partials, const Launcher& launcher) {
  LaunchParams launch = launch_params_of(table, params);
  launch.partials = partials;
  launch.all_partials = norm_partials(table);
  if (launch.all_partials == 0) {  // the norm of nothing
    return Launches<kNormOperands>(launch, {}, launcher).flush(grad_norm_kernels[0][0][0], true);
  }
  for_each_kernel<kNormOperands>(
      table, launch, {}, launcher,
      [&](const Tensor& t) -> const GpuKernel& {
        return grad_norm_kernels[dtype(t)][params.adaptive][params.adaptive && (t.complex || t.has(kMaster))];
      },
      [](const Tensor& t) { return std::array{t.data[kGrad], t.data[t.has(kMaster) ? kMaster : kParam]}; });
}

void perturb(const Table& table, const OpParams& params, const Launcher& launcher) {
  std::vector<const Tensor*> started;
  try {
    for_each_kernel<kPerturbOperands>(
        table, launch_params_of(table, params), {params.rhos, nullptr, 1}, launcher,
        [&](const Tensor& t) -> const GpuKernel& {
          return perturb_kernels[dtype(t)][params.adaptive][t.has(kMaster) || (params.adaptive && t.complex)];
        },
        [](const Tensor& t) {
          return std::array{t.data[kParam], t.data[kGrad], t.data[t.has(kMaster) ? kMaster : kBackup]};
        },
        &started);
  } catch (...) {  // a launch failed: undo what earlier launches perturbed; only that has a backup
    Table undo;
    for (const Tensor* tensor : started) {
      undo.tensors.push_back(*tensor);
      undo.tensors.back().data[kFirstGrad] = nullptr;  // nothing to mix
    }
    restore(undo, OpParams{}, launcher);
    throw;
  }
}

void restore(const Table& table, const OpParams& params, const Launcher& launcher) {
  const LaunchParams launch = launch_params_of(table, params);
  for_each_kernel<kRestoreOperands>(
      table, launch, {}, launcher,
      [](const Tensor& t) -> const GpuKernel& { return restore_kernels[dtype(t)][t.has(kMaster)]; },
      [&](const Tensor& t) { return std::array{t.data[kParam], source_of(t, params)}; });
  // An empty tensor has no addresses, so one tensor does not speak for all.
  const auto& tensors = table.tensors;
  if (std::none_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.has(kFirstGrad); })) return;
  for_each_kernel<kMixOperands>(
      table, launch, {params.gammas, nullptr, 1}, launcher,
      [](const Tensor& t) -> const GpuKernel& { return mix_kernels[dtype(t)]; },
      [](const Tensor& t) { return std::array{t.data[kGrad], t.data[kFirstGrad]}; });
}

void update(const Table& table, const OpParams& params, const Launcher& launcher) {
#define RST_UPDATE(Rule, name) \
  case k##Rule:                \
    return update_with<Rule>(table, params, launcher);
  switch (params.rule) { RST_RULES(RST_UPDATE) }
#undef RST_UPDATE
}

}  // namespace rst::cuda
