"""SAM as a torch optimizer, with the two steps that users of other SAM packages know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from rst_fused._checks import required_params
from rst_fused.optimizer import RST


class SAM(RST):
    """Sharpness-Aware Minimization (Foret et al. 2021): RST with p = 1, a SAM step every step.

    Takes the arguments of RST except schedule and gamma, and offers first_step / second_step beside step(closure) and
    perturb / step. ``base`` may also be an optimizer class, whose arguments are then the keyword arguments.
    """

    def __init__(self, params: Iterable[Any] | None = None, base: Any = "sgd", **kwargs: Any) -> None:
        if isinstance(base, type) and issubclass(base, Optimizer):
            own = ("rho", "adaptive", "eta", "seed", "backend", "model", "stochastic_rounding")
            chosen = {name: kwargs.pop(name) for name in own if name in kwargs}
            base, params, kwargs = base(required_params(params), **kwargs), None, chosen
        super().__init__(params, base, schedule=1.0, **kwargs)

    def first_step(self, zero_grad: bool = False) -> None:
        """Moves the weights to w + e; gradients are consumed. ``zero_grad`` is accepted for compatibility."""
        self.perturb()
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and applies the base optimizer with the gradients of the second pass."""
        if not self._run.perturbed:
            raise RuntimeError("second_step before first_step: call first_step after the first backward")
        self.step()
        if zero_grad:
            self.zero_grad()
