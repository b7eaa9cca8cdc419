"""A launch plan, as csrc/plan/plan.h describes it, in Python: what the kernels need to know of the tensors of one
optimizer, kept between its steps. Each call compares every tensor that a kernel is going to read or write with it.

A plan serves parameters of one dtype on one device, all with masters of one kind or all without, whose companions have
their layout. ``matcher`` is a plan in C++, where there is one: it compares in a tenth of the time.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor

from . import adam_step, device_cache, lion_step, perturb, restore, sgd_step, update
from .checks import SIXTEEN_BIT, TRITON_DTYPE, Operand, are_remainders, are_shards
from .grad_norm import finish_starter, grad_norm_kernel
from .grad_norm import variant as norm_variant
from .launch_groups import LaunchGroup, TensorGuards, groups_of, starter_for, table_of
from .launcher import Launch, run_all
from .plan_match import Match, addresses_of, complete, grad_of, has_memory

RULES = (sgd_step.RULE, adam_step.RULE, lion_step.RULE)  # in the order of csrc/math/rules/all.h
_MOST_TABLES = 16  # of a plan: gradients come to a few sets of addresses, in each of both passes

_set_grad: Any = vars(torch._C.TensorBase)["grad"].__set__

Calls = list[Callable[[], Any]]


class KeptGrads:
    """What were gradients, and hold weights."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def as_list(self) -> list[Tensor]:
        return list(self.tensors)

    def clear(self) -> None:
        self.tensors.clear()


class Plan(Match):
    def __init__(
        self, group: LaunchGroup, grads: Sequence[Tensor], *, groups: list[Any], everything: list[Tensor],
        active: list[Tensor], idle: list[Tensor], sizes: list[int], masters: list[Any], states: list[list[Tensor]],
        backups: list[Any], steps: list[Tensor], row_groups: list[int], rule: int, option: bool, maximize: bool,
        state: dict[Any, Any], step_state: Any, parts: Sequence[int] = (), indices: Sequence[int] = (),
        swapped: Sequence[int] = (), lent: bool = False, matcher: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(grads, groups, everything, active, idle, masters, states, backups, steps, state, matcher)
        self._group = replace(group, shards=(), rounds_state=False)
        self._perturbed = replace(self._group, shards=group.shards if group.dtype in SIXTEEN_BIT else ())
        # Of an update, where random bits of the state go by other indices.
        self._updated = replace(group, indices=tuple(indices)) if group.rounds_state else self._group
        self._parts = _parts_of(self._group, parts)
        self._sizes, self._states, self._steps, self._row_groups = sizes, states, steps, row_groups
        self._rule, self._option, self._maximize = RULES[rule], option, maximize
        self._step_state = step_state
        self._copies = [] if group.remainders else self._masters  # in the place of backups
        self._remainders = self._masters if group.remainders else []
        self._keepers = self._copies or backups  # None where weights go where the gradient was
        self._swapped, self.kept = [active[i] for i in swapped], KeptGrads()
        self.sees_references = matcher is not None and not lent
        self._tables: OrderedDict[Any, list[Tensor]] = OrderedDict()
        self._starts: dict[Any, Any] = {}
        self._scalars: dict[str, tuple[int, Any, list[Tensor]]] = {}
        self._partials = torch.empty(group.chunks, dtype=torch.float64, device=group.device)

    @classmethod
    def of(cls, *, active: list[Tensor], masters: list[Any], states: list[list[Tensor]], backups: list[Any],
           sizes: list[int], shards: Sequence[int] = (), indices: Sequence[int] = (),
           **others: Any) -> "Plan | None":  # fmt: skip
        """None where a plan cannot serve these tensors."""
        if not are_shards(shards, len(active)):
            raise ValueError(f"shards={shards}: expected three numbers >= 0 for each of {len(active)} parameters")
        if indices and len(indices) != len(active):
            raise ValueError(f"indices={indices}: expected a number for each of {len(active)} parameters")
        grads = list(map(grad_of, active))
        if TensorGuards is None or not all(t.dtype in TRITON_DTYPE for t in active) or not complete(grads):
            return None
        if not complete(masters) and any(m is not None for m in masters):
            return None
        own_masters = complete(masters)
        kept_in = torch.int16 if are_remainders(own_masters) else torch.float32
        own = Operand("masters", own_masters, dtype=kept_in)
        backed = [p if b is None else b for p, b in zip(active, backups, strict=True)]  # gradients lie as these do
        lists = [active, grads, backed, *states]
        first = Operand("", states[0] if indices and states else [], rounded=bool(indices and states))
        groups = groups_of([*(Operand("", tensors) for tensors in lists), own, first], sizes, 0, shards)
        if len(groups) != 1 or not groups[0].in_place or groups[0].chunks == 0 or not all(map(has_memory, grads)):
            return None
        if groups[0].remainders and groups[0].dtype != torch.bfloat16:
            raise ValueError(f"masters are int16, which go with bfloat16, but parameters are {groups[0].dtype}")
        return cls(
            groups[0], grads, active=active, masters=masters, states=states, backups=backups, sizes=sizes,
            indices=indices, **others,
        )

    # --- the phases: whether they were served -----------------------------------------------------------------------
    def perturb(
        self, stats: Tensor, rho: list[float], adaptive: bool, eta: float, stochastic: bool, seed: int, step: int,
        keep: bool, measured: bool, after: dict[str, Any],
    ) -> bool:  # fmt: skip
        """Norm and perturbation with the current gradients, which are taken out of p.grad, and kept if ``keep``.
        ``measured``: the norm is in the stats already."""
        try:
            addresses = self._match(False, True)
            return addresses is not None and self._perturb(
                addresses, stats, rho, adaptive, eta, stochastic, seed, step, keep, measured, after
            )
        finally:
            self._release()

    def _perturb(
        self, addresses: Any, stats: Tensor, rho: list[float], adaptive: bool, eta: float, stochastic: bool, seed: int,
        step: int, keep: bool, measured: bool, after: dict[str, Any],
    ) -> bool:  # fmt: skip
        group, stream = self._perturbed if stochastic else self._group, self._stream()
        swapped = list(map(grad_of, self._swapped))
        if swapped and keep:
            return False
        tables = self._tables_for((stream, "perturb", adaptive, stochastic, measured, addresses), lambda: [
            table_of(group, [self._active, self._copies or self._active, self._grads_now(), self._backed(swapped),
                             self._remainders]),
            *([] if measured else [table_of(self._group, self._norm_lists(adaptive))]),
        ], self._grads_now)  # fmt: skip
        if tables is None:
            return False
        rhos, etas = self._sent("rho", stream, (rho, eta), lambda: [_doubles(rho), _doubles([eta])])
        norm, move, rounds = self._starts_for(
            (adaptive, stochastic), lambda: self._perturb_starts(adaptive, stochastic)
        )  # fmt: skip
        if rounds:
            (rng,) = device_cache.on_device(group.device, torch.tensor([seed, step], device="cpu"))
        else:
            (rng,) = self._sent("rng", stream, (), lambda: [update.NO_RNG])
        count = len(self._active)
        if not measured:
            Launch(norm, group.chunks, (tables[1], count, self._partials, 0, group.chunks, stats, etas))()
        if keep:
            after = {**after, "first_grads": dict(zip(self._active, self._grads_now(), strict=True))}
        clear: Callable[[], Any] = partial(deque, map(_set_grad, self._active, repeat(None)), 0)
        if self._matcher is not None:
            clear = self._matcher.clear_grads
        first: Calls = []
        if swapped:  # nobody may see weights in a gradient
            self.kept.clear()
            first = [partial(self.kept.tensors.extend, swapped), clear]
        run_all([
            *first, Launch(move, group.chunks, (tables[0], count, stats, rhos, etas, rng)), *self._notes(after), clear,
        ])  # fmt: skip
        return True

    def grad_norm(self, stats: Tensor, part: int, adaptive: bool, eta: float) -> bool:
        """The norm of one part, of the current gradients of either pass, into ``stats``."""
        if part < 0:
            raise IndexError(f"part={part}: expected a number >= 0")
        try:
            addresses = self._match_norm()
            return addresses is not None and self._grad_norm(addresses, stats, part, adaptive, eta)
        finally:
            self._release()

    def _grad_norm(self, addresses: Any, stats: Tensor, part: int, adaptive: bool, eta: float) -> bool:
        group = self._parts[part] if part < len(self._parts) else None
        if group is None or not group.chunks:
            (start,) = self._starts_for("nothing", lambda: [finish_starter(self._group.device)])
            run_all([Launch(start, 1, (self._partials, 0, stats))])
            return True
        stream = self._stream()
        tables = self._tables_for((stream, "norm", part, adaptive, addresses), lambda: [
            table_of(group, [[tensors[i] for i in group.members] if tensors else []
                             for tensors in self._norm_lists(adaptive)])
        ], self._grads_now)  # fmt: skip
        if tables is None:
            return False
        (etas,) = self._sent("eta", stream, (eta,), lambda: [_doubles([eta])])
        (start,) = self._starts_for(("norm", adaptive), lambda: [self._norm_start(adaptive)])
        args = (tables[0], len(group.members), self._partials, 0, group.chunks, stats, etas)
        run_all([Launch(start, group.chunks, args)])
        return True

    def update(
        self, rows: list[float], restores: bool, mixing: bool, scale: float, grad_scale: Any, found_inf: Any,
        seed: int, step: int, after: dict[str, Any],
    ) -> bool:  # fmt: skip
        """One update of all parameters, counted in their step counters. ``rows``: the hyperparameters, row after row.
        Gradients are divided by the scale of AMP: ``scale``, or what is in ``grad_scale`` on the device, with found_inf
        beside it (0: absent). ``seed`` and ``step`` round the state, where it is rounded."""
        try:
            addresses = self._match(True, restores)
            return addresses is not None and self._update(
                addresses, rows, restores, mixing, scale, grad_scale, found_inf, seed, step, after
            )
        finally:
            self._release()

    def _update(
        self, addresses: Any, rows: list[float], restores: bool, mixing: bool, scale: float, grad_scale: Any,
        found_inf: Any, seed: int, step: int, after: dict[str, Any],
    ) -> bool:  # fmt: skip
        group, stream = self._updated, self._stream()
        firsts: list[Tensor] = []
        if mixing:
            by_parameter = self._step_state.first_grads
            firsts = [by_parameter[p] for p in self._active if p in by_parameter]
            if len(firsts) < len(self._active) or not self._first_guard(*firsts):
                return False
        first_addresses = addresses_of(firsts)
        if mixing and any(a == b != 0 for a, b in zip(first_addresses, addresses_of(self._grads_now()), strict=True)):
            return False  # a gradient was written over the first one
        kept = self.kept.tensors if restores else []
        source = self._copies or (self._backed(kept) if restores else self._active)
        remainders = [self._remainders] if self._remainders else []  # which come last
        tables = self._tables_for((stream, restores, addresses, first_addresses, addresses_of(kept)), lambda: [
            table_of(group, [self._active, source, self._grads_now(), firsts, *self._states, *remainders])
        ], lambda: chain(self._grads_now(), firsts))  # fmt: skip
        hyper = self._rows(rows, stream)
        if tables is None or hyper is None:
            return False
        scales = self._sent("amp", stream, (scale,), lambda: [_floats(scale), _floats(0.0)])
        scale_and_inf = [given if isinstance(given, Tensor) else own for given, own in
                         zip((grad_scale, found_inf), scales, strict=True)]  # fmt: skip
        if group.rounds_state:
            (rng,) = device_cache.on_device(group.device, torch.tensor([seed, step], device="cpu"))
        else:
            (rng,) = self._sent("rng", stream, (), lambda: [update.NO_RNG])
        args = (tables[0], len(self._active), hyper, -1 if self._maximize else 1, *scale_and_inf, rng)
        counted = [partial(Tensor.add_, step, 1) for step in self._steps]
        (start,) = self._starts_for(mixing, lambda: self._update_starts(mixing))
        run_all([Launch(start, group.chunks, args), *counted, *self._notes(after), kept.clear])
        return True

    def restore(self, after: dict[str, Any]) -> bool:
        """Brings the weights back."""
        if not self._restore_guard(*self._own) or not self._in_place(True):
            return False
        if self._masters and not self._same_state():
            return False
        group, stream = self._group, self._stream()
        kept = self._copies or self._backed(self.kept.tensors)
        tables = self._tables_for((stream, "restore", addresses_of(self.kept.tensors)), lambda: [
            table_of(group, [self._active, kept, [], []])
        ])  # fmt: skip
        (gammas,) = self._sent("gamma", stream, (), lambda: [_doubles([1.0] * len(self._sizes))])
        (start,) = self._starts_for("restore", lambda: [
            starter_for(restore.restore_kernel, group, V=group.arithmetic, MIXING=False)
        ])  # fmt: skip
        assert tables is not None
        run_all([
            Launch(start, group.chunks, (tables[0], len(self._active), gammas)), *self._notes(after),
            self.kept.tensors.clear,
        ])  # fmt: skip
        return True

    def keep(self, tensors: list[Tensor]) -> None:
        """Takes over what a plan before this one has left in gradients."""
        self.kept.tensors[:] = tensors

    @staticmethod
    def first_grads_of(by_parameter: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """First gradients that this plan can use."""
        return by_parameter

    # --- what is kept for them --------------------------------------------------------------------------------------
    def _stream(self) -> int:
        return device_cache.stream_of(self._group.device)

    def _backed(self, swapped: Sequence[Tensor]) -> list[Tensor]:
        """Where the weights of each parameter are kept, if not in copies. ``swapped``: of those without a backup."""
        given = iter(swapped)
        return [] if self._copies else [next(given) if b is None else b for b in self._keepers]

    def _notes(self, after: dict[str, Any]) -> Calls:
        """That the parameters changed, and where the step stands."""
        setters = [partial(setattr, self._step_state, name, value) for name, value in after.items()]
        if self._matcher is not None:
            return [self._matcher.bump_versions, *setters]
        return [partial(torch._C._increment_version, self._active), *setters]

    def _starts_for(self, key: Any, make: Callable[[], Any]) -> Any:
        """What starts the kernels of a phase."""
        starts = self._starts.get(key)
        if starts is None:
            starts = self._starts[key] = make()
        return starts

    def _perturb_starts(self, adaptive: bool, stochastic: bool) -> tuple[Any, Any, bool]:
        """Of the norm and of the perturbation, and whether that one needs random numbers."""
        variant = perturb.variant(self._perturbed, adaptive, stochastic)
        move = starter_for(perturb.perturb_kernel, self._group, **variant)
        return self._norm_start(adaptive), move, variant["STOCHASTIC"]

    def _norm_start(self, adaptive: bool) -> Any:
        return starter_for(grad_norm_kernel, self._group, **norm_variant(self._group, adaptive, finish=True))

    def _norm_lists(self, adaptive: bool) -> list[list[Tensor]]:
        return [self._grads_now(), self._active, self._masters] if adaptive else [self._grads_now(), [], []]

    def _update_starts(self, mixing: bool) -> tuple[Any]:
        variant = update.variant(self._rule, self._updated, self._option, len(self._states), mixing)
        return (starter_for(update.update_kernel, self._group, **variant),)

    def _tables_for(
        self, key: Any, make: Callable[[], list[Tensor]], grads: Callable[[], Iterable[Tensor]] = tuple
    ) -> list[Tensor] | None:
        """Those of these addresses. None if one of ``grads``, known by its address alone, lacks memory."""
        tables = self._tables.get(key)
        if tables is None:
            if not all(map(has_memory, grads())):
                return None
            self._tables[key] = tables = make()
            if len(self._tables) > _MOST_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return tables

    def _sent(
        self, what: str, stream: int, objects: tuple[Any, ...], make: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """Numbers on the device: those of the last call, if they were made of the same objects."""
        kept = self._scalars.get(what)
        if kept is None or kept[0] != stream or not all(map(is_, kept[1], objects)):
            sent = device_cache.on_device(self._group.device, *make())
            kept = self._scalars[what] = stream, objects, sent
        return kept[2]

    def _rows(self, rows: list[float], stream: int) -> Tensor | None:
        """The hyperparameters of the update, as its kernel reads them."""
        count = len(self._sizes)
        if not self._steps:
            return self._sent("rows", stream, (rows,), lambda: [_doubles(rows)])[0]
        steps = [float(step) for step in self._steps]
        if len(set(zip(self._row_groups, steps, strict=True))) < count:
            return None  # the ops would join rows of a group that are at the same step
        assert self._rule.rows_with_steps is not None
        width = len(rows) // count
        given = [rows[i : i + width] for i in range(0, len(rows), width)]
        hyper = _doubles(self._rule.rows_with_steps(given, [step + 1 for step in steps]))
        return device_cache.on_device(self._group.device, hyper)[0]


def _parts_of(group: LaunchGroup, parts: Sequence[int]) -> list[LaunchGroup]:
    """The parameters of each part of the norm; their members are places in the list of active parameters."""
    numbers = list(parts) or [0] * len(group.members)
    if len(numbers) != len(group.members) or min(numbers) < 0:
        raise ValueError(f"parts={numbers}: expected a number >= 0 for each of {len(group.members)} parameters")
    found = []
    for part in range(max(numbers) + 1):
        members = [i for i, number in enumerate(numbers) if number == part]
        columns = (group.lengths, group.rows, group.indices)
        lengths, rows, indices = (tuple(column[i] for i in members) for column in columns)
        found.append(replace(group, members=members, lengths=lengths, rows=rows, indices=indices))
    return found


def _doubles(numbers: Sequence[Any]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def _floats(number: float) -> Tensor:
    return torch.tensor([number], dtype=torch.float32, device="cpu")
