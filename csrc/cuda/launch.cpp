#include "cuda/launch.h"

#include <algorithm>
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

// Hyperparameters and step counts that travel in the arguments of a launch. Null: these do not.
struct Rows {
  const double *data = nullptr, *steps = nullptr;
  int columns = 0, count = 0;
};

// Collects tensors into launches of one kernel and starts each when it is full.
template <int Operands>
class Launches {
  static_assert(sizeof(Args<Operands>) <= kArgumentBytes, "a launch must fit into the arguments of a kernel");

 public:
  // `done` receives the tensors of launches that have started.
  Launches(const GpuKernel& kernel, const LaunchParams& launch, Rows rows, const Launcher& launcher,
           std::vector<const Tensor*>* done = nullptr)
      : kernel_(kernel), launch_(launch), rows_(rows), launcher_(launcher), done_(done) {}

  void add(const Tensor& tensor, void* const (&data)[Operands]) {
    if (tensor.numel == 0) return;
    const int64_t chunks = chunks_in(tensor, launch_.chunk);
    constexpr int64_t kMostBlocks = 0x7fffffff;  // in one launch
    const int reach = rows_.data != nullptr || rows_.steps != nullptr ? kRows : 1 << 16;
    if (count_ == Args<Operands>::kTensors || blocks_ + chunks > kMostBlocks ||
        (count_ > 0 && tensor.row - first_row_ >= reach)) {
      flush(false);
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

  void flush(bool last) {
    if (count_ == 0 && !last) return;
    Args<Operands>& args = *args_;
    args.params = launch_;
    args.params.first_partial = started_;
    args.params.tensors = count_;
    args.params.last = last;
    args.first_chunk[count_] = static_cast<int32_t>(blocks_);
    if (launch_.device_hyperparams != nullptr) {
      args.params.device_hyperparams += static_cast<int64_t>(first_row_) * launch_.columns;
    }
    if (launch_.device_steps != nullptr) args.params.device_steps += first_row_;
    for (int r = 0, row = first_row_; r < kRows && row < rows_.count; ++r, ++row) {
      if (rows_.data != nullptr) {
        std::copy_n(rows_.data + row * rows_.columns, rows_.columns, args.params.hyperparams[r]);
      }
      if (rows_.steps != nullptr) args.params.steps[r] = rows_.steps[row];
    }
    launcher_.launch(kernel_, static_cast<unsigned>(std::max<int64_t>(blocks_, 1)), &args, launcher_);
    if (done_ != nullptr) done_->insert(done_->end(), waiting_.begin(), waiting_.end());
    waiting_.clear();
    started_ += blocks_;
    blocks_ = 0;
    count_ = 0;
  }

  int64_t started() const { return started_; }
  void starts_at(int64_t partial) { started_ = partial; }

 private:
  const GpuKernel& kernel_;
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
  const DeviceScalars& on_device = params.on_device;
  LaunchParams c{};
  c.device_hyperparams = on_device.hyperparams;
  c.device_steps = on_device.steps;
  c.columns = on_device.columns;
  c.rng = on_device.rng;
  c.seed = params.seed;
  c.step = params.step;
  c.stats = params.stats;
  c.grad_scale = on_device.grad_scale;
  c.found_inf = on_device.found_inf;
  c.eta = params.eta;
  c.grad_multiplier = params.grad_multiplier;
  c.chunk = chunk_of(table);
  c.stochastic = params.stochastic;
  c.flag = params.flag;
  return c;
}

Rows rows_of(const Table& table, const double* data, int columns, const double* steps = nullptr) {
  Rows rows{data, steps, columns};
  for (const Tensor& tensor : table.tensors) rows.count = std::max(rows.count, tensor.row + 1);
  return rows;
}

int dtype(const Tensor& tensor) { return static_cast<int>(tensor.dtype); }

// Tensors of one kernel go together; kernels follow one another in the order of their first tensors.
template <int Operands, class Pick, class Gather>
void for_each_kernel(const Table& table, const LaunchParams& launch, Rows rows, const Launcher& launcher, Pick pick,
                     Gather operands_of, std::vector<const Tensor*>* started = nullptr) {
  std::vector<const GpuKernel*> done;
  for (const Tensor& lead : table.tensors) {
    if (lead.numel == 0) continue;
    const GpuKernel* kernel = &pick(lead);
    if (std::find(done.begin(), done.end(), kernel) != done.end()) continue;
    done.push_back(kernel);
    Launches<Operands> launches(*kernel, launch, rows, launcher, started);
    for (const Tensor& tensor : table.tensors) {
      if (tensor.numel == 0 || &pick(tensor) != kernel) continue;
      void* data[Operands];
      operands_of(tensor, data);
      launches.add(tensor, data);
    }
    launches.flush(false);
  }
}

void* source_of(const Tensor& tensor, const OpParams& params) {
  if (tensor.has(kMaster)) return tensor.data[kMaster];
  return tensor.data[tensor.has(kBackup) && params.restoring ? kBackup : kParam];
}

template <int MostStates>
void update_with(const Table& table, const OpParams& params, const Launcher& launcher) {
  constexpr int kOperands = kUpdateState0 + MostStates;
  for_each_kernel<kOperands>(
      table, launch_params_of(table, params),
      rows_of(table, params.hyperparams, kRuleInfos[params.rule].columns, params.steps), launcher,
      [&](const Tensor& t) -> const GpuKernel& {
        return update_kernels[variant_of(params.rule, t)][dtype(t)][t.has(kFirstGrad)][t.has(kMaster)];
      },
      [&](const Tensor& t, void*(&data)[kOperands]) {
        data[kUpdateParam] = t.data[kParam];
        data[kUpdateGrad] = t.data[kGrad];
        data[kUpdateSource] = source_of(t, params);
        data[kUpdateFirst] = t.data[kFirstGrad];
        std::copy_n(t.data + kState0, MostStates, data + kUpdateState0);
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
  auto pick = [&](const Tensor& t) -> const GpuKernel& {
    return grad_norm_kernels[dtype(t)][params.adaptive][params.adaptive && t.complex]
                            [params.adaptive && t.has(kMaster)];
  };
  LaunchParams launch = launch_params_of(table, params);
  launch.partials = partials;
  launch.all_partials = norm_partials(table);
  std::vector<const GpuKernel*> kernels;
  for (const Tensor& tensor : table.tensors) {
    if (tensor.numel > 0 && std::find(kernels.begin(), kernels.end(), &pick(tensor)) == kernels.end()) {
      kernels.push_back(&pick(tensor));
    }
  }
  if (kernels.empty()) kernels.push_back(&grad_norm_kernels[0][0][0][0]);  // the norm of nothing: one block, no tensor
  int64_t partial = 0;
  for (const GpuKernel* kernel : kernels) {
    Launches<kNormOperands> launches(*kernel, launch, {}, launcher);
    launches.starts_at(partial);
    for (const Tensor& tensor : table.tensors) {
      if (tensor.numel == 0 || &pick(tensor) != kernel) continue;
      launches.add(tensor, {tensor.data[kGrad], tensor.data[tensor.has(kMaster) ? kMaster : kParam]});
    }
    launches.flush(kernel == kernels.back());
    partial = launches.started();
  }
}

void perturb(const Table& table, const OpParams& params, const Launcher& launcher) {
  const LaunchParams launch = launch_params_of(table, params);
  std::vector<const Tensor*> started;
  try {
    for_each_kernel<kPerturbOperands>(
        table, launch, rows_of(table, params.rhos, 1), launcher,
        [&](const Tensor& t) -> const GpuKernel& {
          return perturb_kernels[dtype(t)][params.adaptive][params.adaptive && t.complex][t.has(kMaster)];
        },
        [](const Tensor& t, void*(&data)[kPerturbOperands]) {
          data[kPerturbParam] = t.data[kParam];
          data[kPerturbGrad] = t.data[kGrad];
          data[kPerturbCopy] = t.data[t.has(kMaster) ? kMaster : kBackup];
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
      [&](const Tensor& t, void*(&data)[kRestoreOperands]) {
        data[kRestoreParam] = t.data[kParam];
        data[kRestoreSource] = source_of(t, params);
      });
  // An empty tensor has no addresses, so one tensor does not speak for all.
  const auto& tensors = table.tensors;
  if (std::none_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.has(kFirstGrad); })) return;
  for_each_kernel<kMixOperands>(
      table, launch, rows_of(table, params.gammas, 1), launcher,
      [](const Tensor& t) -> const GpuKernel& { return mix_kernels[dtype(t)]; },
      [](const Tensor& t, void*(&data)[kMixOperands]) {
        data[kMixGrad] = t.data[kGrad];
        data[kMixFirst] = t.data[kFirstGrad];
      });
}

void update(const Table& table, const OpParams& params, const Launcher& launcher) {
  switch (kRuleInfos[params.rule].most_states) {
    case 1:
      return update_with<1>(table, params, launcher);
    case 2:
      return update_with<2>(table, params, launcher);
    default:
      return update_with<3>(table, params, launcher);
  }
}

}  // namespace rst::cuda
