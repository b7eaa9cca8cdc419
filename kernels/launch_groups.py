"""The host side of the kernels: lists of tensors are checked, grouped by dtype and device, and launched.

Companions whose layout differs from the parameter's pass through dense copies, in the order of its strides.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import device_cache
from .checks import SIXTEEN_BIT, TRITON_DTYPE, Operand, check_lists, dense, runs_on
from .launch_config import config_for, lanes_of
from .launcher import Launch, Launcher
from .multi_tensor_apply import CHUNK

# C++ of torch.compile. It compares tensors with earlier ones in the time that Python needs to read one attribute each.
_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
TensorGuards: Any = getattr(_guards, "TensorGuards", None)

_ENDLESS = 2**62  # elements of a run
_MOST_CALLS = 16  # remembered calls; a training step makes about three


# --- lists of tensors -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LaunchGroup:
    """The tensors of a call that one launch serves, and what their table holds besides addresses."""

    device: torch.device
    dtype: torch.dtype  # of the parameters
    state: torch.dtype  # of what is kept beside them: dtype, or float32 beside masters, and of master copies
    members: list[int]
    lengths: tuple[int, ...]  # in scalars: a complex number is two
    rows: tuple[int, ...]
    indices: tuple[int, ...]
    in_place: bool  # whether all tensors can be worked on where they are
    shards: tuple[tuple[int, int, int], ...] = ()  # offset, run and stride of each; none where all are whole tensors
    rounds_state: bool = False  # the first state is bfloat16, and rounded stochastically
    remainders: bool = False  # the masters are int16, and complete the parameters

    @cached_property
    def chunks(self) -> int:
        return sum(-(-length // CHUNK.value) for length in self.lengths)

    @property
    def arithmetic(self) -> Any:
        """The dtype that formulas compute in."""
        return tl.float64 if self.dtype in (torch.float64, torch.complex128) else tl.float32


@dataclass(frozen=True)
class ValidatedCall:
    """What is known about the lists of a call: that they can be served, and how they are grouped.

    It is valid for all lists of tensors of the same types, dtypes, devices, shapes and strides, with the same pending
    conj and neg. Addresses are not part of it: every call reads them again.
    """

    call: Any
    guards: list[Callable[..., bool] | None]
    groups: list[LaunchGroup]

    def matches(self, call: Any, operands: Sequence[Operand]) -> bool:
        return self.call == call and all(
            guard is None or guard(*s.tensors) for guard, s in zip(self.guards, operands, strict=True)
        )


_validated: list[ValidatedCall] = []  # the most recent first


def _guard(operand: Operand, lead: Operand) -> Callable[..., bool] | None:
    """Compares tensors with those of ``operand``, without keeping those. None: there is nothing to compare."""
    if not operand.tensors or (operand is not lead and operand.tensors is lead.tensors):
        return None
    return TensorGuards(*operand.tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


@dataclass(frozen=True)
class Work:
    """One launch group of a call, with its table and what follows a launch on it."""

    group: LaunchGroup
    table: Tensor
    used: list[Sequence[Tensor]]  # what the addresses in the table are of
    after: list[Callable[[], Any]]  # copies what went to dense copies to where it belongs; notes which tensors changed


def validated_groups(
    op: str, operands: Sequence[Operand], group_sizes: Sequence[int], first_index: int = 0, shards: Sequence[int] = (),
    indices: Sequence[int] = (),
) -> Iterator[Work]:  # fmt: skip
    """The launches of a call. The first operand leads.

    Asking for the first one checks the lists, unless an earlier call had equivalent lists, and raises for whatever
    would be read or written out of bounds.
    """
    lead = operands[0].tensors
    if lead:
        runs_on(op, f"{operands[0].name}[0]", lead[0])
    call = (
        op, first_index, tuple(group_sizes), tuple(shards), tuple(indices),
        tuple((s.name, len(s.tensors), s.tensors is lead, s.rounded) for s in operands),
    )  # fmt: skip
    known = next((known for known in _validated if known.matches(call, operands)), None)
    if known is None:
        check_lists(op, operands, group_sizes)
        guards = [_guard(s, operands[0]) for s in operands] if TensorGuards else []
        known = ValidatedCall(call, guards, groups_of(operands, group_sizes, first_index, shards, indices))
    if TensorGuards and known is not next(iter(_validated), None):
        _validated[:] = [known, *(other for other in _validated if other is not known)][:_MOST_CALLS]
    for group in known.groups:
        used, back = _prepare(operands, group)
        after: list[Callable[[], Any]] = [partial(Tensor.copy_, original, copy) for original, copy in back]
        if operands[0].written:  # last: a caller tells by their versions which parameters a call is done with
            after.append(partial(torch._C._increment_version, [lead[i] for i in group.members]))
        yield Work(group, table_of(group, used), used, after)


def groups_of(
    operands: Sequence[Operand], group_sizes: Sequence[int], first_index: int, shards: Sequence[int] = (),
    indices: Sequence[int] = (),
) -> list[LaunchGroup]:  # fmt: skip
    """The launches that these lists take. The first operand leads."""
    lead = operands[0].tensors
    rows = [row for row, size in enumerate(group_sizes) for _ in range(size)]
    # The state's dtype is the parameter's unless some operand is fixed to float32.
    fixed = next((s.tensors for s in operands if s.dtype is not None and s.tensors), lead)
    rounded = next((s.tensors for s in operands if s.rounded), None)
    masters = next((s.tensors for s in operands if s.name == "masters" and s.tensors), lead)
    members_of: dict[Any, list[int]] = {}
    for i, (p, kept, master) in enumerate(zip(lead, fixed, masters, strict=True)):
        rounds, completed = rounded is not None and rounded[i].dtype == torch.bfloat16, master.dtype == torch.int16
        state = torch.float32 if completed else kept.dtype
        members_of.setdefault((p.device, p.dtype, state, rounds, completed), []).append(i)
    wanted = [dense(p.shape, p.stride()) for p in lead]
    return [
        LaunchGroup(
            device, dtype, state, members,
            lengths=tuple(lead[i].numel() * (2 if dtype.is_complex else 1) for i in members),
            rows=tuple(rows[i] for i in members),
            indices=tuple(indices[i] if indices else first_index + i for i in members),
            in_place=all(_has_layout(s.tensors[i], wanted[i]) for s in operands if s.tensors for i in members),
            shards=_shards(shards, [(i, lead[i].numel()) for i in members])
            if rounds or (rounded is None and dtype in SIXTEEN_BIT) else (),
            rounds_state=rounds, remainders=completed,
        )
        for (device, dtype, state, rounds, completed), members in members_of.items()
    ]  # fmt: skip


def _shards(shards: Sequence[int], members: Sequence[tuple[int, int]]) -> tuple[tuple[int, int, int], ...]:
    """Of the ``members``, by their index and length: all of which run for ever where they are of one run."""
    if not shards:
        return ()
    given = [(length, *shards[3 * i : 3 * i + 3]) for i, length in members]
    found = tuple((first, run if 0 < run < length else _ENDLESS, stride) for length, first, run, stride in given)
    return () if all(shard[:2] == (0, _ENDLESS) for shard in found) else found


def _has_layout(t: Tensor, wanted: tuple[int, ...]) -> bool:
    """Whether a kernel can work on ``t`` in place, beside tensors of these strides."""
    same = all(a == b or size == 1 for size, a, b in zip(t.shape, t.stride(), wanted, strict=True)) or 0 in t.shape
    return same and not (t.is_conj() or t.is_neg())


def _prepare(
    operands: Sequence[Operand], group: LaunchGroup
) -> tuple[list[Sequence[Tensor]], list[tuple[Tensor, Tensor]]]:
    """The dense tensors to work on, all with the parameter's layout, and (original, copy) of those to write back."""
    used: list[Sequence[Tensor]] = [s.tensors for s in operands]
    if len(group.members) < len(used[0]):
        used = [[tensors[i] for i in group.members] if tensors else [] for tensors in used]
    back: list[tuple[Tensor, Tensor]] = []
    if not group.in_place:
        wanted = [dense(p.shape, p.stride()) for p in used[0]]
        for n, s in enumerate(operands):
            used[n] = mine = list(used[n])
            for k, t in enumerate(mine):
                if not _has_layout(t, wanted[k]):
                    mine[k] = torch.empty_strided(t.shape, wanted[k], dtype=t.dtype, device=t.device)
                    if s.read:
                        mine[k].copy_(t)
                    if s.written:
                        back.insert(0, (t, mine[k]))  # parameters last
    return used, back


def table_of(group: LaunchGroup, used: Sequence[Sequence[Tensor]]) -> Tensor:
    """With the addresses in each list."""
    return device_cache.table(group.device, group.lengths, group.rows, group.indices, _slots(used), group.shards)


def _slots(used: Sequence[Sequence[Tensor]]) -> tuple[tuple[int, ...], ...]:
    """The addresses in each list."""
    lead = tuple(map(Tensor.data_ptr, used[0]))
    absent = (0,) * len(lead)
    return tuple(
        lead if tensors is used[0] else tuple(map(Tensor.data_ptr, tensors)) if tensors else absent for tensors in used
    )


# --- launches -------------------------------------------------------------------------------------------------------
_launchers: dict[Any, Launcher] = {}


def starter(function: Any, device: torch.device, constants: dict[str, Any], warps: int) -> Callable[..., None]:
    """What starts this variant of a kernel, given programs, arguments and a function to call then."""
    key = (function.__name__, device, warps, *constants.values())
    if key not in _launchers:
        _launchers[key] = Launcher(function, device, constants, warps)
    return _launchers[key].start


def starter_for(
    function: Any, group: LaunchGroup, wide_state: bool = False, name: str = "", **constants: Any
) -> Callable[..., None]:
    """That of a kernel with one program per chunk of a group.

    ``wide_state``: float32 is stored beside 16-bit numbers. ``name``: by which its configuration is kept, if not by
    that of the function.
    """
    types = {"T": TRITON_DTYPE[group.dtype], "STATE": TRITON_DTYPE[group.state]}
    chosen = config_for(name or function.__name__, group.device, types["T"], types["STATE"], wide_state)
    lanes = lanes_of(group.device)
    blocks = {"BLOCK": chosen.block(lanes), "TAIL": chosen.tail(lanes)}
    return starter(function, group.device, {**types, **blocks, **constants}, chosen.warps)


def launches(function: Any, work: Work, *args: Any, **variant: Any) -> list[Callable[[], Any]]:
    """A launch on a group, if there is anything in it, and what follows; ``variant`` as for starter_for."""
    if not work.group.chunks:
        return work.after
    start = starter_for(function, work.group, **variant)
    args = (work.table, len(work.group.members), *args)
    return [Launch(start, work.group.chunks, args, keeping=work.used), *work.after]
