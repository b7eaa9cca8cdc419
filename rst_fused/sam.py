"""SAM as a torch optimizer, with the names that users of other SAM packages know."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from rst_fused._checks import required_params
from rst_fused._step.rules import RULES
from rst_fused.optimizer import RST

_FUSED = {getattr(torch.optim, rule.twin): rule for rule in RULES.values() if rule.twin is not None}
_OWN = (  # of RST, not of the base
    "eta", "seed", "backend", "model", "master_weights", "stochastic_rounding", "process_group", "m_sharpness",
    "state_dtype", "release_gradients",
)  # fmt: skip


class SAM(RST):
    """Sharpness-Aware Minimization (Foret et al. 2021): RST with p = 1, a SAM step every step.

    Takes the arguments of RST except schedule and gamma, and offers first_step / second_step beside step(closure) and
    perturb / step. ``base`` (or ``base_optimizer``) may also be an optimizer class, whose arguments are then keyword
    arguments: torch.optim.SGD, Adam and AdamW become the fused "sgd", "adam" and "adamw" unless an option is asked for
    that those lack (foreach, fused, ...); repr() shows which. The closure of step(closure) runs twice and does
    the first forward and backward too: no loss.backward() before it.
    """

    def __init__(
        self,
        params: Iterable[Any] | None = None,
        base: Any = "sgd",
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        base_optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        for name in ("schedule", "gamma"):
            if name in kwargs:
                raise TypeError(f"SAM takes no {name}, given {kwargs[name]!r}: every step is a SAM step; use RST")
        if base_optimizer is not None:
            if base != "sgd":
                raise TypeError(f"base={base!r} and base_optimizer={base_optimizer!r}: expected one of them")
            base = base_optimizer
        if isinstance(base, type) and issubclass(base, Optimizer):
            base, params, kwargs = _from_class(base, required_params(params), kwargs)
        super().__init__(params, base, rho=rho, adaptive=adaptive, schedule=1.0, **kwargs)

    @property
    def base_optimizer(self) -> Optimizer:
        """What applies the update: the optimizer instance given as base, or this optimizer, which is its own."""
        return self if self.base is None else self.base

    def first_step(self, zero_grad: bool = False) -> None:
        """Moves the weights to w + e; gradients are consumed. ``zero_grad`` is accepted for compatibility."""
        self.perturb()
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and applies the base optimizer with the gradients of the second pass."""
        if not self._step_state.perturbed:
            raise RuntimeError("second_step before first_step: call first_step after the first backward")
        self.step()
        if zero_grad:
            self.zero_grad()


def _from_class(
    kind: type[Optimizer], params: Iterable[Any], kwargs: dict[str, Any]
) -> tuple[Any, Iterable[Any] | None, dict[str, Any]]:
    """(base, params, keyword arguments) of RST for an optimizer class and the arguments of both."""
    own = {name: kwargs.pop(name) for name in _OWN if name in kwargs}
    params = [params] if isinstance(params, torch.Tensor) else list(params)
    if kind in _FUSED:
        taken = _FUSED[kind].defaults
        lacking = inspect.signature(kind).parameters.keys() - taken.keys() - {"params"}
        asked = [kwargs, *(group for group in params if isinstance(group, dict))]
        if kwargs.keys() <= taken.keys() | lacking and not any(
            group.get(name) is not None and group[name] is not False for group in asked for name in lacking
        ):
            return _FUSED[kind].name, params, {**own, **{name: kwargs[name] for name in kwargs if name in taken}}
    return kind(params, **kwargs), None, own
