"""An optimizer as its steps see it, and when a step is a SAM step: schedule, draws, gamma, counts of both kinds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.optim import Optimizer

from rst_fused._backends import Backend
from rst_fused._checks import check_number
from rst_fused._draws import draw_at
from rst_fused._step import agreement, join, m_sharpness, placeholders
from rst_fused._step.devices import DeviceState
from rst_fused._step.rules import Group, Rule
from rst_fused._step.sharding import Sharding
from rst_fused._step.state import StepState
from rst_fused.schedule import Schedule, as_schedule, constant, match


class StepOptimizer(Optimizer):
    """An optimizer that draws X_t ~ Bernoulli(p(t)) (Zhao, Zhang, Hu 2022, arXiv 2203.09962, section 3)."""

    base: Optimizer | None  # the optimizer instance given as base, or
    rule: Rule | None  # the rule of the fused one
    adaptive: bool
    eta: float
    seed: int
    master_weights: bool | str
    stochastic_rounding: bool
    state_dtype: torch.dtype | None = None
    _model: torch.nn.Module | None
    _process_group: Any = "auto"
    m_sharpness: bool = False
    release_gradients: bool = False
    _releases: Any  # rst_fused._step.release.Releases
    _plans: Any  # rst_fused._step.plan.PlanCache
    _devices: list[DeviceState]
    _sharding: Sharding
    _on_gpu: bool  # whether any of them is one: asked at every step
    _step_state: StepState
    _schedule: Schedule
    _gamma: float | Callable[[int], float]
    _gamma_follows_schedule: bool  # it was given as "match"
    _constants: tuple[float, float] | None = None  # p and gamma, where neither depends on the step
    _max_grad_norm: float | None
    _warned_of_silent_step = False
    _closure_covers_window = False  # see rst_fused._step.earlier_gradients

    def _init_group(self, group: Group, *args: Any) -> None:
        """Dynamo looks for this name; see rst_fused._step.columns.init_group."""
        raise NotImplementedError

    def _adopt(self) -> None:
        """Follows the base optimizer, whose groups and state are replaced when it loads a state_dict."""
        raise NotImplementedError

    @property
    def backend(self) -> Backend:
        """What serves the parameters; where they are on several devices, those on the device of the first one."""
        return self._devices[0].backend

    @property
    def last_update_norm(self) -> float:
        """The norm of the last gradient that was applied, before max_grad_norm clipped it; NaN without that. Waits for
        the device."""
        return float(self._devices[0].update_stats[0])

    @property
    def non_finite_norms(self) -> int:
        """SAM steps so far whose gradient norm was not finite, so that nothing was perturbed. Waits for the device."""
        return int(self._devices[0].stats[3])

    @property
    def schedule(self) -> Schedule:
        """p(t). Set it for another one, as the argument of the constructor: it holds from the step under way on, and
        gamma="match" follows it."""
        return self._schedule

    @schedule.setter
    def schedule(self, given: float | Callable[[int], float]) -> None:
        self._schedule = as_schedule(given)
        if self._gamma_follows_schedule:
            self._gamma = match(self._schedule)
        self._note_constants()
        self._draw_again()

    @property
    def gamma(self) -> float | Callable[[int], float]:
        """A number or a function of the step. Set it for another one, or for "match", from the step under way on."""
        return self._gamma

    @gamma.setter
    def gamma(self, given: float | Callable[[int], float] | str) -> None:
        if self.m_sharpness:
            m_sharpness.check_gamma("gamma", given)
        if isinstance(given, str):
            if given != "match":
                raise ValueError(f"gamma={given!r}: expected a number, a callable step -> gamma, or 'match'")
            self._gamma = match(self._schedule)
        else:
            if not callable(given):
                check_number("gamma", given, 0)
            self._gamma = given
        self._gamma_follows_schedule = isinstance(given, str)
        self._note_constants()
        self._draw_again()

    @property
    def max_grad_norm(self) -> float | None:
        """The norm to which the gradient of an update is clipped; None: it is not."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, given: float | None) -> None:
        if given is not None:
            check_number("max_grad_norm", given, 0)
            if self.release_gradients:
                raise ValueError(
                    f"max_grad_norm={given!r} with release_gradients=True: the norm that is clipped takes all "
                    "gradients at once; expected None, or release_gradients=False"
                )
        self._max_grad_norm = None if given is None else float(given)

    @property
    def process_group(self) -> Any:
        """The ranks that take the same steps: "auto", a ProcessGroup or None. Another one counts from the next draw on,
        at which they are compared."""
        return self._process_group

    @process_group.setter
    def process_group(self, given: Any) -> None:
        self._process_group = agreement.check_group(given)
        self._step_state.agreement, self._step_state.check_at = None, 0

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured, to which calls only add kernels. What every step runs asks _on_gpu
        first, which spares a call."""
        return self._on_gpu and torch.cuda.is_current_stream_capturing()

    def _find_sharding(self) -> None:
        """Looks at the parameters again, which a wrapper may have replaced in the groups."""
        params = [p for group in self.param_groups for p in group["params"]]
        if not self._sharding.is_current(params):
            self._sharding = Sharding(params)
            for device in self._devices:
                device.make_part_stats(self._sharding.part_count)

    def _note_constants(self) -> None:
        """For _draw: to ask for p(t) and gamma(t) takes ten calls, which is most of its time."""
        p, gamma = self._schedule, getattr(self, "_gamma", None)
        if type(p) is constant and isinstance(gamma, (int, float)) and not callable(gamma):
            self._constants = p.p, float(gamma)
        else:
            self._constants = None

    def _draw_again(self) -> None:
        """After a draw and before the perturbation, what was set since counts."""
        state = self._step_state
        if state.drawn_at == state.steps and not (state.finished or state.perturbed):
            state.drawn_at = -1
            self._draw()

    def _numbers(self, t: int) -> tuple[float, float]:
        """p(t) and gamma(t)."""
        gamma = self.gamma
        if callable(gamma):
            gamma = gamma(t)
            check_number(f"gamma({t})", gamma, 0)
            if self.m_sharpness:
                m_sharpness.check_gamma(f"gamma({t})", gamma)
        return self.schedule(t), float(gamma)

    def _draw(self) -> bool:
        state = self._step_state
        state.count()
        t = state.steps
        if state.drawn_at != t:
            if state.placeholders:
                placeholders.discard(self)
            p, gamma = self._constants or self._numbers(t)
            if t >= state.check_at:
                agreement.check(self, t, p, gamma)
            state.drawn = draw_at(self.seed, t, p)
            state.gamma = gamma
            state.mixes = state.gamma != 1.0
            state.drawn_at = -1 if self._on_gpu and self.capturing else t
        return state.drawn

    def first_pass(self, model: torch.nn.Module | None = None) -> AbstractContextManager[None]:
        """Around the first forward and backward, where m_sharpness=True: those of a SAM step run without the all-reduce
        of DistributedDataParallel, in its no_sync(). Draws first. With m_sharpness=False it does nothing else.

        model: the DistributedDataParallel; without one, that given to the constructor. Zero gradients before it.
        """
        return m_sharpness.first_pass(self, self._model if model is None else model)

    # --- uneven data: see rst_fused._step.join ---------------------------------------------------------------------
    def join_hook(self, **kwargs: Any) -> join.Hook:
        """For torch.distributed.algorithms.Join([model, optimizer]): afterwards all ranks stand at the same step."""
        return join.Hook(self)

    @property
    def join_device(self) -> torch.device:
        return self._devices[0].device

    @property
    def join_process_group(self) -> Any:
        return join.group_of(self)

    def _compare_without_data(self) -> None:
        """Takes part in the comparison of the ranks, in the place of a draw."""
        self._step_state.count()
        t = self._step_state.steps
        agreement.check(self, t, *self._numbers(t), has_data=False)

    # --- what it cost -----------------------------------------------------------------------------------------------
    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return self._step_state.steps + self._step_state.finished

    @property
    def sam_steps(self) -> int:
        """Those of them that were SAM steps."""
        return self._step_state.sam_steps + (self._step_state.finished and self._step_state.was_sam)

    @property
    def cost(self) -> float:
        """Mean forward-backward pairs per step so far: 1 + sam_steps / steps."""
        return 1.0 + (self.sam_steps / self.steps if self.steps else 0.0)

    def __repr__(self) -> str:
        """Without the places that the groups hold for the counters of a state_dict."""
        return "\n".join(line for line in super().__repr__().split("\n") if not line.lstrip().startswith("rst_"))
