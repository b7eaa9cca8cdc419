// The ops of the core on the CPU: a chunk table in, results in place. Knows nothing of torch.
#pragma once

#include "cpu/kernels.h"

namespace rst {

// What grad_norm leaves behind, as doubles: norm, 1 / (norm + eps) or 0, whether the norm was finite, and how many
// calls so far had a norm that was not.
enum Stat : int { kNorm, kInverse, kNonFinite, kNonFiniteCount, kTicket, kStats };
constexpr double kNormEps = 1e-12;

// stats <- norm over all gradients; ||T g|| when call.adaptive.
void grad_norm(const Table& table, const Call& call, const Threads& threads, double* stats);
// w <- w + e. call.scales holds rho per row; the inverse norm comes from stats.
void perturb(const Table& table, Call call, const Threads& threads, const double* stats, const double* rho, int rows);
// w <- backup, or the rounded master; with first gradients also g <- (1 - gamma) g1 + gamma g.
void restore(const Table& table, const Call& call, const Threads& threads);
// One step of SGD, Adam or AdamW. Restores w first (folded into the same pass) where a backup or master is present.
void sgd_step(const Table& table, const Call& call, const Threads& threads);
void adam_step(const Table& table, const Call& call, const Threads& threads);

// Bytes of the last-level cache. Ops on more data than that write past it.
int64_t cache_bytes();

}  // namespace rst
