"""Executor 1 of a step: a launch plan, which is a cache of everything that the kernels need to know of the tensors.

A plan (csrc/plan/plan.h; for Triton rst_fused.kernels.plan) holds the table of all parameters. Each call compares
every tensor that a kernel is going to read or write with that table: address, sizes, strides, dtype, device. What does
not fit any more is "not served", which leaves everything as it was; then a new plan is made, or the step goes through
rst_fused._step.dispatch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from rst_fused._backends import can_plan, new_plan
from rst_fused._checks import PLAIN
from rst_fused._step import columns, gradient_memory, norm, validation
from rst_fused._step.amp import NONE, UNSCALED, Scaling
from rst_fused._step.base import StepOptimizer
from rst_fused._step.rules import Flags
from rst_fused._step.sharding import local, locals_of
from rst_fused._step.shards import Shards
from rst_fused._step.state_dtypes import has_master, kept_by_master, master_name

_FLOATS = {float}
LOOK_AGAIN = 1000  # steps after which a plan with backups gives way, for gradients that could keep weights by now


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
        self._saved: Mapping[Tensor, Tensor] | None = None  # where the plan keeps weights; None: made without backups
        self._look_again_at: float = math.inf
        self._swapped: list[Tensor] = []  # of the parameters, those whose weights go where their gradient was
        self._unseen: list[Tensor] = []  # of these, those of whose gradients the plan cannot see who else has them
        self._after_perturb: dict[str, Any] = {}  # the fields of StepState that it changes
        self._updates = False  # whether it knows the state that an update needs
        self.measured = False  # see perturb
        self._as_tensors = False  # what a plan in C++ is given the address of
        self._stats: Any = 0
        self._columns = columns.Columns()
        self._shards: Shards | None = None  # where parameters are DTensors
        self._cached = _HyperparamCache()

    # --- the three phases: whether they were served ----------------------------------------------------------------
    def perturb(self, opt: StepOptimizer) -> bool:
        """Norm and perturbation. Where only the norm was served, ``measured`` is set: the other ranks have added to it,
        and will not do so again."""
        self.measured = False
        if self._saved is None or not self._is_current(opt):
            return False
        state = opt._step_state
        if state.steps >= self._look_again_at or (self._swapped and state.mixing):
            return False
        if self._unseen and len(gradient_memory.serving(self._unseen)) < len(self._unseen):
            return False
        if self._shards is None:
            return self._perturb(opt)
        with self._shards.lent() as lent:
            try:
                served = lent and self._perturb(opt)
            except BaseException:
                if self._swapped:  # nobody may find weights in p.grad
                    self._shards.drop_grads()
                raise
            if served:
                self._shards.drop_grads()
            return served

    def _perturb(self, opt: StepOptimizer) -> bool:
        cached, state = self._cached, opt._step_state
        if cached.rho is None:
            validation.check_rho(opt)
            self._check_numbers(opt)
            cached.rho = _floats([row[0] for row in columns.rho_rows(self._columns)])
            if cached.rho is None:
                return False
        measured = opt._sharding.adds_up
        if measured and not self._grad_norm(opt, opt._devices[0].stats, opt.adaptive):
            return False
        served = self._plan.perturb(
            self._stats, cached.rho, opt.adaptive, opt.eta, opt.stochastic_rounding, opt.seed, state.steps,
            state.mixing, measured, self._after_perturb,
        )  # fmt: skip
        self.measured = measured and not served  # a perturbation looks at more than a norm
        return served

    def grad_norm(self, opt: StepOptimizer) -> bool:
        """||g|| of the gradients in p.grad, in the first device's update_stats."""
        if self._plan is None or not self._is_current(opt):
            return False
        if self._shards is None:
            return self._grad_norm(opt, opt._devices[0].update_stats, False)
        with self._shards.lent() as lent:
            return lent and self._grad_norm(opt, opt._devices[0].update_stats, False)

    def _grad_norm(self, opt: StepOptimizer, stats: Tensor, adaptive: bool) -> bool:
        """The norm over all parts, with the other ranks, where there is something to add up."""
        finishes = opt._sharding.adds_up
        rows = list(opt._devices[0].part_stats) if finishes else [stats]
        into = rows if self._as_tensors else [row.data_ptr() for row in rows]
        if not all([self._plan.grad_norm(row, part, adaptive, opt.eta) for part, row in enumerate(into)]):
            return False
        if finishes:
            norm.finish(opt, stats)
        return True

    def update(self, opt: StepOptimizer, scaling: Scaling, after: dict[str, Any]) -> bool:
        """Restore, mixing and base step; the step state becomes ``after`` in the same call."""
        state = opt._step_state
        restores = state.saved is self._saved
        if not self._updates or (not restores and state.saved) or not self._is_current(opt):
            return False
        numbers: tuple[float, Any, Any] | None = UNSCALED
        if scaling is not NONE:  # that of every step without AMP
            numbers = scaling.for_plan(opt._devices[0].device, bool(self._columns.steps), self._as_tensors)
        if numbers is None:
            return False
        mixing, cached = state.mixing, self._cached
        gamma = state.gamma if mixing else 1.0
        if cached.rows is None or cached.rows[0] != gamma:
            self._check_numbers(opt)
            found = _floats([x for row in columns.hyperparam_rows(opt, self._columns) for x in row])
            if found is None:
                return False
            cached.rows = gamma, found
        arguments = (cached.rows[1], restores, mixing, *numbers, opt.seed, state.steps, after)
        if self._shards is None:
            return self._plan.update(*arguments)
        with self._shards.lent() as lent:
            return lent and self._plan.update(*arguments)

    def restore(self, opt: StepOptimizer, after: dict[str, Any]) -> bool:
        """Undoes a perturbation; the step state becomes ``after`` in the same call."""
        if self._plan is None or opt._step_state.saved is not self._saved:
            return False
        if self._shards is not None and not self._shards.are_current():
            return False
        return self._plan.restore(after)

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

    def _check_numbers(self, opt: StepOptimizer) -> None:
        if not self._cached.checked:
            validation.check_hyperparams(opt)
            self._cached.checked = True

    def take_back(self) -> None:
        """After an interrupt: local tensors keep no gradient that they were lent."""
        if self._shards is not None:
            self._shards.take_back()

    def drop(self) -> None:
        self._plan, self._updates, self._shards = None, False, None
        self._saved, self._swapped, self._unseen = None, [], []

    def renew(self, opt: StepOptimizer, for_update: bool) -> bool:
        """Makes a new plan, if one can serve the present tensors, all of which were validated. ``for_update``: then it
        creates state that does not exist yet."""
        perturbed_here = opt._step_state.saved is self._saved
        self.drop()
        self._cached = _HyperparamCache()
        if opt._step_state.saved and not perturbed_here:
            return False  # the weights are kept by the ops, whose step this is
        return _serves(opt) and self._build(opt, for_update)

    def _build(self, opt: StepOptimizer, for_update: bool) -> bool:
        state, rule = opt._step_state, opt.rule
        params = [p for group in opt.param_groups for p in group["params"]]
        updating = for_update or columns.has_all_state(opt)
        c = columns.Columns()
        for kind in columns.master_kinds(opt):
            c.extend(columns.gather(opt, range(len(opt.param_groups)), updating, kind, opt._devices[0]))
        counters = [(type(s), s.device.type, s.dtype, s.numel()) for s in c.steps]
        if not c.params or set(counters) - {(Tensor, "cpu", torch.float32, 1)}:
            return False  # a plan counts in place
        masters = [opt.state[p][master_name(opt)] if has_master(opt, p) else None for p in c.params]
        before = state.saved_now()
        swaps = gradient_memory.swaps_of(opt, c.params, before, for_update)
        copied = [kept_by_master(opt, p) for p in c.params]
        needing = [not copy and not swap for copy, swap in zip(copied, swaps, strict=True)]  # a backup
        backed = not for_update or bool(state.backups) or not any(needing)
        needing = [backed and need for need in needing]
        backups = [columns.backup_of(opt, p) if need else None for p, need in zip(c.params, needing, strict=True)]
        kept = [m if copy else b for m, b, copy in zip(masters, backups, copied, strict=True)]
        fixed = {p: w for p, w in zip(c.params, kept, strict=True) if w is not None}
        companions = [t for t in (*masters, *backups, *c.steps, *(t for s in c.states for t in s)) if t is not None]
        if not all(type(t) in PLAIN for t in locals_of(companions)):
            return False
        swapped = [p for p, swap in zip(c.params, swaps, strict=True) if swap]
        known = {**fixed, **{p: before.get(p) for p in swapped}}
        same = {p: id(w) for p, w in known.items()} == {p: id(w) for p, w in before.items()}
        if before and not (same and len(known) == len(c.params)):
            return False  # some parameters have only one of both gradients
        if state.mixing and len(fixed) < len(c.params):
            return False  # some have no first one
        flags = _flags_of(opt)  # which agree among the groups
        shards = Shards(c.params, companions, opt._sharding.dtensors) if opt._sharding.dtensors else None
        self._shards = shards  # before it lends anything
        make = partial(
            new_plan, opt.backend.plans, groups=list(opt.param_groups), everything=params, active=locals_of(c.params),
            idle=[p for p in params if p.grad is None], sizes=c.sizes,
            masters=[m if m is None else local(m) for m in masters], states=[locals_of(s) for s in c.states],
            backups=backups, steps=c.steps, row_groups=[id(group) for group, _ in c.rows],
            rule=0 if rule is None else rule.index, option=flags[0].option if flags else False,
            maximize=flags[0].maximize if flags else False,
            state={} if rule is None else opt.state,  # that of an optimizer instance is its own affair
            step_state=state, parts=c.parts, indices=c.indices,
            shards=columns.shards_of(opt, c.params, bool(c.indices)),
            swapped=[i for i, swap in enumerate(swaps) if swap], lent=shards is not None,
        )  # fmt: skip
        # Not in one block: Dynamo, which may come by, cannot leave a graph within one of nullcontext.
        if shards is None:
            plan = make()
        else:
            with shards.lent() as lent:
                plan = make() if lent else None
        if plan is None:
            return False
        c.grads.clear()  # a kept gradient would be memory that zero_grad cannot free
        c.backups.clear()
        saved = gradient_memory.SavedByPlan(c.params, fixed, swapped, plan.kept) if swapped else fixed
        if before:  # between the passes: the new plan takes over where the one before it stopped
            state.take_first_grads()
            if swapped:
                plan.keep([before[p] for p in swapped])
            state.saved = saved  # before the first gradients, which go by its order
            if state.mixing:
                state.first_grads = plan.first_grads_of({local(p): local(g) for p, g in state.first_grads.items()})
        self._columns, self._flags = c, flags
        self._state, self._state_size = opt.state, len(opt.state)
        stats = opt._devices[0].stats
        self._as_tensors = opt.backend.plans == "triton"
        self._stats = stats if self._as_tensors else stats.data_ptr()
        self._updates = updating and rule is not None
        self._saved = saved if backed else None
        self._swapped, self._unseen = swapped, [] if plan.sees_references else swapped
        spares = any(needing) and gradient_memory.never_mixes(opt)
        self._look_again_at = state.steps + LOOK_AGAIN if spares else math.inf
        self._after_perturb = {"saved": saved}
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
        and can_plan(opt.backend.plans)
        and _len_torch_dispatch_stack() == 0
        and len(columns.partition(opt)) == 1
        and all(type(local(p)) in PLAIN and not p.is_complex() for group in opt.param_groups for p in group["params"])
        and not any(group.get("capturable") for group in opt.param_groups)
        and not (opt.rule is not None and any(opt.rule.splits_first_step(group) for group in opt.param_groups))
    )


def _floats(given: list[Any]) -> list[float] | None:
    """As floats; None if reading one would wait for the GPU."""
    if set(map(type, given)) == _FLOATS:
        return given
    if any(isinstance(x, Tensor) and not x.is_cpu for x in given):
        return None
    return [float(x) for x in given]
