"""Executor 1 of a step: a launch plan, which is a cache of everything that the kernels need to know of the tensors.

A plan (csrc/plan/plan.h) holds the chunk table of all parameters. Each call compares every tensor that a kernel is
going to read or write with that table: address, sizes, strides, dtype, device. What does not fit any more is "not
served", which leaves everything as it was; then a new plan is made, or the step goes through rst_fused._step.dispatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from rst_fused._backends import plan_extension
from rst_fused._step import validation
from rst_fused._step.amp import NONE, Scaling
from rst_fused._step.base import StepOptimizer
from rst_fused._step.columns import (
    Columns,
    backup_of,
    gather,
    has_all_state,
    has_master,
    hyperparam_rows,
    master_kinds,
    partition,
    rho_rows,
)
from rst_fused._step.rules import Flags

_FLOATS = {float}
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
_CAN_PLAN = plan_extension() is not None and plan_extension().can_plan()
_NO_ADDRESSES = (0, 0)


@dataclass
class _HyperparamCache:
    """What was made of the hyperparameters, while none of them changes."""

    version: int = 0  # see Plan.poll; a plan counts from 1
    same_flags: bool = False  # those of the plan
    checked: bool = False  # the numbers that the base reads
    rho: list[float] | None = None
    rows: tuple[float, list[float]] | None = None  # of an update, one after another, and the gamma among them


class PlanCache:
    """The plan of one optimizer, or none yet."""

    def __init__(self) -> None:
        self._plan: Any = None
        # Of the optimizer when the plan was made:
        self._flags: list[Flags] | None = None
        self._state: Any = None
        self._state_size = 0
        self._saved: dict[Tensor, Tensor] = {}  # where the plan keeps weights; empty: it was made without backups
        self._after_perturb: dict[str, Any] = {}  # the fields of StepState that it changes
        self._updates = False  # whether it knows the state that an update needs
        self._stats_address = 0
        self._columns = Columns()
        self._cached = _HyperparamCache()

    # --- the three phases: whether they were served ----------------------------------------------------------------
    def perturb(self, opt: StepOptimizer) -> bool:
        """Norm and perturbation."""
        if not self._saved or not self._is_current(opt):
            return False
        cached, state = self._cached, opt._step_state
        if cached.rho is None:
            validation.check_rho(opt)
            self._check(opt)
            cached.rho = _floats([row[0] for row in rho_rows(self._columns)])
            if cached.rho is None:
                return False
        served: bool = self._plan.perturb(
            self._stats_address, cached.rho, opt.adaptive, opt.eta, opt.stochastic_rounding, opt.seed, state.steps,
            state.mixing, self._after_perturb,
        )  # fmt: skip
        return served

    def update(self, opt: StepOptimizer, scaling: Scaling, after: dict[str, Any]) -> bool:
        """Restore, mixing and base step; the step state becomes ``after`` in the same call."""
        state = opt._step_state
        restores = bool(state.saved)
        if not self._updates or (restores and state.saved is not self._saved) or not self._is_current(opt):
            return False
        scale, addresses = 1.0, _NO_ADDRESSES
        if scaling is not NONE:
            if not scaling.is_readable_by(opt._devices[0].device, counts_steps=bool(self._columns.steps)):
                return False
            scale, addresses = scaling.scale(), scaling.addresses()
        mixing, cached = state.mixing, self._cached
        gamma = state.gamma if mixing else 1.0
        if cached.rows is None or cached.rows[0] != gamma:
            self._check(opt)
            found = _floats([x for row in hyperparam_rows(opt, self._columns) for x in row])
            if found is None:
                return False
            cached.rows = gamma, found
        served: bool = self._plan.update(cached.rows[1], restores, mixing, scale, addresses, after)
        return served

    def restore(self, opt: StepOptimizer, after: dict[str, Any]) -> bool:
        """Undoes a perturbation; the step state becomes ``after`` in the same call."""
        if not self._saved or opt._step_state.saved is not self._saved:
            return False
        served: bool = self._plan.restore(after)
        return served

    # --- the cache --------------------------------------------------------------------------------------------------
    def _is_current(self, opt: StepOptimizer) -> bool:
        """Whether the optimizer is the one that the plan was made for. The plan itself compares the tensors."""
        if self._plan is None:
            return False
        seen = self._plan.poll(opt.param_groups)
        if self._cached.version != seen >> 1:
            self._cached = _HyperparamCache(seen >> 1, self._flags == _flags_of(opt))
        return bool(
            seen & 1
            and self._cached.same_flags
            and self._state is opt.state
            and self._state_size == len(opt.state)
            and _len_torch_dispatch_stack() == 0
        )

    def _check(self, opt: StepOptimizer) -> None:
        if not self._cached.checked:
            validation.check_hyperparams(opt)
            self._cached.checked = True

    def drop(self) -> None:
        self._plan, self._saved, self._updates = None, {}, False

    def renew(self, opt: StepOptimizer, for_update: bool) -> bool:
        """Makes a new plan, if one can serve the present tensors, all of which were validated. ``for_update``: then it
        creates state that does not exist yet."""
        perturbed_here = bool(self._saved) and opt._step_state.saved is self._saved
        self.drop()
        self._cached = _HyperparamCache()
        if opt._step_state.saved and not perturbed_here:
            return False  # the weights are kept by the ops, whose step this is
        return _serves(opt) and self._build(opt, for_update)

    def _build(self, opt: StepOptimizer, for_update: bool) -> bool:
        state, rule = opt._step_state, opt.rule
        everything = list(range(len(opt.param_groups)))
        params = [p for group in opt.param_groups for p in group["params"]]
        updating = for_update or has_all_state(opt)
        columns = Columns()
        for kind in master_kinds(opt):
            columns.extend(gather(opt, everything, updating, kind, opt._devices[0]))
        if not columns.params or not all(_counted_in_place(step) for step in columns.steps):
            return False
        masters = [opt.state[p]["master"] if has_master(opt, p) else None for p in columns.params]
        backed = not for_update or bool(state.backups) or all(has_master(opt, p) for p in columns.params)
        backups = [backup_of(opt, p) if backed and not has_master(opt, p) else None for p in columns.params]
        kept = [m if b is None else b for m, b in zip(masters, backups, strict=True)]
        saved = {p: w for p, w in zip(columns.params, kept, strict=True) if w is not None}
        companions = [*masters, *backups, *columns.steps, *(t for column in columns.states for t in column)]
        if not all(t is None or type(t) in _PLAIN_TENSORS for t in companions):
            return False
        if state.saved and {p: id(w) for p, w in saved.items()} != {p: id(w) for p, w in state.saved.items()}:
            return False  # some parameters have only one of both gradients
        flags = _flags_of(opt)  # which agree among the groups
        plan = plan_extension().Plan(
            gpu=opt.backend.plans == "gpu", groups=opt.param_groups, everything=params, active=columns.params,
            idle=[p for p in params if p.grad is None], sizes=columns.sizes, masters=masters, states=columns.states,
            backups=backups, steps=columns.steps, row_groups=[id(group) for group, _ in columns.rows],
            rule=0 if rule is None else rule.index, option=flags[0].option if flags else False,
            maximize=flags[0].maximize if flags else False,
            state={} if rule is None else opt.state,  # that of an optimizer instance is its own affair
            step_state=state,
        )  # fmt: skip
        columns.grads, columns.backups = [], []  # a kept gradient would be memory that zero_grad cannot free
        if state.saved:  # between the passes: the new plan takes over where the one before it stopped
            state.take_first_grads()
            if state.mixing:
                state.first_grads = plan.first_grads_of(state.first_grads)
            state.saved = saved
        self._columns, self._flags = columns, flags
        self._state, self._state_size = opt.state, len(opt.state)
        self._stats_address = opt._devices[0].stats.data_ptr()
        self._updates = updating and rule is not None
        self._saved = saved if backed else {}
        self._after_perturb = {"saved": self._saved}
        self._plan = plan  # last: an interrupt before leaves no plan, rather than one beside notes of another
        return True


def _flags_of(opt: StepOptimizer) -> list[Flags] | None:
    rule = opt.rule
    return None if rule is None else [rule.flags(group) for group in opt.param_groups]


def _serves(opt: StepOptimizer) -> bool:
    """Whether plans serve this optimizer at all. What they do not: several devices, groups with different flags, step
    counts on a GPU (a plan would wait for them), conjugate views as gradients of complex parameters."""
    return (
        len(opt._devices) == 1
        and opt._devices[0].backend.plans != ""
        and _CAN_PLAN
        and _len_torch_dispatch_stack() == 0
        and len(partition(opt)) == 1
        and all(
            type(p) in _PLAIN_TENSORS and not p.is_complex() for group in opt.param_groups for p in group["params"]
        )
        and not any(group.get("capturable") for group in opt.param_groups)
        and not (opt.rule is not None and any(opt.rule.splits_first_step(group) for group in opt.param_groups))
    )


def _counted_in_place(step: Tensor) -> bool:
    """Whether a plan can count in this tensor."""
    return type(step) is Tensor and step.is_cpu and step.dtype == torch.float32


def _floats(given: list[Any]) -> list[float] | None:
    """As floats; None if reading one would wait for the GPU."""
    if set(map(type, given)) == _FLOATS:
        return given
    for x in given:
        if isinstance(x, Tensor) and not x.is_cpu:
            return None
    return [float(x) for x in given]
