#include "cuda/launch.h"

#include <array>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "cuda/launches.h"

namespace rst::cuda {

namespace {

// Elements per block: they depend only on the size of the model, so that sums do not depend on the GPU.
int32_t larger_until_few(int32_t chunk, int64_t all) {
  constexpr int64_t kMostChunks = 32768;
#ifdef RST_CUDA_CHUNK
  chunk = RST_CUDA_CHUNK;
#endif
  while (all / chunk > kMostChunks && chunk < (1 << 20)) chunk *= 2;
  return chunk;
}
int64_t elements(const Table& table) {
  int64_t all = 0;
  for (const Tensor& tensor : table.tensors) all += tensor.numel;
  return all;
}
int32_t chunk_of(const Table& table) { return larger_until_few(16384, elements(table)); }
// A block of the norm has an end, which waits for all its loads: fewer blocks where many remain for every processor.
int32_t norm_chunk_of(const Table& table) {
  const int64_t all = elements(table);
  return larger_until_few(all < (16 << 20) ? 16384 : all < (64 << 20) ? 32768 : 65536, all);
}

constexpr int kRowsOnDevice = 1 << 16;  // of which a launch can reach so many
int rows_in_launch(const void* on_device) { return on_device == nullptr ? kRows : kRowsOnDevice; }

LaunchParams launch_params_of(const OpParams& params) {
  LaunchParams launch{};
  static_cast<CommonParams&>(launch) = params;
  return launch;
}

int dtype(const Tensor& tensor) { return static_cast<int>(tensor.dtype); }

void* source_of(const Tensor& tensor, const OpParams& params) { return tensor.data[tensor.source(params.restoring)]; }
void* remainder_of(const Tensor& tensor) { return tensor.remainder ? tensor.data[kMaster] : nullptr; }
int master(const Tensor& tensor) { return static_cast<int>(tensor.master()); }
// Where complex numbers are not pairs of scalars: see kernels.h.
int master_or_complex(const Tensor& tensor, const OpParams& params) {
  return params.adaptive && tensor.complex ? static_cast<int>(Master::Copy) : master(tensor);
}

const GpuKernel* present(const GpuKernel& kernel) { return &kernel; }
constexpr auto kNoRows = [](NoRow&, int, const Tensor&) {};
// Of numbers that are the same for all dtypes: rho or gamma.
auto copying(const double* numbers) {
  return [numbers](double& row, int r, const Tensor&) {
    if (numbers != nullptr) row = numbers[r];
  };
}

// Prepares a row, unless a part of it is in device memory.
template <class Rule>
auto preparing(const OpParams& params) {
  return [&params](UpdateRow<Rule>& row, int r, const Tensor& tensor) {
    const double* const hyperparams = params.hyperparams == nullptr ? nullptr : params.hyperparams + r * Rule::kColumns;
    const double* const step = params.steps == nullptr ? nullptr : params.steps + r;
    if (hyperparams == nullptr || (Rule::kCountsSteps && step == nullptr)) {
      if (hyperparams != nullptr) std::copy_n(hyperparams, static_cast<int>(Rule::kColumns), row.given);
      if (step != nullptr) row.given[Rule::kColumns] = *step;
      return;
    }
    const auto number = [&](int column) { return column < Rule::kColumns ? hyperparams[column] : *step; };
    if (tensor.dtype == DType::Double) {
      row.of_double = PreparedRow<Rule, double>::of(number, params.grad_multiplier, params.flag);
    } else {
      row.of_float = PreparedRow<Rule, float>::of(number, params.grad_multiplier, params.flag);
    }
  };
}

// The tensors with the states of one variant that have remainders, or not, and whose first state is rounded, or not.
template <class A, class Rule, int States>
void update_some(int variant, bool mixing, const Table& table, const OpParams& params, const Launcher& launcher,
                 LaunchCache* cache) {
  std::unique_ptr<OpLaunches> own;
  auto& launches = launches_in<A>(cache, LaunchCache::update(variant, mixing, A::kState, A::kRemainders), own);
  const bool by_value = params.hyperparams != nullptr || params.steps != nullptr;
  const int most_rows = by_value ? kRows : kRowsOnDevice;
  if (!launches.arranged()) {
    launches.arrange(table, chunk_of(table), most_rows, [&](const Tensor& t) {
      const auto& kernels = A::kState ? update_rounding_kernels : update_kernels;
      const bool alike = t.rounds_state == A::kState && t.remainder == A::kRemainders;
      const bool ours = alike && variant_of(params.rule, t) == variant;
      return ours ? present(kernels[variant][dtype(t)][t.has(kFirstGrad)][master(t)]) : nullptr;
    });
  }
  launches.start(
      table, launch_params_of(params), Rule::kColumns, launcher,
      [&](const Tensor& t) {
        std::array<void*, A::kOperands> data{t.data[kParam], t.data[kGrad], source_of(t, params), t.data[kFirstGrad]};
        std::copy_n(t.data + kState0, States, &data[kUpdateState0]);
        if constexpr (A::kRemainders) data[kUpdateState0 + States] = remainder_of(t);
        return data;
      },
      preparing<Rule>(params));
}

// The tensors with the states of one variant.
template <class Rule, int States>
void update_variant(int variant, const Table& table, const OpParams& params, const Launcher& launcher,
                    LaunchCache* cache) {
  const auto first =
      std::find_if(table.tensors.begin(), table.tensors.end(), [](const Tensor& t) { return t.numel > 0; });
  const bool mixing = first != table.tensors.end() && first->has(kFirstGrad);
  update_some<UpdateArgs<Rule, States>, Rule, States>(variant, mixing, table, params, launcher, cache);
  update_some<UpdateArgs<Rule, States, true>, Rule, States>(variant, mixing, table, params, launcher, cache);
  if constexpr (States > 0) {
    update_some<RoundingUpdateArgs<Rule, States>, Rule, States>(variant, mixing, table, params, launcher, cache);
    update_some<RoundingUpdateArgs<Rule, States, true>, Rule, States>(variant, mixing, table, params, launcher, cache);
  }
}

// Whose random bits are not those of its own positions. Other dtypes have none.
bool is_shard(const Tensor& tensor) { return size_of(tensor.dtype) == 2 && !tensor.shard.whole(tensor.numel); }

// The tensors of `table` that are shards, or those that are not.
template <class A>
void perturb_some(Launches<A>& launches, const Table& table, const OpParams& params, const Launcher& launcher) {
  if (!launches.arranged()) {
    launches.arrange(table, chunk_of(table), rows_in_launch(params.on_device.hyperparams), [&](const Tensor& t) {
      const auto& kernels = A::kShards ? perturb_shard_kernels : perturb_kernels;
      const GpuKernel& kernel = kernels[dtype(t)][params.adaptive][master_or_complex(t, params)];
      return is_shard(t) == A::kShards ? present(kernel) : nullptr;
    });
  }
  launches.start(
      table, launch_params_of(params), 1, launcher,
      [](const Tensor& t) {
        return std::array{t.data[kParam], t.data[kGrad], t.data[t.master() == Master::Copy ? kMaster : kBackup],
                          remainder_of(t)};
      },
      copying(params.rhos));
}

// After a launch of perturb failed: brings back what launches before it have moved; only that has a backup. Returns
// what went wrong, if anything did.
std::string undo(std::vector<Tensor> started, const Launcher& launcher) {
  try {
    Table moved;
    moved.tensors = std::move(started);
    for (Tensor& tensor : moved.tensors) tensor.data[kFirstGrad] = nullptr;  // nothing to mix
    restore(moved, OpParams{}, launcher);
    return "";
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace

int64_t norm_partials(const Table& table) {
  const int32_t chunk = norm_chunk_of(table);
  int64_t all = 0;
  for (const Tensor& tensor : table.tensors) all += chunks_in(tensor, chunk);
  return all;
}

void grad_norm(const Table& table, const OpParams& params, double* partials, const Launcher& launcher,
               LaunchCache* cache) {
  std::unique_ptr<OpLaunches> own;
  auto& launches = launches_in<NormArgs>(cache, LaunchCache::kNorm + params.adaptive, own);
  if (!launches.arranged()) {
    launches.arrange(table, norm_chunk_of(table), kRowsOnDevice, [&](const Tensor& t) {
      return present(grad_norm_kernels[dtype(t)][params.adaptive][params.adaptive ? master_or_complex(t, params) : 0]);
    });
    if (launches.empty()) launches.add(grad_norm_kernels[0][0][0]);  // one block, for the norm of nothing
  }
  LaunchParams launch = launch_params_of(params);
  launch.partials = partials;
  launch.all_partials = norm_partials(table);
  launches.start(
      table, launch, 0, launcher,
      [](const Tensor& t) { return std::array{t.data[kGrad], t.data[t.source(false)], remainder_of(t)}; }, kNoRows);
}

void finish_norm(const double* squares, int64_t count, double* stats, const Launcher& launcher) {
  const FinishArgs args{squares, count, stats};
  launcher.launch(finish_norm_kernel, 1, &args, launcher);
}

void perturb(const Table& table, const OpParams& params, const Launcher& launcher, LaunchCache* cache) {
  std::unique_ptr<OpLaunches> own, own_shards;
  auto& launches = launches_in<PerturbArgs>(cache, LaunchCache::kPerturb + params.adaptive, own);
  auto& shards = launches_in<PerturbShardArgs>(cache, LaunchCache::kPerturbShards + params.adaptive, own_shards);
  bool at_shards = false;
  try {
    perturb_some(launches, table, params, launcher);
    at_shards = true;
    perturb_some(shards, table, params, launcher);
  } catch (const std::exception& error) {
    std::vector<Tensor> started = launches.started(table);
    for (Tensor& tensor : at_shards ? shards.started(table) : std::vector<Tensor>()) started.push_back(tensor);
    const std::string second = undo(std::move(started), launcher);
    if (second.empty()) throw;
    throw std::runtime_error(std::string(error.what()) + " (then the weights that were moved before it could not be " +
                             "brought back: " + second + ")");
  }
}

void restore(const Table& table, const OpParams& params, const Launcher& launcher) {
  const LaunchParams launch = launch_params_of(params);
  Launches<RestoreArgs> launches;
  launches.arrange(table, chunk_of(table), kRowsOnDevice,
                   [](const Tensor& t) { return present(restore_kernels[dtype(t)][t.master() == Master::Copy]); });
  launches.start(
      table, launch, 0, launcher, [&](const Tensor& t) { return std::array{t.data[kParam], source_of(t, params)}; },
      kNoRows);
  // An empty tensor has no addresses, so one tensor does not speak for all.
  const auto& tensors = table.tensors;
  if (std::none_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.has(kFirstGrad); })) return;
  Launches<MixArgs> mixes;
  mixes.arrange(table, chunk_of(table), rows_in_launch(params.on_device.hyperparams),
                [](const Tensor& t) { return present(mix_kernels[dtype(t)]); });
  mixes.start(
      table, launch, 1, launcher, [](const Tensor& t) { return std::array{t.data[kGrad], t.data[kFirstGrad]}; },
      copying(params.gammas));
}

void update(const Table& table, const OpParams& params, const Launcher& launcher, LaunchCache* cache) {
  int variant = 0;
#define RST_UPDATE(Rule, states, name, suffix)                                                       \
  if (params.rule == k##Rule) update_variant<Rule, states>(variant, table, params, launcher, cache); \
  ++variant;
  RST_RULE_VARIANTS(RST_UPDATE)
#undef RST_UPDATE
}

}  // namespace rst::cuda
