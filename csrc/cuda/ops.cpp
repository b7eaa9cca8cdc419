#include "cuda/ops.h"

#include <algorithm>
#include <memory>

#include "cuda/kernels.h"

namespace rst::cuda {

namespace {

// Elements per block: a power of two that depends on the size of the model alone, so that sums do not depend on the GPU.
int32_t chunk_of(const Table& table) {
  constexpr int64_t kMostChunks = 32768;
  int64_t all = 0;
  for (const Tensor& tensor : table.tensors) all += tensor.numel;
  int32_t chunk = 16384;
  while (all / chunk > kMostChunks && chunk < (1 << 20)) chunk *= 2;
  return chunk;
}

int64_t chunks_in(const Tensor& tensor, int32_t chunk) { return (tensor.numel + chunk - 1) / chunk; }

// Collects tensors into launches of one kernel and starts each when it is full.
template <int Streams>
class Launches {
  static_assert(sizeof(Args<Streams>) <= kArgumentBytes, "a launch must fit into the arguments of a kernel");

 public:
  // fill(common, row): writes the numbers of `row` of the op to common.rows[0], and so on for kRows rows.
  using Fill = void (*)(const Call& call, int row, double (&numbers)[kNumbers]);

  // `embeds`: whether numbers travel in the arguments. `done`: where to note the tensors of launches that have started.
  Launches(const GpuKernel& kernel, const Common& common, const Call& call, Fill fill, int rows, bool embeds,
           const Launcher& launcher, std::vector<const Tensor*>* done = nullptr)
      : kernel_(kernel), common_(common), call_(call), fill_(fill), rows_(rows), embeds_(embeds), launcher_(launcher),
        done_(done) {}

  void add(const Tensor& tensor, void* const (&data)[Streams]) {
    if (tensor.numel == 0) return;
    const int64_t chunks = chunks_in(tensor, common_.chunk);
    constexpr int64_t kMostBlocks = 0x7fffffff;  // in one launch
    const int reach = embeds_ ? kRows : 1 << 16;
    if (count_ == Args<Streams>::kTensors || blocks_ + chunks > kMostBlocks ||
        (count_ > 0 && tensor.row - first_row_ >= reach)) {
      flush(false);
    }
    if (count_ == 0) first_row_ = tensor.row;
    Args<Streams>& args = *args_;
    args.numel[count_] = tensor.numel;
    for (int s = 0; s < Streams; ++s) args.data[s][count_] = data[s];
    args.first_chunk[count_] = static_cast<int32_t>(blocks_);
    args.index[count_] = static_cast<int32_t>(tensor.index);
    args.row[count_] = static_cast<uint16_t>(tensor.row - first_row_);
    ++count_;
    blocks_ += chunks;
    if (done_ != nullptr) waiting_.push_back(&tensor);
  }

  void flush(bool last) {
    if (count_ == 0 && !last) return;
    Args<Streams>& args = *args_;
    args.common = common_;
    args.common.first_partial = started_;
    args.common.tensors = count_;
    args.common.last = last;
    args.first_chunk[count_] = static_cast<int32_t>(blocks_);
    if (common_.device_rows != nullptr) args.common.device_rows += static_cast<int64_t>(first_row_) * common_.columns;
    if (common_.device_steps != nullptr) args.common.device_steps += first_row_;
    for (int r = 0; embeds_ && r < kRows && first_row_ + r < rows_; ++r) {
      fill_(call_, first_row_ + r, args.common.rows[r]);
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
  const Common& common_;
  const Call& call_;
  Fill fill_;
  int rows_;
  bool embeds_;
  const Launcher& launcher_;
  std::vector<const Tensor*>* done_;
  std::vector<const Tensor*> waiting_;  // in the launch that is being filled
  int count_ = 0, first_row_ = 0;
  int64_t blocks_ = 0, started_ = 0;
  // Not cleared: what lies behind the last tensor is never read.
  std::unique_ptr<Args<Streams>> args_{new Args<Streams>};
};

Common common_of(const Table& table, const Call& call, const DeviceNumbers& device) {
  Common c{};
  c.device_rows = device.rows;
  c.device_steps = device.steps;
  c.columns = device.columns;
  c.rng = device.rng;
  c.seed = call.seed;
  c.step = call.step;
  c.grad_scale = device.grad_scale;
  c.found_inf = device.found_inf;
  c.eta = call.eta;
  c.direction = call.direction;
  c.chunk = chunk_of(table);
  c.stochastic = call.stochastic;
  c.nesterov = call.nesterov;
  c.decoupled = call.decoupled;
  return c;
}

int rows_of(const Table& table) {
  int rows = 0;
  for (const Tensor& tensor : table.tensors) rows = std::max(rows, tensor.row + 1);
  return rows;
}

bool has(const Tensor& tensor, int stream) { return tensor.data[stream] != nullptr; }
int d(const Tensor& tensor) { return static_cast<int>(tensor.dtype); }

// Tensors of one kernel go together; kernels follow one another in the order of their first tensors.
template <int Streams, class Pick, class Streamed>
void for_each_kernel(const Table& table, const Common& common, const Call& call,
                     typename Launches<Streams>::Fill fill, const Launcher& launcher, Pick pick, Streamed streamed,
                     bool embeds, std::vector<const Tensor*>* started = nullptr) {
  const int rows = rows_of(table);
  std::vector<const GpuKernel*> done;
  for (const Tensor& lead : table.tensors) {
    if (lead.numel == 0) continue;
    const GpuKernel* kernel = &pick(lead);
    if (std::find(done.begin(), done.end(), kernel) != done.end()) continue;
    done.push_back(kernel);
    Launches<Streams> launches(*kernel, common, call, fill, rows, embeds, launcher, started);
    for (const Tensor& tensor : table.tensors) {
      if (tensor.numel == 0 || &pick(tensor) != kernel) continue;
      void* data[Streams];
      streamed(tensor, data);
      launches.add(tensor, data);
    }
    launches.flush(false);
  }
}

void* source_of(const Tensor& tensor, const Call& call) {
  if (has(tensor, kMaster)) return tensor.data[kMaster];
  return tensor.data[has(tensor, kBackup) && call.restoring ? kBackup : kParam];
}

}  // namespace

int64_t norm_partials(const Table& table) {
  const int32_t chunk = chunk_of(table);
  int64_t all = 0;
  for (const Tensor& tensor : table.tensors) all += chunks_in(tensor, chunk);
  return all;
}

void grad_norm(const Table& table, const Call& call, double* stats, double* partials, const Launcher& launcher) {
  auto pick = [&](const Tensor& t) -> const GpuKernel& {
    return grad_norm_kernels[d(t)][call.adaptive][call.adaptive && t.complex][call.adaptive && has(t, kMaster)];
  };
  auto fill = [](const Call&, int, double (&)[kNumbers]) {};
  Common common = common_of(table, call, {});
  common.stats = stats;
  common.partials = partials;
  common.all_partials = norm_partials(table);
  std::vector<const GpuKernel*> kernels;
  for (const Tensor& tensor : table.tensors) {
    if (tensor.numel > 0 && std::find(kernels.begin(), kernels.end(), &pick(tensor)) == kernels.end()) {
      kernels.push_back(&pick(tensor));
    }
  }
  if (kernels.empty()) kernels.push_back(&grad_norm_kernels[0][0][0][0]);  // the norm of nothing: one block, no tensor
  int64_t partial = 0;
  for (const GpuKernel* kernel : kernels) {
    Launches<kNormStreams> launches(*kernel, common, call, fill, 0, false, launcher);
    launches.starts_at(partial);
    for (const Tensor& tensor : table.tensors) {
      if (tensor.numel == 0 || &pick(tensor) != kernel) continue;
      launches.add(tensor, {tensor.data[kGrad], tensor.data[has(tensor, kMaster) ? kMaster : kParam]});
    }
    launches.flush(kernel == kernels.back());
    partial = launches.started();
  }
}

void perturb(const Table& table, const Call& call, const DeviceNumbers& device, double* stats, const Launcher& launcher) {
  Common common = common_of(table, call, device);
  common.stats = stats;
  std::vector<const Tensor*> started;
  try {
    for_each_kernel<kPerturbStreams>(
        table, common, call, [](const Call& c, int row, double (&numbers)[kNumbers]) { numbers[0] = c.scales[row]; },
        launcher,
        [&](const Tensor& t) -> const GpuKernel& {
          return perturb_kernels[d(t)][call.adaptive][call.adaptive && t.complex][has(t, kMaster)];
        },
        [](const Tensor& t, void* (&data)[kPerturbStreams]) {
          data[kPerturbParam] = t.data[kParam];
          data[kPerturbGrad] = t.data[kGrad];
          data[kPerturbCopy] = t.data[has(t, kMaster) ? kMaster : kBackup];
        },
        device.rows == nullptr, &started);
  } catch (...) {  // a launch failed: what earlier launches perturb goes back, and only that has a backup
    Table undo;
    for (const Tensor* tensor : started) {
      undo.tensors.push_back(*tensor);
      undo.tensors.back().data[kFirstGrad] = nullptr;  // nothing to mix
    }
    restore(undo, Call{}, {}, launcher);
    throw;
  }
}

void restore(const Table& table, const Call& call, const DeviceNumbers& device, const Launcher& launcher) {
  const Common common = common_of(table, call, device);
  auto gamma = [](const Call& c, int row, double (&numbers)[kNumbers]) {
    numbers[0] = c.gammas == nullptr ? 1 : c.gammas[row];
  };
  for_each_kernel<kRestoreStreams>(
      table, common, call, gamma, launcher,
      [](const Tensor& t) -> const GpuKernel& { return restore_kernels[d(t)][has(t, kMaster)]; },
      [&](const Tensor& t, void* (&data)[kRestoreStreams]) {
        data[kRestoreParam] = t.data[kParam];
        data[kRestoreSource] = source_of(t, call);
      },
      false);
  // An empty tensor has no addresses, so one tensor does not speak for all.
  const auto& tensors = table.tensors;
  if (std::none_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return has(t, kFirstGrad); })) return;
  for_each_kernel<kMixStreams>(
      table, common, call, gamma, launcher, [](const Tensor& t) -> const GpuKernel& { return mix_kernels[d(t)]; },
      [](const Tensor& t, void* (&data)[kMixStreams]) {
        data[kMixGrad] = t.data[kGrad];
        data[kMixFirst] = t.data[kFirstGrad];
      },
      device.rows == nullptr);
}

void sgd_step(const Table& table, const Call& call, const DeviceNumbers& device, const Launcher& launcher) {
  const Common common = common_of(table, call, device);
  for_each_kernel<kSgdStreams>(
      table, common, call,
      [](const Call& c, int row, double (&numbers)[kNumbers]) {
        const SgdRow& r = c.sgd[row];
        const double all[] = {r.lr, r.momentum, r.dampening, r.weight_decay, r.gamma};
        std::copy(std::begin(all), std::end(all), numbers);
      },
      launcher,
      [](const Tensor& t) -> const GpuKernel& {
        return sgd_step_kernels[d(t)][has(t, kBuffer)][has(t, kFirstGrad)][has(t, kMaster)];
      },
      [&](const Tensor& t, void* (&data)[kSgdStreams]) {
        data[kSgdParam] = t.data[kParam];
        data[kSgdGrad] = t.data[kGrad];
        data[kSgdSource] = source_of(t, call);
        data[kSgdFirst] = t.data[kFirstGrad];
        data[kSgdBuffer] = t.data[kBuffer];
      },
      device.rows == nullptr);
}

void adam_step(const Table& table, const Call& call, const DeviceNumbers& device, const Launcher& launcher) {
  const Common common = common_of(table, call, device);
  for_each_kernel<kAdamStreams>(
      table, common, call,
      [](const Call& c, int row, double (&numbers)[kNumbers]) {
        const AdamRow& r = c.adam[row];
        const double all[] = {r.lr, r.beta1, r.beta2, r.eps, r.weight_decay, r.gamma, r.step};
        std::copy(std::begin(all), std::end(all), numbers);
      },
      launcher,
      [](const Tensor& t) -> const GpuKernel& { return adam_step_kernels[d(t)][has(t, kFirstGrad)][has(t, kMaster)]; },
      [&](const Tensor& t, void* (&data)[kAdamStreams]) {
        data[kAdamParam] = t.data[kParam];
        data[kAdamGrad] = t.data[kGrad];
        data[kAdamSource] = source_of(t, call);
        data[kAdamFirst] = t.data[kFirstGrad];
        data[kAdamBuffer] = t.data[kBuffer];
        data[kAdamBuffer2] = t.data[kBuffer2];
      },
      device.rows == nullptr || device.steps == nullptr);
}

}  // namespace rst::cuda
