"""The host's side of the traversal: lists of tensors are checked, grouped by dtype and device, and made into launches.

Tensors that do not lie alike in memory pass through dense copies, in the order of the parameter's strides.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from . import tables
from .checks import (
    TRITON_DTYPE,
    Stream,
    alike,
    check_length,
    check_lists,
    check_masters,
    check_numbers,
    dense,
    runs_on,
)
from .sizes import BUILT_IN, sizes
from .tables import Table

# C++ of torch.compile: it compares tensors with what they were in the time that Python takes to ask each one thing.
_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
TensorGuards: Any = getattr(_guards, "TensorGuards", None)

# Without fusion a * b + c rounds twice unless the formula says fma.
OPTIONS = {"enable_fp_fusion": False}
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
_LOOKS = 16  # calls whose lists are remembered; a training step makes about three


# --- lists of tensors -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Layout:
    """The tensors of a call that one launch serves: all of a table but the addresses."""

    device: torch.device
    dtype: torch.dtype  # of the parameters
    state: torch.dtype  # of what is kept beside them: dtype, or float32 beside masters
    members: list[int]
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    indices: tuple[int, ...]
    in_place: bool  # whether all tensors can be worked on where they are


class Look:
    """What was found out about the lists of a call: that they can be served, and how they are to be laid out.

    It holds for all lists of tensors of the same types, dtypes, devices, shapes and strides, with the same pending conj
    and neg. Addresses are no part of it: every call reads them anew.
    """

    def __init__(self, call: Any, streams: Sequence[Stream], group_sizes: Sequence[int]) -> None:
        self.call = call
        self.group_sizes = list(group_sizes)
        self.layouts: dict[Any, list[Layout]] = {}
        self.guards = [_guard(s, streams[0]) for s in streams] if TensorGuards else []

    def fits(self, call: Any, streams: Sequence[Stream]) -> bool:
        return self.call == call and all(
            fits is None or fits(*s.tensors) for fits, s in zip(self.guards, streams, strict=True)
        )


_looks: list[Look] = []  # the latest first


def _guard(stream: Stream, lead: Stream) -> Callable[..., bool] | None:
    """Compares tensors with those of ``stream``, which it does not keep. None: there is nothing to compare."""
    if not stream.tensors or (stream is not lead and stream.tensors is lead.tensors):
        return None
    return TensorGuards(*stream.tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


def look(op: str, streams: Sequence[Stream], group_sizes: Sequence[int]) -> Look:
    """Checks the lists of a call, the first of which leads, unless an earlier call had such lists.

    Raises for whatever would be read or written out of bounds.
    """
    lead = streams[0].tensors
    if lead:
        runs_on(op, f"{streams[0].name}[0]", lead[0])
    call = (op, tuple(group_sizes), tuple((s.name, len(s.tensors), s.tensors is lead) for s in streams))
    known = next((known for known in _looks if known.fits(call, streams)), None)
    if known is None:
        check_lists(op, streams, group_sizes)
        known = Look(call, streams, group_sizes)
    if TensorGuards and known is not next(iter(_looks), None):
        _looks[:] = [known, *(other for other in _looks if other is not known)][:_LOOKS]
    return known


def _prepare(
    streams: Sequence[Stream], layout: Layout
) -> tuple[list[Sequence[Tensor]], list[tuple[Tensor, Tensor]]]:
    """The dense tensors to work on, all lying like the parameter, and (original, copy) of those to write back."""
    members = layout.members
    if layout.in_place and len(members) == len(streams[0].tensors):
        return [s.tensors for s in streams], []
    used: list[Sequence[Tensor]] = [[s.tensors[i] for i in members] if s.tensors else [] for s in streams]
    back: list[tuple[Tensor, Tensor]] = []
    if layout.in_place:
        return used, back
    wanted = [dense(p.shape, p.stride()) for p in used[0]]
    for n, s in enumerate(streams):
        mine = list(used[n])
        for k, t in enumerate(mine):
            if _lies(t, wanted[k]):
                continue
            mine[k] = torch.empty_strided(t.shape, dense(t.shape, wanted[k]), dtype=t.dtype, device=t.device)
            if s.read:
                mine[k].copy_(t)
            if s.written:
                back.append((t, mine[k]))
        used[n] = mine
    return used, back


def _lies(t: Tensor, wanted: tuple[int, ...]) -> bool:
    """Whether a kernel can work on ``t`` where it is, among tensors of such strides."""
    return alike(t.shape, t.stride(), wanted) and not (t.is_conj() or t.is_neg())


def _layouts(
    streams: Sequence[Stream], group_sizes: Sequence[int], first_index: int, split_complex: bool
) -> list[Layout]:
    lead = streams[0].tensors
    rows = [row for row, size in enumerate(group_sizes) for _ in range(size)]
    # The state's dtype is the parameter's unless some stream is fixed to float32.
    fixed = next((s.tensors for s in streams if s.dtype is not None and s.tensors), lead)
    parts: dict[Any, list[int]] = {}
    for i, (p, kept) in enumerate(zip(lead, fixed, strict=True)):
        kind = p.dtype if split_complex else _REAL.get(p.dtype, p.dtype)
        parts.setdefault((p.device, kind, _REAL.get(kept.dtype, kept.dtype)), []).append(i)
    wanted = [dense(p.shape, p.stride()) for p in lead]
    return [
        Layout(
            device, lead[members[0]].dtype, fixed[members[0]].dtype, members,
            lengths=tuple(lead[i].numel() * (2 if lead[i].is_complex() else 1) for i in members),
            rows=tuple(rows[i] for i in members),
            indices=tuple(first_index + i for i in members),
            in_place=all(_lies(s.tensors[i], wanted[i]) for s in streams if s.tensors for i in members),
        )
        for (device, *_), members in parts.items()
    ]  # fmt: skip


# --- calls ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Part:
    """The tensors of a call that one launch serves."""

    device: torch.device
    dtype: torch.dtype  # of the parameters
    state: torch.dtype  # of what is kept beside them: dtype, or float32 beside masters
    table: Table

    @property
    def chunks(self) -> int:
        return self.table.chunks

    @property
    def complex(self) -> bool:
        return self.dtype.is_complex

    @property
    def arithmetic(self) -> Any:
        """What the formulas compute in."""
        return tl.float64 if self.dtype in (torch.float64, torch.complex128) else tl.float32


def _slots(used: Sequence[Sequence[Tensor]]) -> tuple[tuple[int, ...], ...]:
    """The addresses in each list."""
    lead = tuple(map(Tensor.data_ptr, used[0]))
    absent = (0,) * len(lead)
    return tuple(
        lead if tensors is used[0] else tuple(map(Tensor.data_ptr, tensors)) if tensors else absent for tensors in used
    )


def each_part(
    known: Look, streams: Sequence[Stream], first_index: int = 0, split_complex: bool = False
) -> Iterator[Part]:
    """The parts of a call. When the next is asked for, the results of the last one that went to a dense copy are copied
    to where they belong. ``streams`` are those that were looked at, or some of them."""
    which = (streams[0].name, first_index, split_complex)
    layouts = known.layouts.get(which)
    if layouts is None:
        layouts = known.layouts[which] = _layouts(streams, known.group_sizes, first_index, split_complex)
    for layout in layouts:
        used, back = _prepare(streams, layout)
        found = tables.table(layout.device, layout.lengths, layout.rows, layout.indices, _slots(used))
        yield Part(layout.device, layout.dtype, layout.state, found)
        for original, copy in back:
            original.copy_(copy)


def update_streams(
    op: str, params: Sequence[Tensor], grads: Sequence[Tensor], backups: Sequence[Tensor],
    first_grads: Sequence[Tensor], masters: Sequence[Tensor], state: dict[str, Sequence[Tensor]],
) -> list[Stream]:  # fmt: skip
    """Parameter, where its weights are read, gradient, first gradient and what the base optimizer keeps."""
    check_length(op, "grads", grads, params)
    check_masters(op, masters, params)
    wide = torch.float32 if masters else None
    if masters:
        source = Stream("masters", masters, written=True, dtype=wide)
    else:
        source = Stream("backups", backups) if backups else Stream("params", params)
    kept = [Stream(name, tensors, written=True, dtype=wide) for name, tensors in state.items()]
    return [
        Stream("params", params, written=True, read=False), source, Stream("grads", grads),
        Stream("first_grads", first_grads), *kept,
    ]  # fmt: skip


_NEUTRAL = (
    ("grad_scale", torch.ones(1, dtype=torch.float32, device="cpu")),
    ("found_inf", torch.zeros(1, dtype=torch.float32, device="cpu")),
)


def scaling(op: str, grad_scale: Tensor | None, found_inf: Tensor | None) -> list[Tensor]:
    """Both as tensors: 1 and 0 where AMP is not in use."""
    numbers = []
    for (name, neutral), given in zip(_NEUTRAL, (grad_scale, found_inf), strict=True):
        if given is not None:
            check_numbers(op, name, given, torch.float32, 1)
        numbers.append(neutral if given is None else given)
    return numbers


# --- launches -------------------------------------------------------------------------------------------------------
# What Triton compiled, and the constants it wants again: its own way to a binary takes several times as long, for it
# asks each argument what it would compile for. Nothing but the constants decides that here, see .traversal.kernel.
_binaries: dict[Any, tuple[CompiledKernel, tuple[Any, ...]]] = {}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def run(
    function: Any, device: torch.device, programs: int, args: Sequence[Any], constants: dict[str, Any], warps: int
) -> None:
    key = (function.__name__, device, warps, *constants.values())
    known = _binaries.get(key)
    with _on(device):
        if known is not None:
            binary, fixed = known
            binary[(programs, 1, 1)](*args, *fixed)
            return
        binary = function[(programs,)](*args, **constants, **OPTIONS, num_warps=warps)
    if isinstance(binary, CompiledKernel):  # Triton's interpreter has none
        _binaries[key] = binary, tuple(constants[name] for name in function.arg_names if name in constants)


def launch(
    function: Any, where: Part | torch.device, *args: Any, wide_state: bool = False, **constants: Any
) -> None:
    """Runs a kernel with one program for each chunk of a part, or with one program on a device.

    ``wide_state``: float32 is stored beside 16-bit numbers.
    """
    if isinstance(where, torch.device):
        run(function, where, 1, args, constants, BUILT_IN.warps)
    elif where.chunks:
        types = {"T": TRITON_DTYPE[where.dtype], "STATE": TRITON_DTYPE[where.state]}
        chosen = sizes(function.__name__, where.device, types["T"], types["STATE"], wide_state)
        blocks = {"BLOCK": chosen.block, "TAIL": chosen.tail}
        table = (where.table.on_device, where.table.tensors)
        run(function, where.device, where.chunks, (*table, *args), {**types, **blocks, **constants}, chosen.warps)
