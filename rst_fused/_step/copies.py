"""Copies of the weights that a forward pass would take for the weights, after they moved."""

from __future__ import annotations

from torch import clear_autocast_cache

from rst_fused._step.base import StepOptimizer


def drop_copies(opt: StepOptimizer) -> None:
    """Before the next forward pass: what autocast made of the weights, and what FSDP2 gathered of them and kept.

    autocast keeps its copies until its outermost context is left, and both passes may be in one; FSDP2 keeps what it
    gathered, to use it again, after set_reshard_after_backward(False).
    """
    clear_autocast_cache()
    for reference in opt._sharding.fsdp_modules:
        module = reference()
        if module is not None:
            module.reshard()  # which does nothing where nothing is gathered
