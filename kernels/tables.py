"""What lies on a device for the kernels of a call: tables of addresses, and small numbers.

Both are sent without waiting, and only when they are not there yet: what the last calls used is kept.
"""

import ctypes
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .traversal import CHUNK, HEADER

_ALIGNMENT = 16
_ROOM = 8 << 20  # bytes that captures may take: a table needs 8 for every chunk, and some for every tensor
_TABLES = 64  # tables kept on devices; a training step uses about three
_NUMBERS = 64  # sets of numbers kept on devices; a training step uses about three


@dataclass(frozen=True)
class Table:
    on_device: Tensor
    tensors: int
    chunks: int


_tables: OrderedDict[Any, Table] = OrderedDict()
_numbers: OrderedDict[Any, list[Tensor]] = OrderedDict()
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
            _spare[:] = [torch.empty(_ROOM, dtype=torch.uint8, device="cpu", pin_memory=True)]
        pinned = host.pin_memory()
    else:
        if _spare and _spare[0].numel() >= host.nbytes:
            mine, _spare[0] = _spare[0][: host.nbytes], _spare[0][host.nbytes :]
            pinned = mine.view(host.dtype).copy_(host)
        else:
            pinned = host.pin_memory()
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


def _keep(kept: OrderedDict[Any, Any], most: int, device: torch.device, key: Any, made: Any) -> None:
    if _capturing(device):  # what was just copied lies in the graph's own memory
        return
    kept[key] = made
    if len(kept) > most:
        kept.popitem(last=False)


def _find(kept: OrderedDict[Any, Any], device: torch.device, key: Any) -> Any:
    found = kept.get(key)
    if found is not None:
        kept.move_to_end(key)
        if _capturing(device):
            _captured.append(found)
    return found


# --- addresses ------------------------------------------------------------------------------------------------------
def make_table(lengths: Sequence[int], rows: Sequence[int], indices: Sequence[int], slots: Sequence[Any]) -> Tensor:
    """One record for each tensor, then for each chunk the number of its tensor; see .traversal."""
    length, row, index, addresses = (torch.tensor(x, device="cpu") for x in (lengths, rows, indices, slots))
    chunks = (length + (CHUNK.value - 1)) // CHUNK.value
    aligned = (addresses % _ALIGNMENT == 0).all(0)
    header = (length, length * aligned, row, index, chunks.cumsum(0) - chunks)
    records = torch.stack([*header, *addresses], 1).flatten()
    return torch.cat([records, torch.arange(len(lengths), device="cpu").repeat_interleave(chunks)])


def table(device: torch.device, lengths: tuple[int, ...], rows: tuple[int, ...], indices: tuple[int, ...],
          slots: tuple[tuple[int, ...], ...]) -> Table:  # fmt: skip
    """The one of an earlier call with these addresses, or a new one. Another stream would not wait for its copy."""
    key = (device, _stream(device), lengths, rows, indices, slots)
    found = _find(_tables, device, key)
    if found is None:
        host = make_table(lengths, rows, indices, slots)
        chunks = host.numel() - len(lengths) * (HEADER.value + len(slots))
        found = Table(_upload(host, device), len(lengths), chunks)
        _keep(_tables, _TABLES, device, key, found)
    return found


# --- numbers --------------------------------------------------------------------------------------------------------
def _bits(number: Tensor) -> bytes:
    """Of a contiguous tensor on the CPU, filled up to a multiple of 8."""
    return ctypes.string_at(number.data_ptr(), number.nbytes) + bytes(-number.nbytes % 8)


def _send(device: torch.device, numbers: Sequence[Tensor]) -> list[Tensor]:
    """In one copy, unless the same numbers are there already."""
    bits = [_bits(n) for n in numbers]
    key = (device, _stream(device), *(n.dtype for n in numbers), *bits)
    found = _find(_numbers, device, key)
    if found is None:
        packed = torch.frombuffer(bytearray(b"".join(bits) or bytes(8)), dtype=torch.uint8)
        there = _upload(packed, device)
        ends = accumulate(map(len, bits))
        found = [
            there[end - len(b) :][: n.nbytes].view(n.dtype) for end, b, n in zip(ends, bits, numbers, strict=True)
        ]
        _keep(_numbers, _NUMBERS, device, key, found)
    return found


def on_device(device: torch.device, *numbers: Tensor) -> list[Tensor]:
    """``numbers``, which are contiguous, as flat tensors on ``device``: to be read there, and never written."""
    if device.type == "cpu":
        return list(numbers)
    travelling = [n for n in numbers if n.device.type == "cpu"]
    arrived = iter(_send(device, travelling) if travelling else ())
    return [next(arrived) if n.device.type == "cpu" else n.to(device, non_blocking=True) for n in numbers]
