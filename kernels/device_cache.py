"""What kernels read on a device besides the tensors of a call: tables of addresses, and scalars.

Both are copied without waiting, and only if they are not there yet: what recent calls used is kept.
"""

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .multi_tensor_apply import CHUNK

_ALIGNMENT = 16
_ROOM = 8 << 20  # bytes set aside for captures: a table needs 8 per chunk, and a few more per tensor
_MOST_KEPT = 64  # tables on devices, and sets of scalars; a training step uses about three of each


_tables: OrderedDict[Any, Tensor] = OrderedDict()
_scalars: OrderedDict[Any, list[Tensor]] = OrderedDict()
_captured: list[Any] = []  # what a CUDA graph reads at every replay must never be freed
_spare: list[Tensor] = []  # pinned memory for captures, during which nothing should be allocated


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    """The current one, as a number."""
    return 0 if device.type == "cpu" else torch.get_device_module(device).current_stream(device).stream_id


def _upload(host: Tensor, device: torch.device) -> Tensor:
    """Starts a copy without waiting for it; torch keeps the pinned memory alive until it is done."""
    if device.type == "cpu":
        return host
    capturing = _capturing(device)
    if not capturing and (not _spare or _spare[0].numel() < _ROOM // 2):
        _spare[:] = [torch.empty(_ROOM, dtype=torch.uint8, device="cpu", pin_memory=True)]
    if capturing and _spare and _spare[0].numel() >= host.nbytes:
        mine, _spare[0] = _spare[0][: host.nbytes], _spare[0][host.nbytes :]
        pinned = mine.view(host.dtype).copy_(host)
    else:
        pinned = host.pin_memory()
    if capturing:
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


def _remembered(kept: OrderedDict[Any, Any], device: torch.device, what: Any, make: Callable[[], Any]) -> Any:
    """What an earlier call made of the same on the same stream, or a new one: another stream would not wait for the
    copy."""
    key = (device, stream_of(device), what)
    found = kept.get(key)
    if found is not None:
        kept.move_to_end(key)
        if _capturing(device):
            _captured.append(found)
        return found
    made = make()
    if not _capturing(device):  # otherwise it is in the graph's own memory
        kept[key] = made
        if len(kept) > _MOST_KEPT:
            kept.popitem(last=False)
    return made


# --- addresses ------------------------------------------------------------------------------------------------------
def make_table(
    lengths: Sequence[int], rows: Sequence[int], indices: Sequence[int], slots: Sequence[Any],
    shards: Sequence[Any] = (),
) -> Tensor:  # fmt: skip
    """One record per tensor, then the index of its tensor for every chunk; see .multi_tensor_apply."""
    length, row, index, addresses = (torch.tensor(x, device="cpu") for x in (lengths, rows, indices, slots))
    chunks = (length + (CHUNK.value - 1)) // CHUNK.value
    aligned = (addresses % _ALIGNMENT == 0).all(0)
    header = (length, length * aligned, row, index, chunks.cumsum(0) - chunks)
    places = torch.tensor(shards, device="cpu").unbind(1) if shards else ()
    records = torch.stack([*header, *addresses, *places], 1).flatten()
    return torch.cat([records, torch.arange(len(lengths), device="cpu").repeat_interleave(chunks)])


def table(device: torch.device, lengths: tuple[int, ...], rows: tuple[int, ...], indices: tuple[int, ...],
          slots: tuple[tuple[int, ...], ...], shards: tuple[tuple[int, ...], ...] = ()) -> Tensor:  # fmt: skip
    """The table of these addresses on the device."""
    return _remembered(
        _tables, device, (lengths, rows, indices, slots, shards),
        lambda: _upload(make_table(lengths, rows, indices, slots, shards), device),
    )  # fmt: skip


# --- scalars --------------------------------------------------------------------------------------------------------
def _bits(scalars: Tensor) -> bytes:
    """Of a contiguous CPU tensor, padded to a multiple of 8 bytes."""
    return ctypes.string_at(scalars.data_ptr(), scalars.nbytes) + bytes(-scalars.nbytes % 8)


def _send(device: torch.device, scalars: Sequence[Tensor]) -> list[Tensor]:
    """In one copy, unless the same values are on the device already."""
    bits = [_bits(s) for s in scalars]

    def make() -> list[Tensor]:
        packed = torch.frombuffer(bytearray(b"".join(bits) or bytes(8)), dtype=torch.uint8)
        sent, ends = _upload(packed, device), accumulate(map(len, bits))
        return [sent[end - len(b) :][: s.nbytes].view(s.dtype) for end, b, s in zip(ends, bits, scalars, strict=True)]

    return _remembered(_scalars, device, (*(s.dtype for s in scalars), *bits), make)


def on_device(device: torch.device, *scalars: Tensor) -> list[Tensor]:
    """Contiguous ``scalars`` as flat tensors on ``device``. They may be shared between calls: never write to them."""
    if device.type == "cpu":
        return list(scalars)
    host = [s for s in scalars if s.device.type == "cpu"]
    sent = iter(_send(device, host) if host else ())
    return [next(sent) if s.device.type == "cpu" else s.to(device, non_blocking=True) for s in scalars]
