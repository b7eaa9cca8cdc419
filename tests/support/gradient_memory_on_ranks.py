"""On ranks: how many backups a SAM step needs, and what comes of it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import ddp_on_ranks
import paths
import sharded
import torch.distributed as dist
from oracle_optimizer import bits
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rst_fused import RST


def ddp(as_views: bool, holds: bool, steps: int = 4) -> tuple[list[int], list[bytes]]:
    """Backups after each step, and the weights."""
    model = ddp_on_ranks.model_of()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=as_views)
    opt = RST(model.parameters(), lr=0.05, momentum=0.9, rho=0.05, schedule=1.0)
    counts = []
    for t in range(steps):
        for phase in (opt.perturb, opt.step):
            opt.zero_grad()
            ddp_on_ranks.loss_of(wrapped, ddp_on_ranks.batch(t, dist.get_rank())).backward()
            held = [p.grad for p in model.parameters() if holds]
            phase()
            held.clear()
        counts.append(len(opt._step_state.backups))
    return counts, bits(ddp_on_ranks.weights(model))


def fsdp(holds: bool, plans: bool, steps: int = 4) -> tuple[list[int], list[bytes]]:
    model, mine = sharded.sharded_model("fsdp")
    opt = RST(model.parameters(), lr=0.05, momentum=0.9, rho=0.05, schedule=1.0)
    counts = []

    def passes(x: Tensor, y: Tensor, phase: Any) -> None:
        opt.zero_grad()
        (model(mine(x)) - mine(y)).square().mean().backward()
        held = [p.grad for p in model.parameters() if holds]
        phase()
        held.clear()

    with nullcontext() if plans else paths.no_plans():
        for x, y in sharded.batches(steps):
            passes(x, y, opt.perturb)
            passes(x, y, opt.step)
            counts.append(len(opt._step_state.backups))
        assert (opt._plans._plan is not None) == plans
    return counts, bits(sharded.weights(model))
