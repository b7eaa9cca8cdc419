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

// Bytes of the last-level cache. Ops on more data than that write past it.
int64_t cache_bytes();

}  // namespace rst
