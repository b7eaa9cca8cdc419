"""step() without a draw for it: a loop that knows no perturb() and gives no closure, or a request for empty state."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from rst_fused._step import placeholders, validation
from rst_fused._step.base import StepOptimizer
from rst_fused._step.columns import init_state
from rst_fused._step.sharding import local, locals_of


def only_creates_state(opt: StepOptimizer) -> bool:
    """Whether this step(), of weights that are not perturbed, was one that only creates state: it is done then.

    Warns of a silent base step.
    """
    state = opt._step_state
    t = state.steps + state.finished
    if (state.drawn_at == t and state.unasked_at != t) or opt.capturing or _len_torch_dispatch_stack() > 0:
        return False
    if not (state.released or state.waiting) and _asks_for_state(opt):
        _create_state(opt)
        return True
    if state.placeholders:
        placeholders.discard(opt)
    if not opt._warned_of_silent_step and opt.schedule(t) > 0:
        opt._warned_of_silent_step = True
        warnings.warn(
            f"{type(opt).__name__}.step() without a closure and without perturb(): a base step, whatever p(t) is, "
            f"which is {opt.schedule(t):.3g} at step {t}. For SAM steps write step(closure), or after the first "
            "backward: if opt.perturb(): (with opt.second_pass(model): forward and backward again); opt.step(). Where "
            "a framework calls step(), see rst_fused.integrations; perturb(fire=False) asks for a base step",
            RuntimeWarning,
            stacklevel=4,
        )
    return False


def _asks_for_state(opt: StepOptimizer) -> bool:
    """Whether this is what torch.distributed.checkpoint does to an optimizer without state: lr 0, all gradients zero.

    Gradients, which a GPU may still be computing, are looked at only if all else says so.
    """
    if opt.base is not None and opt.state is not opt.base.state:
        opt._adopt()
    if opt.state or "found_inf" in vars(opt) or not all(_is_zero(group.get("lr", 0.0)) for group in opt.param_groups):
        return False
    grads = [local(p.grad) for group in opt.param_groups for p in group["params"] if p.grad is not None]
    others = sum(g.layout != torch.strided or bool(g.any()) for g in grads)
    # Of shards too, and of ranks without gradients: or they would disagree about what step() is.
    others, there = opt._sharding.counts_over_ranks(others, len(grads))
    return there > 0 and others == 0


def _is_zero(lr: Any) -> bool:
    if isinstance(lr, Tensor):
        return lr.is_cpu and lr.numel() == 1 and float(lr) == 0.0
    return lr == 0.0


@torch.no_grad()
def _create_state(opt: StepOptimizer) -> None:
    """Zeros for every parameter that has a gradient. No step is counted, and no draw is used up."""
    validation.check_phase(opt, updating=True)
    if opt.base is None:
        for group in opt.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    init_state(opt, group, p, updating=True)
    else:
        _create_state_of_instance(opt.base)
    placeholders.note(opt)


def _create_state_of_instance(base: torch.optim.Optimizer) -> None:
    """Only its own step knows what state it keeps; what else that step changes is undone."""
    params = [p for group in base.param_groups for p in group["params"] if p.grad is not None]
    weights = [p.clone() for p in params]
    groups = [dict(group) for group in base.param_groups]
    try:
        base.step()
    finally:
        torch._foreach_copy_(locals_of(params), locals_of(weights))
        for group, before in zip(base.param_groups, groups, strict=True):
            group.update(before)
    for state in base.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif type(value) in (int, float):
                state[name] = type(value)(0)
