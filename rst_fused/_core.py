"""What the phases of a step know of the optimizer. rst_fused.optimizer builds on it, the phases take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rst_fused._backends import Backend
from rst_fused._places import Place
from rst_fused._rules import AdamRule, Group, SgdRule, as_gamma
from rst_fused._run import Run
from rst_fused.schedule import Schedule, as_schedule


class Core(Optimizer):
    """The fields that RST fills in."""

    base: Optimizer | None  # the optimizer instance given as base, or
    rule: SgdRule | AdamRule | None  # the fused one
    adaptive: bool
    eta: float
    seed: int
    master_weights: bool
    stochastic_rounding: bool
    _schedule: Schedule
    _gamma: float | Callable[[int], float]
    _matches: bool  # gamma was given as "match"
    _constructed: bool  # groups that come later are compared with those that are there
    _opt_called: bool  # torch's LR schedulers read it
    _rounds: bool  # whether any parameter is bfloat16 or float16
    _run: Run
    _places: list[Place]  # at least one; that of the first parameter leads
    _backups: dict[Tensor, Tensor]
    # What the engine has perturbed, and whether its master keeps the weights; a launch plan has notes of its own.
    _perturbed: dict[Tensor, bool]

    @property
    def backend(self) -> Backend:
        """What serves the parameters; where they are on several devices, those on the device of the first one."""
        return self._places[0].backend

    @property
    def schedule(self) -> Schedule:
        """p(t). Set it between steps for another one, as the argument of the constructor: gamma="match" follows it."""
        return self._schedule

    @schedule.setter
    def schedule(self, given: float | Callable[[int], float]) -> None:
        self._schedule = as_schedule(given)
        if self._matches:
            self.gamma = "match"

    @property
    def gamma(self) -> float | Callable[[int], float]:
        """A number or a function of the step. Set it between steps for another one, or for "match"."""
        return self._gamma

    @gamma.setter
    def gamma(self, given: float | Callable[[int], float] | str) -> None:
        self._gamma = as_gamma(given, self._schedule)
        self._matches = isinstance(given, str)

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return self._run.steps + self._run.finished

    @property
    def sam_steps(self) -> int:
        """Those of them that were SAM steps."""
        return self._run.sam_steps + (self._run.finished and self._run.was_sam)

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured, to which calls only add kernels."""
        places = self._places
        on_gpu = places[0].on_gpu or (len(places) > 1 and any(place.on_gpu for place in places))
        return on_gpu and torch.cuda.is_current_stream_capturing()

    @property
    def non_finite_norms(self) -> int:
        """SAM steps so far whose gradient norm was not finite, so that nothing was perturbed. Waits for the device."""
        return int(self._places[0].stats[3])

    def _init_group(self, group: Group, *args: Any) -> None:
        """Dynamo looks for this name; see rst_fused._engine.init_group."""
        raise NotImplementedError
