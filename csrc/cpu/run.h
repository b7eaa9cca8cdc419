// The ops on the CPU: a chunk table in, results in place. Knows nothing of torch.
#pragma once

#include "cpu/kernels.h"

namespace rst {

// params.stats <- norm over all gradients; ||T g|| when params.adaptive.
void grad_norm(const Table& table, const OpParams& params, const Threads& threads);
// w <- w + e. The inverse norm comes from params.stats.
void perturb(const Table& table, const OpParams& params, const Threads& threads);
// w <- backup, or the rounded master; with first gradients also g <- (1 - gamma) g1 + gamma g.
void restore(const Table& table, const OpParams& params, const Threads& threads);
// One step of the base optimizer params.rule. Restores w first (folded into the same pass) where a backup or master is
// present.
void update(const Table& table, const OpParams& params, const Threads& threads);

// Bytes of the last-level cache, and of the second-level one, which a core has for itself.
int64_t cache_bytes();
int64_t core_cache_bytes();

// How many bytes of data caches keep from one op to the next, more or less: `own`, two times the second-level caches of
// the threads, or half of the last-level cache if that is more, and never more than that cache. But where over 16 MiB
// of it are listed for each CPU that shares it, half of it does not count: a sign that a virtual machine sees all of
// it, and not with whom it shares it. Beyond so much data plain stores win less of a step where the caches have kept
// the data than they lose where they have not (`python -m benchmarks stores`, on an EPYC and on a Xeon).
int64_t bytes_kept(int64_t last_level, int64_t cpus, int64_t own);
// So much data an op on so many threads may touch before it writes with non-temporal stores what it does not read.
int64_t non_temporal_threshold(int threads);
constexpr int64_t kAutomaticThreshold = -1;
void set_non_temporal_threshold(int64_t bytes);  // for this process

}  // namespace rst
