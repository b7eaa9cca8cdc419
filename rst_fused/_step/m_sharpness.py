"""m-sharpness (Foret et al. 2021, section 4.1): every rank perturbs by the gradient of its own part of the batch.

The first backward of a SAM step then needs no all-reduce, and runs in no_sync() of DistributedDataParallel. That of a
base step is its only one, and needs it: so the draw comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_FORM = "with opt.first_pass(model): loss.backward(), or in the form step(closure) with model= in the constructor"


def check_gamma(name: str, gamma: Any) -> None:
    """Raises ValueError for a gamma that mixes: the first gradients differ among ranks, and so would the updates."""
    if callable(gamma) or (not isinstance(gamma, str) and float(gamma) == 1.0):
        return  # what a function returns is checked at every step
    raise ValueError(
        f"{name}={gamma!r} with m_sharpness=True: expected gamma=1, for an update that takes in the first gradients of "
        "each rank would move the replicas apart; take m_sharpness=False to mix"
    )


def check_params(opt: Any) -> None:
    """Raises ValueError for sharded parameters, whose gradients exist only reduced."""
    if opt._sharding.dtensors:
        raise ValueError(
            "m_sharpness=True with parameters that are DTensors: a rank has no gradient of its own for the shards of "
            "others; expected the plain parameters of a model in DistributedDataParallel, or m_sharpness=False"
        )


def _ddp_of(model: Any) -> Any:
    """``model`` as DistributedDataParallel, also if it is compiled; raises TypeError for another one."""
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, torch.nn.parallel.DistributedDataParallel):
        return inner
    given = "none was given" if model is None else f"given a {type(inner).__name__}"
    raise TypeError(
        f"m_sharpness=True needs the model as DistributedDataParallel, {given}: pass it to first_pass(model), or as "
        "model= to the constructor"
    )


def _check_graph(model: Any) -> None:
    """Raises RuntimeError where torch would fail in no_sync(), and leave the wrapper unusable."""
    if model.static_graph and not getattr(model, "_static_graph_delay_allreduce_enqueued", True):
        raise RuntimeError(
            "m_sharpness=True and DistributedDataParallel(static_graph=True), whose first backward has to run with its "
            "all-reduce: make the first step a base step, as schedule=rst_fused.schedule.warmup(schedule, 1) does, or "
            "pass static_graph=False"
        )


@contextmanager
def first_pass(opt: Any, model: Any, zeroes_inside: bool = False) -> Iterator[None]:
    """Draws, and runs the body of a SAM step without all-reduce. Raises before the body runs if that cannot be right.

    zeroes_inside: the body zeroes the gradients itself.
    """
    opt._refuse_while_perturbed("first_pass")
    state = opt._step_state
    state.local_grads = False
    fires = opt.draw()
    if not opt.m_sharpness:
        yield
        return
    check_params(opt)
    inner = _ddp_of(model)
    if not fires:
        yield
        return
    _check_graph(inner)
    if not zeroes_inside and any(p.grad is not None for group in opt.param_groups for p in group["params"]):
        raise RuntimeError(
            "first_pass() with gradients that are there already: call opt.zero_grad() before it, and let all backwards "
            "of this pass run within it, those of micro-batches too"
        )
    with inner.no_sync():
        state.local_grads = True
        try:
            yield
        except BaseException:
            state.local_grads = False
            raise


def within_closure(opt: Any) -> AbstractContextManager[None]:
    """Around the first call of a closure, which zeroes the gradients itself."""
    return first_pass(opt, opt._model, zeroes_inside=True) if opt.m_sharpness else nullcontext()


def check_perturb(opt: Any, fire: bool) -> None:
    """Raises RuntimeError unless the gradients are those that the step needs."""
    if fire and not opt._step_state.local_grads:
        raise RuntimeError(
            "perturb() with m_sharpness=True, but the first backward ran with its all-reduce, so that all ranks would "
            f"perturb alike: run it as {_FORM}"
        )
    if not fire and opt._step_state.local_grads:
        refuse_update()


def refuse_update() -> None:
    raise RuntimeError(
        "the gradients are those of this rank alone, since they were made in first_pass() of a SAM step: an update "
        "would move the replicas apart; call perturb() after first_pass() and leave the decision to its draw, or "
        "zero_grad() and run the backward again"
    )
