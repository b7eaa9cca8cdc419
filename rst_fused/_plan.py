"""The eager path of compiled kernels: one launch plan per optimizer, made once and checked at every step.

A plan (csrc/plan/plan.h) holds the chunk table of all parameters. At each call it looks at the gradient of every
parameter and compares addresses, shapes and dtypes with the table. Whatever does not fit (other gradients than last
time, storage that moved) makes a new plan; whatever a plan cannot express goes through rst_fused._engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from rst_fused import _amp, _engine
from rst_fused._backends import host
from rst_fused._core import Core
from rst_fused._preconditions import check_base, check_grads, check_rho
from rst_fused._schemas import NAMESPACE

Column = Sequence[Tensor | None]
_RULES = {"sgd": 0, "adam": 1, "adamw": 1}  # in the order of csrc/math/rules/all.h
_UNSCALED: tuple[float, Column] = (1.0, (None, None))
_FLOATS = {float}
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
_CAN_PLAN = host() is not None and host().can_plan()


@dataclass
class _Made:
    """What was made of the hyperparameters while none of them changed."""

    version: int = 0  # see Plan.poll; a plan counts from 1
    same_flags: bool = False  # those of the plan
    rho: list[float] | None = None
    rows: tuple[float, list[list[float]]] | None = None  # with the gamma among them


class Plans:
    """The plan of one optimizer, or none yet."""

    def __init__(self) -> None:
        self._plan: Any = None
        # Of the optimizer when the plan was made:
        self._with_backups = False
        self._flags: Any = None
        self._state: Any = None
        self._state_size = 0
        self._stats_address = 0
        self._lists = _engine.Lists()
        self._made = _Made()

    def perturb(self, opt: Core) -> bool:
        """Norm and perturbation; False if the plan path does not serve this case, with nothing done."""
        fits, _ = self._look(opt)
        done = self._perturb(opt) if fits and self._with_backups else False
        if done is False and self._serves(opt):
            done = self._renewed(opt, with_backups=True) and self._perturb(opt)
        return bool(done)

    def update(self, opt: Core) -> bool:
        """Restore, mixing and base step; False if the plan path does not serve this case."""
        fits, perturbed = self._look(opt)
        done = self._step(opt) if fits and (perturbed or not opt._run.perturbed) else False
        if done is False and not perturbed and not opt._run.perturbed and self._serves(opt):
            done = self._renewed(opt, with_backups=False) and self._step(opt)
        if not done:
            self.hand_over(opt)
        if done is False:
            self._plan = None  # the engine may deal out step counters anew
        return bool(done)

    def _look(self, opt: Core) -> tuple[bool, bool]:
        """Whether the optimizer is the one the plan was made for, and whether the plan has perturbed it.

        The plan itself looks at the tensors.
        """
        if self._plan is None:
            return False, False
        seen = self._plan.poll(opt.param_groups)
        if self._made.version != seen >> 2:
            self._made = _Made(seen >> 2, self._flags == self._flags_of(opt))
        fits = (
            seen & 1
            and self._made.same_flags
            and self._state is opt.state
            and self._state_size == len(opt.state)
            and _len_torch_dispatch_stack() == 0
        )
        return bool(fits), bool(seen & 2)

    def _renewed(self, opt: Core, with_backups: bool) -> bool:
        """Makes a new plan, if one can serve what is there now."""
        self._plan = None
        self._made = _Made()
        check_grads(opt)
        self._build(opt, with_backups or bool(opt._backups))
        return self._look(opt)[0]

    def _perturb(self, opt: Core) -> bool | None:
        """False if the plan does not fit the tensors of now; None if it cannot serve the numbers of now."""
        rho = self._made.rho
        if rho is None:
            check_rho(opt)
            rho = self._made.rho = _on_host([_engine.signed_rho(group) for group, _ in self._lists.rows])
            if rho is None:
                return None
        run = opt._run
        done: bool = self._plan.perturb(
            self._stats_address, rho, opt.adaptive, opt.eta, opt.stochastic_rounding, opt.seed, run.steps,
            run.mixing,
        )  # fmt: skip
        return done

    def _step(self, opt: Core) -> bool | None:
        """As _perturb."""
        rule, mixing = opt.rule, opt._run.mixing
        assert rule is not None
        scaling = self._scaling(opt) if _amp.given(opt) else _UNSCALED
        if scaling is None:
            return None
        scale, on_gpu = scaling  # held until the kernels are under way
        there = (0, 0) if scaling is _UNSCALED else tuple(0 if t is None else t.data_ptr() for t in on_gpu)
        gamma = opt._run.gamma if mixing else 1.0
        if self._made.rows is None or self._made.rows[0] != gamma:
            check_base(opt)
            found = [_on_host(rule.row(group, new, gamma)) for group, new in self._lists.rows]
            if None in found:
                return None
            self._made.rows = gamma, [row for row in found if row is not None]
        rows = self._made.rows[1]
        flags = self._flags[0]  # as of now: it was compared
        number = _RULES[rule.name]
        if self._lists.steps:
            rows = [[*row, float(step) + 1] for row, step in zip(rows, self._lists.steps, strict=True)]
        done: bool = self._plan.update(number, rows, flags[1], flags[2], mixing, scale, there)
        if done and self._lists.steps:
            torch._foreach_add_(self._lists.steps, 1)  # after the step, which may fail
        return done

    def _scaling(self, opt: Core) -> tuple[float, Column] | None:
        """The scale of AMP, or scale and found_inf on the GPU; None if a plan cannot serve this."""
        grad_scale, found_inf = scaling = _amp.scaling(opt)
        if all(t is None or t.is_cpu for t in scaling):
            overflow = found_inf is not None and bool(found_inf)
            return None if overflow else (1.0 if grad_scale is None else float(grad_scale), (None, None))
        device = opt._places[0].device
        if self._lists.steps or any(t is not None and (t.device, t.dtype) != (device, torch.float32) for t in scaling):
            return None  # Adam counts the step only if there was no overflow
        return 1.0, scaling

    def restore(self, opt: Core) -> None:
        """Undoes a perturbation of the plan, if there is one."""
        if self._plan is None or not self._plan.perturbed:
            return
        if not self._plan.restore():
            self.hand_over(opt)

    def hand_over(self, opt: Core) -> None:
        """Passes a step under way to _engine: which weights are perturbed, and the first gradients."""
        if self._plan is None or not self._plan.perturbed:
            return
        # First the note, then the plan lets go: an interrupt in between restores twice, which is harmless.
        without = len(self._lists.params) - len(self._lists.masters)  # which come first
        opt._perturbed.update({p: i >= without for i, p in enumerate(self._lists.params)})
        first_grads = self._plan.hand_over()
        if first_grads:
            tensors = getattr(torch.ops, NAMESPACE)._unhold(first_grads)
            opt._run.first_grads.update(zip(self._lists.params, tensors, strict=True))

    @staticmethod
    def _serves(opt: Core) -> bool:
        return (
            len(opt._places) == 1
            and opt._places[0].backend.plans != ""
            and _CAN_PLAN
            and _len_torch_dispatch_stack() == 0
        )

    @staticmethod
    def _flags_of(opt: Core) -> Any:
        rule = opt.rule
        return None if rule is None else [rule.flags(group) for group in opt.param_groups]

    def _build(self, opt: Core, with_backups: bool) -> None:
        everything = list(range(len(opt.param_groups)))
        params = [p for group in opt.param_groups for p in group["params"]]
        if len(_engine.partition(opt)) != 1 or any(type(p) not in _PLAIN_TENSORS for p in params):
            return
        if any(group.get("capturable") for group in opt.param_groups):
            return  # step counts on the GPU, which a plan would wait for
        if any(p.is_complex() for p in params):
            return  # a plan does not see that a gradient is a conjugate view
        if opt.rule is not None and any(opt.rule.splits_fresh(group) for group in opt.param_groups):
            return
        lists = _engine.Lists()
        for kind in _engine.master_kinds(opt):
            lists.extend(_engine.gather(opt, everything, True, kind, opt._places[0]))
        if not lists.params or any(not step.is_cpu for step in lists.steps):
            return
        masters: list[Tensor | None] = [
            opt.state[p]["master"] if _engine.has_master(opt, p) else None for p in lists.params
        ]
        backups: list[Tensor | None] = [
            _engine.backup_of(opt, p) if with_backups and not _engine.has_master(opt, p) else None for p in lists.params
        ]
        nothing: list[Tensor | None] = [None] * len(lists.params)
        columns: tuple[Column, ...] = (masters, lists.buffers or nothing, lists.buffers2 or nothing, backups)
        if not all(_fits(p, *companions) for p, *companions in zip(lists.params, *columns, strict=True)):
            return  # the ops say what is wrong; a plan trusts what it is made of
        held = list(lists.params)
        masters_at, *states_at, backups_at = [_append(held, column) for column in columns]
        backed = sum(t is not None for t in backups)  # this optimizer's alone: nobody else can move them
        idle = [p for p in params if p.grad is None]
        state = {} if opt.rule is None else opt.state  # that of an optimizer instance is its own affair
        handle = getattr(torch.ops, NAMESPACE)._hold(held + idle)
        gpu = opt.backend.plans == "gpu"
        plan = host().Plan(
            gpu, opt.param_groups, params, lists.params, lists.sizes, handle, len(held) - backed, len(held), masters_at,
            states_at, backups_at, state,
        )  # fmt: skip
        lists.grads, lists.backups = [], []  # a kept gradient would be memory that zero_grad cannot free
        self._lists = lists
        self._with_backups, self._flags = with_backups, self._flags_of(opt)
        self._state, self._state_size = opt.state, len(opt.state)
        self._stats_address = opt._places[0].stats.data_ptr()
        self._plan = plan  # last: an interrupt before leaves no plan, rather than one beside notes of another


def _on_host(given: list[Any]) -> list[float] | None:
    """As floats; None if reading one would wait for the GPU."""
    if set(map(type, given)) == _FLOATS:
        return given
    for x in given:
        if isinstance(x, Tensor) and not x.is_cpu:
            return None
    return [float(x) for x in given]


def _append(held: list[Tensor], column: Column) -> list[int]:
    """Appends what is there and returns the position of each, or -1."""
    positions = []
    for t in column:
        positions.append(-1 if t is None else len(held))
        held += [] if t is None else [t]
    return positions


def _fits(p: Tensor, master: Tensor | None, *state: Tensor | None) -> bool:
    """Whether state that may have been loaded or put there by hand is of the parameter's shape, device and dtype.

    ``state``: buffers and, last, the backup. Beside a master copy all state is float32.
    """
    wide = p.dtype if master is None else torch.float32
    return not p.is_neg() and all(
        t is None
        or (t.shape == p.shape and t.device == p.device and t.dtype == wide and t.layout == torch.strided)
        and not t.is_neg()
        for t in (master, *state)
    )
