"""The only reader of p, p.grad and state[p]: what the ops need of each parameter, as one list for each column."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rst_fused._checks import SIXTEEN_BIT
from rst_fused._step.base import StepOptimizer
from rst_fused._step.devices import DeviceState, device_of
from rst_fused._step.rules import Flags, Group
from rst_fused._step.sharding import describe, local, positions_of, settled, waited
from rst_fused._step.state_dtypes import (
    MASTERS,
    copies_masters,
    create_master,
    dtype_of,
    has_master,
    master_name,
    positions_in,
)
from rst_fused._step.validation import is_usable


def master_kinds(opt: StepOptimizer) -> tuple[bool, ...]:
    return (False, True) if opt.master_weights else (False,)


def init_state(opt: StepOptimizer, group: Group, p: Tensor, updating: bool) -> None:
    """Creates what p lacks: its master and, when ``updating``, what the base optimizer keeps, which is zero."""
    rule, state = opt.rule, opt.state[p]
    known = set(state)
    if has_master(opt, p) and master_name(opt) not in state:
        create_master(opt, p)
    if rule is None or not updating:
        _refuse_new_state(opt, set(state) - known)
        return
    for name in rule.state_names(group):
        if name not in state:
            state[name] = torch.zeros_like(p, dtype=dtype_of(opt, p, name), memory_format=torch.preserve_format)
    if rule.counts_steps and "step" not in state:
        counters = (
            opt.state[q]["step"]
            for q in group["params"]
            if device_of(q) == device_of(p) and q in opt.state and "step" in opt.state[q]
        )
        like = next(counters, None)  # torch.compile may have moved them
        # A CUDA graph sees no changes on the CPU.
        device = p.device if group.get("capturable") else "cpu" if like is None else like.device
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    _refuse_new_state(opt, set(state) - known)


def _refuse_new_state(opt: StepOptimizer, created: set[str]) -> None:
    if created and not torch.compiler.is_dynamo_compiling() and opt.capturing:
        raise RuntimeError(
            "a CUDA graph would make the optimizer's state again at every replay: take a step with the same parameters "
            "before capturing"
        )


def share_steps(opt: StepOptimizer, group: Group, mine: list[Tensor]) -> None:
    """Lets the parameters of one call that are at the same step count share one counter tensor, and no others."""
    counted = [p for p in mine if "step" in opt.state.get(p, ())]  # none before the first step
    taken = {id(opt.state[p]["step"]) for p in counted}
    members = set(map(id, mine))
    for p in group["params"]:
        if id(p) not in members and p in opt.state and id(opt.state[p].get("step")) in taken:
            opt.state[p]["step"] = opt.state[p]["step"].clone()
    if len(taken) > 1:
        shared: dict[float, Tensor] = {}
        for p in counted:
            step = opt.state[p]["step"]
            opt.state[p]["step"] = shared.setdefault(float(step), step)


def keeper_of(opt: StepOptimizer, p: Tensor) -> Tensor:
    """The tensor that takes p's weights (of a DTensor those on this rank) when they are perturbed."""
    return local(p.grad) if id(p) in opt._step_state.swaps and p.grad is not None else backup_of(opt, p)


def backup_of(opt: StepOptimizer, p: Tensor) -> Tensor:
    """The tensor that keeps p's weights (of a DTensor those on this rank) while they are perturbed; allocated once
    (again if the model was converted)."""
    backups = opt._step_state.backups
    b, w = backups.get(p), local(p)
    if b is None or (b.dtype, b.shape, b.device) != (w.dtype, w.shape, w.device) or not is_usable(b):
        b = backups[p] = torch.empty_like(w, requires_grad=False, memory_format=torch.preserve_format)
    return b


def readable(p: Tensor) -> Tensor:
    """The gradient of p as kernels can read it."""
    g = p.grad
    assert g is not None
    g = waited(g)
    return g.resolve_conj().resolve_neg() if p.is_complex() else g


def shards_of(opt: StepOptimizer, params: list[Tensor], of_state: bool) -> list[int]:
    """Where the elements on this rank are in the whole parameters, whose random bits a stochastic rounding takes: that
    of w + e, or ``of_state`` that of the state, too."""
    if not opt._sharding.dtensors or not (opt.stochastic_rounding or of_state):
        return []
    found = [positions_of(p) if of_state or p.dtype in SIXTEEN_BIT else (0, 0, 0) for p in params]
    if None in found:
        p = params[found.index(None)]
        remedy = "state_dtype=None" if of_state else "stochastic_rounding=False"
        raise RuntimeError(
            f"stochastic rounding of a parameter that is {describe(p)}: its random bits are known where besides the "
            f"first dimension no more than one is sharded; pass {remedy}"
        )
    return [number for numbers in found if numbers is not None for number in numbers]


def init_group(
    opt: StepOptimizer, group: Group, updating: bool, masters_only: bool, device: str | None,
    params: list[Tensor], grads: list[Tensor], backups: list[Tensor], state0: list[Tensor], state1: list[Tensor],
    state2: list[Tensor], masters: list[Tensor], steps: list[Tensor], sizes: list[int], is_first_step: list[bool],
    parts: list[int], shards: list[int], indices: list[int],
) -> None:  # fmt: skip
    """Appends what the ops need for this group's parameters that have a gradient, one row per step count.

    device: only those on it (None: all).

    Dynamo runs this outside the graph and treats the tensors as static inputs, as for the optimizers of torch.
    """
    rule = opt.rule
    names = rule.state_names(group) if rule is not None else ()
    active = [p for p in group["params"] if p.grad is not None]
    if opt.master_weights:
        active = [p for p in active if has_master(opt, p) == masters_only]
    if device is not None:
        active = [p for p in active if str(device_of(p)) == device]
    rounds_state = updating and opt.state_dtype is not None
    positions = positions_in(opt) if rounds_state else {}
    states: list[dict[str, Any]] = [{}] * len(active)
    is_new = [False] * len(active)
    if rule is not None:
        needed = {master_name(opt)} if masters_only else set()
        if updating:
            needed.update(names, ("step",) if rule.counts_steps else ())
        creates = updating or masters_only  # a perturbation that is abandoned leaves no state of the base behind
        states = [opt.state[p] if creates else opt.state.get(p, {}) for p in active]
        if rule.splits_first_step(group):
            is_new = [names[0] not in state for state in states]
        # Of parameters that were converted: their masters would be out of date from here on.
        stale = MASTERS if updating and opt.master_weights and not masters_only else ()
        for p, state in zip(active, states, strict=True):
            for name in stale:
                state.pop(name, None)
            if not needed <= state.keys():
                init_state(opt, group, p, updating)
        if rule.counts_steps:  # in both phases: it decides the order of the parameters
            share_steps(opt, group, active)
    rows: dict[Any, tuple[list[Tensor], list[dict[str, Any]]]] = defaultdict(lambda: ([], []))
    for p, state, new in zip(active, states, is_new, strict=True):
        members, kept = rows[id(state.get("step")), new]
        members.append(p)
        kept.append(state)
    for (_, new), (members, kept) in rows.items():
        sizes.append(len(members))
        is_first_step.append(new)
        params += members
        parts += [opt._sharding.part_of(p) for p in members]
        shards += [] if updating and not rounds_state else shards_of(opt, members, rounds_state)
        indices += [positions[p] for p in members] if rounds_state else []
        grads += [readable(p) for p in members]
        if masters_only:
            masters += [state[master_name(opt)] for state in kept]
        if not (updating or (masters_only and copies_masters(opt))):
            backups += [keeper_of(opt, p) for p in members]
        if updating:
            for column, name in zip((state0, state1, state2), names, strict=False):
                column += [state[name] for state in kept]
            if "step" in kept[0]:
                steps.append(kept[0]["step"])


class Columns:
    """The arguments of one call of an op, gathered over parameter groups that agree in all flags.

    DTensors are in it as such; what the kernels are given of them is taken at the call.
    """

    def __init__(self) -> None:
        self.lists: list[list[Any]] = [[] for _ in range(13)]  # what init_group fills, in its order
        (
            self.params, self.grads, self.backups, self.state0, self.state1, self.state2, self.masters, self.steps,
            self.sizes, self.is_first_step, self.parts, self.shards, self.indices,
        ) = self.lists  # fmt: skip
        self.rows: list[tuple[Group, bool]] = []  # the group of each row, and whether it is a first step

    @property
    def states(self) -> list[list[Tensor]]:
        return [column for column in (self.state0, self.state1, self.state2) if column]

    def of_first_steps(self) -> list[Tensor]:
        """The parameters in rows that are a first step."""
        found, start = [], 0
        for size, (_, is_first_step) in zip(self.sizes, self.rows, strict=True):
            found += self.params[start : start + size] if is_first_step else []
            start += size
        return found

    def extend(self, other: Columns) -> None:
        for mine, others in zip(self.lists, other.lists, strict=True):
            mine.extend(others)
        self.rows += other.rows


def gather(
    opt: StepOptimizer, indices: Iterable[int], updating: bool, masters_only: bool, device: DeviceState,
    only: list[list[Tensor]] | None = None,
) -> Columns:  # fmt: skip
    """The columns of the given groups: parameters on one device, with a master or those without; of each group
    all, or those in ``only``."""
    out = Columns()
    where = None if len(opt._devices) == 1 else str(device.device)
    for i in indices:
        if only is not None and not only[i]:
            continue
        group = opt.param_groups[i] if only is None else {**opt.param_groups[i], "params": only[i]}
        c = Columns()
        # Dynamo fills the lists of a call to _init_group only if they are empty, so each group has its own.
        opt._init_group(group, updating, masters_only, where, *c.lists)
        if opt._sharding.dtensors:  # settled already, unless this is a graph
            c.grads[:] = [settled(p, g) for p, g in zip(c.params, c.grads, strict=True)]
        c.rows = [(group, new) for new in c.is_first_step]
        out.extend(c)
    return out


def partition(opt: StepOptimizer) -> list[tuple[Flags | None, list[int]]]:
    """Indices of the parameter groups, those that one call can serve together, with their flags."""
    if opt.rule is None:
        return [(None, list(range(len(opt.param_groups))))]
    parts: dict[Flags, list[int]] = {}
    for i in range(len(opt.param_groups)):
        parts.setdefault(opt.rule.flags(opt.param_groups[i]), []).append(i)
    return list(parts.items())


def has_all_state(opt: StepOptimizer) -> bool:
    """Whether an update would find the state of every parameter that has a gradient."""
    if opt.rule is None:
        return False
    for group in opt.param_groups:
        names = (*opt.rule.state_names(group), *(("step",) if opt.rule.counts_steps else ()))
        for p in group["params"] if names else ():
            if p.grad is not None and not all(name in opt.state.get(p, ()) for name in names):
                return False
    return True


def rho_rows(c: Columns) -> list[list[Any]]:
    """rho, negative where the objective is maximized: the perturbation always makes the objective worse."""
    return [[-group["rho"] if group.get("maximize") else group["rho"]] for group, _ in c.rows]


def hyperparam_rows(opt: StepOptimizer, c: Columns) -> list[list[Any]]:
    """The hyperparameters of an update, gamma among them, in the order of the op's schema."""
    assert opt.rule is not None
    gamma = opt._step_state.gamma if opt._step_state.mixing else 1.0
    return [opt.rule.row(group, is_first_step, gamma) for group, is_first_step in c.rows]


def graph_inputs(opt: StepOptimizer, c: Columns) -> list[list[Any]]:
    """All numbers of a row that may change from step to step: see hyperparam_tensor."""
    rule = opt.rule
    return [[group["rho"], *(rule.row(group, False, 1.0) if rule is not None else [])] for group, _ in c.rows]
