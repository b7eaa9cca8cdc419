#include "cpu/run.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

namespace rst {

namespace {

using Pick = Kernel (*)(const KernelTable& kernels, const Tensor& tensor, const OpParams& params);

// `sums`: one per chunk, for grad_norm; else null.
struct Job {
  const Table* table;
  const OpParams* params;
  Pick pick;
  unsigned reads, writes;  // a bit per operand
  double* sums;
  bool backwards;  // from the last block to the first
  const KernelTable& kernels = rst::kernels();
  const KernelTable* kernels_of_wide = &kernels;  // of fp32 and fp64
  bool prefetches = needs_prefetching();
  uint32_t key = RandomBits::key_of_step(params->seed, params->step);
  bool streaming = false;     // see ChunkArgs
  bool side_by_side = false;  // the data is larger than all caches
  int threads = 1;
  int blocks = 1;
  std::vector<std::atomic<bool>> taken{};  // per block
};

void run_strided(const Job& job, const Tensor& tensor, Kernel kernel, ChunkArgs c) {
  alignas(64) char packed[kOperands][kGather * 8];
  const void* const source = c.source;
  const int64_t end = c.begin + c.count;
  c.streaming = false;
  double lanes[kNormLanes] = {};
  if (job.sums != nullptr) c.lanes = lanes;
  for (; c.begin < end; c.begin += c.count) {
    c.count = std::min(kGather, end - c.begin);
    for (int s = 0; s < kOperands; ++s) {
      if (tensor.data[s] == nullptr) continue;
      if (job.reads >> s & 1) gather(tensor, s, c.begin, c.count, packed[s]);
      if (source == tensor.data[s]) c.source = packed[s];
      c.data[s] = packed[s];
    }
    kernel(c);
    for (int s = 0; s < kOperands; ++s) {
      if (tensor.data[s] != nullptr && (job.writes >> s & 1)) scatter(tensor, s, c.begin, c.count, packed[s]);
    }
  }
}

// Chunks [index, end), of one tensor, as one.
void run_chunks(const Job& job, int64_t index, int64_t end) {
  const Chunk &chunk = job.table->chunks[index], &last = job.table->chunks[end - 1];
  const Tensor& tensor = job.table->tensors[chunk.tensor];
  ChunkArgs c{};
  c.params = job.params;
  c.tensor = &tensor;
  c.begin = chunk.begin;
  c.count = last.begin + last.count - chunk.begin;
  c.streaming = job.streaming;
  c.prefetches = job.prefetches;
  c.key = job.key;
  if (job.sums != nullptr) c.sum = job.sums + index;
  const int source = tensor.source(job.params->restoring);
  const bool wide = size_of(tensor.dtype) >= size_of(DType::Float);
  const Kernel kernel = job.pick(wide ? *job.kernels_of_wide : job.kernels, tensor, *job.params);
  if (tensor.strided()) {
    c.source = tensor.data[source];
    run_strided(job, tensor, kernel, c);
  } else {
    // Not std::copy, which calls memmove: with AVX-512 the kernel would wait for its one wide store.
    std::memcpy(c.data, tensor.data, sizeof(c.data));
    for (int s = 0; chunk.begin != 0 && s < kOperands; ++s) {
      if (c.data[s] != nullptr) c.data[s] = static_cast<char*>(c.data[s]) + chunk.begin * size_of(tensor.dtype_of(s));
    }
    c.source = c.data[source];
    kernel(c);
  }
}

// Each thread takes the next block that is left when it has finished one, so a delayed thread does not delay the
// others. It begins with its own share, which the op before may have left in its cache; but data from DRAM is taken
// side by side, since DRAM serves one region of memory better than several far apart. Which thread takes a block does
// not change its result.
void run_blocks(int thread, void* context) {
  Job& job = *static_cast<Job*>(context);
  const int turn = job.backwards ? job.threads - 1 - thread : thread;
  const int first = job.side_by_side ? 0 : static_cast<int>(int64_t{turn} * job.blocks / job.threads);
  for (int i = 0; i < job.blocks; ++i) {
    const int forwards = (first + i) % job.blocks, b = job.backwards ? job.blocks - 1 - forwards : forwards;
    std::atomic<bool>& taken = job.taken[b];
    if (taken.load(std::memory_order_relaxed) || taken.exchange(true, std::memory_order_relaxed)) continue;
    const std::vector<Chunk>& chunks = job.table->chunks;
    const int64_t end = first_chunk(*job.table, b + 1, job.blocks);
    for (int64_t begin = first_chunk(*job.table, b, job.blocks), next = 0; begin < end; begin = next) {
      next = begin + 1;
      // Sums are per chunk. Other kernels take all chunks of a tensor at once: each start waits for memory.
      while (job.sums == nullptr && next < end && chunks[next].tensor == chunks[begin].tensor) ++next;
      run_chunks(job, begin, next);
    }
  }
#if defined(__SSE2__)
  if (job.streaming) _mm_sfence();  // orders the streaming stores of this thread before whatever it publishes next
#endif
}

void run(const Table& table, const OpParams& params, Pick pick, unsigned reads, unsigned writes, const Threads& threads,
         double* sums = nullptr, bool backwards = false) {
  constexpr int64_t kBlockBytes = 512 << 10;  // of one operand
  Job job{&table, &params, pick, reads, writes, sums, backwards};
  // By the operands of the first tensor that has elements: how many are read and written, and the bytes of all together
  // for each of the parameter's. A backup that takes the place of the gradient is no other memory.
  int moved = 0;
  double touched = 0;
  for (int s = 0; s < kOperands && !table.chunks.empty(); ++s) {
    const Tensor& first = table.tensors[table.chunks.front().tensor];
    if (!first.has(s)) continue;
    moved += (reads >> s & 1) + (writes >> s & 1);
    const bool is_other = s != kBackup || first.data[kBackup] != first.data[kGrad];
    if (((reads | writes) >> s & 1) && is_other) {
      touched += static_cast<double>(size_of(first.dtype_of(s))) / static_cast<double>(size_of(first.dtype));
    }
  }
  const double bytes = static_cast<double>(table.bytes.back()) * touched;
  job.threads = threads.parallel == nullptr ? 1 : useful_threads(table, moved, threads.count);
  job.streaming = bytes > static_cast<double>(non_temporal_threshold(job.threads));
  job.side_by_side = bytes > static_cast<double>(cache_bytes());
  if (job.side_by_side) job.kernels_of_wide = &kernels_from_memory();
  job.blocks =
      static_cast<int>(std::max<int64_t>(job.threads == 1 ? 1 : 4 * job.threads, table.bytes.back() / kBlockBytes));
  job.taken = std::vector<std::atomic<bool>>(job.blocks);
  if (job.threads == 1) {
    run_blocks(0, &job);
  } else {
    threads.parallel(job.threads, run_blocks, &job);
  }
}

int dtype(const Tensor& tensor) { return static_cast<int>(tensor.dtype); }
int master(const Tensor& tensor) { return static_cast<int>(tensor.master()); }

}  // namespace

void grad_norm(const Table& table, const OpParams& params, const Threads& threads) {
  std::vector<double> sums(table.chunks.size());
  auto pick = [](const KernelTable& k, const Tensor& t, const OpParams& c) {
    return k.grad_norm[dtype(t)][c.adaptive][master(t)];
  };
  run(table, params, pick, bit(kGrad) | (params.adaptive ? bit(kParam) | bit(kMaster) : 0), 0, threads, sums.data());
  double total = 0;
  for (double sum : sums) total += sum;
  write_stats(total, params.stats);
}

void perturb(const Table& table, const OpParams& params, const Threads& threads) {
  auto pick = [](const KernelTable& k, const Tensor& t, const OpParams& c) {
    return k.perturb[dtype(t)][c.adaptive][master(t)];
  };
  if (params.stats[kInverse] == 0) {  // 0 * inf would be NaN: do not even compute e
    auto keep = [](const KernelTable& k, const Tensor& t, const OpParams&) { return k.backup[dtype(t)]; };
    run(table, params, keep, bit(kParam), bit(kBackup), threads);
    return;
  }
  // Backwards: the norm, which went forwards, left the last gradients in the cache, and the forward pass, which comes
  // next, begins with the first weights.
  run(table, params, pick, bit(kParam) | bit(kGrad) | bit(kMaster), bit(kParam) | bit(kBackup), threads, nullptr, true);
}

void restore(const Table& table, const OpParams& params, const Threads& threads) {
  auto pick = [](const KernelTable& k, const Tensor& t, const OpParams&) {
    return k.restore[dtype(t)][t.master() == Master::Copy];
  };
  run(table, params, pick, bit(kBackup) | bit(kMaster), bit(kParam), threads);
  if (params.gammas == nullptr) return;
  auto mix = [](const KernelTable& k, const Tensor& t, const OpParams&) { return k.mix[dtype(t)]; };
  run(table, params, mix, bit(kGrad) | bit(kFirstGrad), bit(kGrad), threads);
}

void update(const Table& table, const OpParams& params, const Threads& threads) {
  auto pick = [](const KernelTable& k, const Tensor& t, const OpParams& p) {
    const auto& kernels = t.rounds_state ? k.update_rounding : k.update;
    return kernels[variant_of(p.rule, t)][dtype(t)][t.has(kFirstGrad)][master(t)];
  };
  const unsigned state = bit(kState0) | bit(kState1) | bit(kState2) | bit(kMaster);
  const unsigned reads = bit(kParam) | bit(kGrad) | bit(kFirstGrad) | (params.restoring ? bit(kBackup) : 0) | state;
  run(table, params, pick, reads, bit(kParam) | state, threads);
}

}  // namespace rst
