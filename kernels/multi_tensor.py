"""The host's side of the traversal: lists of tensors are checked, grouped by dtype and device, and turned into tables.

Tensors that do not lie alike in memory pass through dense copies, in the order of the parameter's strides.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .traversal import CHUNK, HEADER

_ALIGNMENT = 16
_WARPS = 4
_BLOCK = 8 * 32 * _WARPS  # scalars at a time: 8 for each thread, in 16-byte accesses
_TAIL = 32 * _WARPS  # with masks
# Without fusion a * b + c rounds twice unless the formula says fma.
OPTIONS = {"num_warps": _WARPS, "enable_fp_fusion": False}
_ROOM = 8 << 20  # bytes that captures may take: a table needs 8 for every chunk, and some for every tensor
_TABLES = 64  # tables kept on devices; a training step uses about three

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
_TRITON_DTYPE = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
    torch.complex64: tl.float32, torch.complex128: tl.float64,
}  # fmt: skip
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
KEPT = "kept"  # dtype of weights: the parameter's, or float32 where they are the masters of a 16-bit one


# --- checks ---------------------------------------------------------------------------------------------------------
def _require(condition: bool, op: str, complaint: str) -> None:
    if not condition:
        raise RuntimeError(f"rst_fused::{op}: {complaint}")


def check_length(op: str, name: str, given: Sequence[Tensor], lead: Sequence[Tensor]) -> None:
    _require(
        len(given) == len(lead), op, f"{name} has {len(given)} entries, expected {len(lead)}, one per parameter"
    )


def check_masters(op: str, masters: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    for i, p in enumerate(params if masters else ()):
        _require(
            p.dtype in SIXTEEN_BIT, op,
            f"masters go with bfloat16 and float16 parameters, but parameter {i} has dtype {p.dtype}",
        )  # fmt: skip


def check_numbers(
    op: str, name: str, given: Tensor, dtype: torch.dtype, least: int, on: torch.device | None = None
) -> None:
    """``given`` may be on the CPU or on a device; ``on``: where it has to be."""
    good = given.dtype == dtype and given.is_contiguous() and (on is None or given.device.type == on.type)
    where = "" if on is None else f" on {on.type}"
    got = f"got {given.dtype} on {given.device}"
    _require(good, op, f"{name} must be a contiguous tensor of dtype {dtype}{where}, {got}")
    _require(given.numel() >= least, op, f"{name} has {given.numel()} elements, expected at least {least}")


def runs_on(op: str, name: str, given: Tensor) -> None:
    _require(
        given.device.type != "cpu" or triton.knobs.runtime.interpret, op,
        f"{name} is on the CPU, where Triton does not run: move the tensors to a GPU, or use backend='cpu'",
    )  # fmt: skip


def _check_rows(op: str, group_sizes: Sequence[int], count: int) -> None:
    _require(all(size >= 0 for size in group_sizes), op, f"group_sizes holds {group_sizes}, expected counts >= 0")
    total = sum(group_sizes)
    _require(total == count, op, f"group_sizes sum to {total}, expected the number of parameters, {count}")


# --- how tensors lie ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stream:
    """One list of a call. Empty: absent. ``dtype``: None for the parameter's own."""

    name: str
    tensors: Sequence[Tensor]
    written: bool = False
    read: bool = True
    dtype: torch.dtype | str | None = None


def _order(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """The dimensions from the outermost inwards."""
    return sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: -stride[d])


@lru_cache(maxsize=4096)
def _dense(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides without gaps in the same order of dimensions; those of dimensions of size 1 stay."""
    out, step = list(stride), 1
    for d in reversed(_order(shape, stride)):
        out[d], step = step, step * shape[d]
    return tuple(out)


def _alike(shape: torch.Size, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(x == y or size == 1 for size, x, y in zip(shape, a, b, strict=True)) or 0 in shape


def _overlaps(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """True if two indices may reach the same element."""
    if 0 in shape:
        return False
    reached = 0
    for d in reversed(_order(shape, stride)):
        if stride[d] <= reached:
            return True
        reached += (shape[d] - 1) * stride[d]
    return False


@lru_cache(maxsize=4096)
def _writable(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    return not _overlaps(shape, stride)


_facts = attrgetter("dtype", "shape", "device", "layout")


def _check_stream(op: str, s: Stream, lead: Sequence[Tensor], facts: Sequence[Any]) -> None:
    """Whatever would be read or written out of bounds raises."""
    check_length(op, s.name, s.tensors, lead)
    theirs = list(map(_facts, s.tensors))
    if s.dtype is not None or theirs != facts:
        for i, ((dtype, shape, device, layout), (own, *like)) in enumerate(zip(theirs, facts, strict=True)):
            expected = own if s.dtype is None else s.dtype
            if s.dtype == KEPT:
                expected = torch.float32 if dtype == torch.float32 and own in SIXTEEN_BIT else own
            if dtype != expected or [device, layout] != like[1:]:
                raise RuntimeError(
                    f"rst_fused::{op}: {s.name}[{i}] is {layout} of dtype {dtype} on {device}, expected {expected} on "
                    f"{like[1]}"
                )
            _require(shape == like[0], op, f"{s.name}[{i}] does not have the shape of the parameter")
    for i, t in enumerate(s.tensors if s.written else ()):
        if not _writable(t.shape, t.stride()):
            raise RuntimeError(
                f"rst_fused::{op}: {s.name}[{i}] is written, but several of its elements share memory (an expanded "
                "tensor?); clone it first"
            )


# --- tables ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Table:
    on_device: Tensor
    tensors: int
    chunks: int


_tables: OrderedDict[Any, Table] = OrderedDict()
_captured: list[Any] = []  # what a CUDA graph reads at every replay must never be freed
_spare: list[Tensor] = []  # pinned memory for captures, during which none should be allocated


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return 0 if device.type == "cpu" else torch.get_device_module(device).current_stream(device).stream_id


def _upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for; torch keeps the pinned memory until it is done."""
    if device.type == "cpu":
        return host
    if not _capturing(device):
        if not _spare or _spare[0].numel() < _ROOM // 2:
            _spare[:] = [torch.empty(_ROOM, dtype=torch.uint8, pin_memory=True)]
        pinned = host.pin_memory()
    else:
        if _spare and _spare[0].numel() >= host.nbytes:
            mine, _spare[0] = _spare[0][: host.nbytes], _spare[0][host.nbytes :]
            pinned = mine.view(host.dtype).copy_(host)
        else:
            pinned = host.pin_memory()
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


def _make_table(lengths: Sequence[int], rows: Sequence[int], indices: Sequence[int], slots: Sequence[Any]) -> Tensor:
    first, records, counts = 0, [], []
    for length, row, index, *addresses in zip(lengths, rows, indices, *slots, strict=True):
        aligned = not any(a % _ALIGNMENT for a in addresses)
        records += [length, length if aligned else 0, row, index, first, *addresses]
        counts.append(-(-length // CHUNK.value))
        first += counts[-1]
    return torch.cat([torch.tensor(records), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))])


def _table(device: torch.device, lengths: tuple[int, ...], rows: tuple[int, ...], indices: tuple[int, ...],
           slots: tuple[tuple[int, ...], ...]) -> Table:  # fmt: skip
    """The one of an earlier call with these addresses, or a new one. Another stream would not wait for its copy."""
    key = (device, _stream(device), lengths, rows, indices, slots)
    found = _tables.get(key)
    if found is None:
        host = _make_table(lengths, rows, indices, slots)
        chunks = host.numel() - len(lengths) * (HEADER.value + len(slots))
        found = Table(_upload(host, device), len(lengths), chunks)
        if _capturing(device):  # what this copy leaves lies in the graph's own memory
            return found
        _tables[key] = found
        if len(_tables) > _TABLES:
            _tables.popitem(last=False)
    elif _capturing(device):
        _captured.append(found)
    _tables.move_to_end(key)
    return found


def on_device(device: torch.device, *numbers: Tensor) -> list[Tensor]:
    """``numbers`` on ``device``; those on the CPU travel together, in one copy."""
    if device.type == "cpu":
        return list(numbers)
    travelling = [n for n in numbers if n.device.type == "cpu"]
    sizes = [-(-n.nbytes // 8) * 8 for n in travelling]
    packed = torch.zeros(sum(sizes), dtype=torch.uint8)
    for slot, n in zip(packed.split(sizes), travelling, strict=True):
        slot[: n.nbytes].copy_(n.reshape(-1).view(torch.uint8))
    arrived = iter(_upload(packed, device).split(sizes) if travelling else ())
    return [
        next(arrived)[: n.nbytes].view(n.dtype) if n.device.type == "cpu" else n.to(device, non_blocking=True)
        for n in numbers
    ]


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


def _prepare(
    streams: Sequence[Stream], indices: Sequence[int]
) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """The dense tensors to work on, all lying like the parameter, and (original, copy) of those to write back."""
    lead = [streams[0].tensors[i] for i in indices]
    wanted = [_dense(p.shape, p.stride()) for p in lead]
    used, back = [], []
    for s in streams:
        mine = [s.tensors[i] for i in indices] if s.tensors else []
        strides = [t.stride() for t in mine]
        lazy = any(map(Tensor.is_conj, mine)) or any(map(Tensor.is_neg, mine))
        for k, t in enumerate(mine if strides != wanted or lazy else ()):
            if _alike(t.shape, strides[k], wanted[k]) and not (t.is_conj() or t.is_neg()):
                continue
            mine[k] = torch.empty_strided(t.shape, _dense(t.shape, wanted[k]), dtype=t.dtype, device=t.device)
            if s.read:
                mine[k].copy_(t)
            if s.written:
                back.append((t, mine[k]))
        used.append(mine)
    return used, back


def check_lists(op: str, streams: Sequence[Stream], group_sizes: Sequence[int]) -> None:
    """Raises for whatever would be read or written out of bounds. The first stream leads."""
    lead = streams[0].tensors
    _check_rows(op, group_sizes, len(lead))
    if lead:
        runs_on(op, f"{streams[0].name}[0]", lead[0])
    facts = list(map(_facts, lead))
    for i, (dtype, _, _, layout) in enumerate(facts):
        if dtype not in _TRITON_DTYPE or layout != torch.strided:
            raise RuntimeError(
                f"rst_fused::{op}: {streams[0].name}[{i}] is {layout} of dtype {dtype}, which no kernel serves"
            )
    for s in streams:
        if s.tensors:
            _check_stream(op, s, lead, facts)


def each_part(
    streams: Sequence[Stream], group_sizes: Sequence[int], first_index: int = 0, split_complex: bool = False
) -> Iterator[Part]:
    """The parts of a call. When the next is asked for, the results of the last one that went to a dense copy are copied
    to where they belong."""
    lead = streams[0].tensors
    rows = [row for row, size in enumerate(group_sizes) for _ in range(size)]
    # The state's dtype is the parameter's unless some stream is fixed to float32.
    fixed = next((s.tensors for s in streams if s.dtype is not None and s.tensors), lead)
    parts: dict[Any, list[int]] = {}
    for i, (p, kept) in enumerate(zip(lead, fixed, strict=True)):
        kind = p.dtype if split_complex else _REAL.get(p.dtype, p.dtype)
        parts.setdefault((p.device, kind, _REAL.get(kept.dtype, kept.dtype)), []).append(i)
    for (device, *_), members in parts.items():
        used, back = _prepare(streams, members)
        first = lead[members[0]]
        absent = (0,) * len(members)
        table = _table(
            device,
            tuple(p.numel() * (2 if p.is_complex() else 1) for p in used[0]),
            tuple(rows[i] for i in members),
            tuple(first_index + i for i in members),
            tuple(tuple(map(Tensor.data_ptr, tensors)) if tensors else absent for tensors in used),
        )
        yield Part(device, first.dtype, fixed[members[0]].dtype, table)
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


def scaling(op: str, grad_scale: Tensor | None, found_inf: Tensor | None) -> list[Tensor]:
    """Both as tensors: 1 and 0 where AMP is not in use."""
    numbers = []
    for name, given, neutral in (("grad_scale", grad_scale, 1.0), ("found_inf", found_inf, 0.0)):
        numbers.append(torch.tensor([neutral]) if given is None else given)
        check_numbers(op, name, numbers[-1], torch.float32, 1)
    return numbers


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def run(function: Any, device: torch.device, programs: int, args: Sequence[Any], constants: dict[str, Any]) -> None:
    with _on(device):
        function[(programs,)](*args, **constants, **OPTIONS)


def launch(
    function: Any, where: Part | torch.device, *args: Any, wide_state: bool = False, **constants: Any
) -> None:
    """Runs a kernel with one program for each chunk of a part, or with one program on a device.

    ``wide_state``: float32 is stored beside 16-bit numbers. With 8 scalars for each thread its 16-byte stores would
    leave gaps, and Triton would have threads exchange numbers to close them; 4 need none.
    """
    if isinstance(where, torch.device):
        run(function, where, 1, args, constants)
    elif where.chunks:
        types = {"T": _TRITON_DTYPE[where.dtype], "STATE": _TRITON_DTYPE[where.state]}
        blocks = {"BLOCK": _BLOCK // 2 if wide_state else _BLOCK, "TAIL": _TAIL}
        table = (where.table.on_device, where.table.tensors)
        run(function, where.device, where.chunks, (*table, *args), {**types, **blocks, **constants})
