"""The arguments of rst_fused.ops, as the ops take them, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from rst_fused._backends import backend_for, backend_named
from rst_fused._checks import DTYPES, SIXTEEN_BIT, are_copies, as_integer, check_number, first_overlap

Number = float | Tensor | Sequence[float | Tensor]
Tensors = Sequence[Tensor]
_CPU = torch.device("cpu")


def ops_for(backend: str, tensors: Tensors, otherwise: torch.device = _CPU) -> Any:
    """Of the backend for these tensors. Without any, there is nothing to do, and any will do it."""
    if tensors:
        return backend_for(backend, tensors[0].device).ops
    if backend != "auto":
        backend_named(backend)  # it must exist all the same
    return backend_for("auto", otherwise).ops


def needed(name: str, tensors: Tensors | None) -> list[Tensor]:
    if tensors is None:
        raise ValueError(f"{name}=None: expected one tensor per parameter")
    return listed(name, tensors)


def listed(name: str, tensors: Tensors | None) -> list[Tensor]:
    if tensors is None:
        return []
    if isinstance(tensors, Tensor) or not hasattr(tensors, "__len__"):  # its rows, or what can be read only once
        raise TypeError(f"{name} is a {type(tensors).__name__}: expected a list of tensors")
    return list(tensors)


def check_lists(
    lead_name: str, lead: Tensors, like: Mapping[str, Tensors], masters: Tensors, state: Mapping[str, Tensors],
    required: Sequence[str], rounded: str = "",
) -> None:  # fmt: skip
    """``like``: as the parameter; ``masters``: float32, or int16 beside bfloat16; ``state``: float32 beside masters,
    else as the parameter; the list ``rounded`` of it may be bfloat16 in the place of float32.

    A list may be empty unless it is in ``required``.
    """
    companions = {**like, **state, "masters": masters}
    for name, tensors in {lead_name: lead, **companions}.items():
        for i, t in enumerate(needed(name, tensors)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}[{i}] is {type(t).__name__}: expected a tensor")
    remainders = len(masters) > 0 and not are_copies(masters)
    for i, p in enumerate(lead):
        if p.layout != torch.strided or p.dtype not in DTYPES:
            raise ValueError(f"{lead_name}[{i}] is {p.layout} of {p.dtype}: expected a dense tensor of {DTYPES}")
        if masters and p.dtype not in SIXTEEN_BIT:
            raise ValueError(f"masters given, but {lead_name}[{i}] is {p.dtype}: masters go with bfloat16 and float16")
        if remainders and p.dtype != torch.bfloat16:
            raise ValueError(f"masters are int16, but {lead_name}[{i}] is {p.dtype}: remainders go with bfloat16")
    for name, tensors in companions.items():
        fp32 = name == "masters" or (bool(masters) and name in state)
        kept = torch.int16 if name == "masters" and remainders else torch.float32 if fp32 else None
        if len(tensors) != len(lead) and (tensors or name in required):
            raise ValueError(f"{name} has {len(tensors)} tensors, expected {len(lead)}, one for each of {lead_name}")
        for i, (t, p) in enumerate(zip(tensors, lead, strict=False)):
            dtype = p.dtype if kept is None else kept
            if name == rounded and t.dtype == torch.bfloat16 and dtype == torch.float32:
                dtype = torch.bfloat16
            if t.layout != torch.strided or t.shape != p.shape or t.dtype != dtype or t.device != p.device:
                raise ValueError(
                    f"{name}[{i}] is {tuple(t.shape)} {t.dtype} {t.layout} on {t.device}, expected "
                    f"{tuple(p.shape)} {dtype} {torch.strided} on {p.device} as {lead_name}[{i}]"
                )


def check_apart(**lists: Tensors) -> None:
    """The lists that an op writes. Under torch.compile tensors have no addresses yet."""
    shared = None if is_compiling() else first_overlap([t for ts in lists.values() for t in ts])
    if shared is not None:
        names = [f"{name}[{i}]" for name, tensors in lists.items() for i in range(len(tensors))]
        one, other = (names[i] for i in shared)
        raise ValueError(f"{one} and {other} share memory, and both are written: expected separate tensors")


def sizes_of(params: Tensors, group_sizes: Sequence[int] | None) -> list[int]:
    sizes = [len(params)] if group_sizes is None else list(group_sizes)
    if any(size < 0 for size in sizes) or sum(sizes) != len(params):
        raise ValueError(f"group_sizes={sizes}: expected counts >= 0 with the sum {len(params)}, one per parameter")
    return sizes


def shard_numbers(params: Tensors, shards: Sequence[Sequence[int]] | None) -> list[int]:
    """The numbers of all shards, one after another."""
    given = [list(shard) for shard in shards or ()]
    if shards is not None and [len(shard) for shard in given] != [3] * len(params):
        raise ValueError(f"shards={shards!r}: expected (offset, run, stride) for each of {len(params)} parameters")
    return [as_integer(f"shards[{i}]", number, 0, 2**62) for i, shard in enumerate(given) for number in shard]


def rounding(
    params: Tensors, rng: Sequence[int] | None, indices: Sequence[int] | None, shards: Sequence[Sequence[int]] | None
) -> tuple[Tensor | None, list[int], list[int]]:
    """The last arguments of an update."""
    places = [as_integer(f"indices[{i}]", index, 0, 2**31 - 1) for i, index in enumerate(indices or ())]
    if indices is not None and len(places) != len(params):
        raise ValueError(f"indices has {len(places)} numbers, expected {len(params)}, one for each of params")
    if rng is not None and (isinstance(rng, str) or not hasattr(rng, "__len__") or len(rng) != 2):
        raise ValueError(f"rng={rng!r}: expected (seed, step), or None")
    given = None
    if rng is not None:
        counters = [as_integer(f"rng[{i}]", number, 0, 2**63 - 1) for i, number in enumerate(rng)]
        given = torch.tensor(counters, dtype=torch.int64, device="cpu")
    return given, places, shard_numbers(params, shards)


def each(value: Number) -> list[float | Tensor]:
    return list(value) if isinstance(value, Sequence) else [value]


def check_numbers(name: str, value: Number, low: float = -math.inf) -> None:
    """Finite and >= low. One-element tensors pass: they may be on a GPU, and nobody waits for their value."""
    if not is_compiling():
        for x in each(value):
            if not (isinstance(x, Tensor) and x.numel() == 1):
                check_number(name, x, low)


def rows_of(sizes: list[int], **columns: Number) -> Tensor:
    """float64 of shape (groups, columns); on a GPU if one of the numbers is there."""
    every = [x for value in columns.values() for x in each(value)]
    device = next((x.device for x in every if isinstance(x, Tensor) and not x.is_cpu), torch.device("cpu"))
    rows: list[Tensor] = []
    for name, value in columns.items():
        given = each(value)
        if len(given) not in (1, len(sizes)):
            raise ValueError(f"{name}={value!r} has {len(given)} values, expected 1 or {len(sizes)}, one per group")
        check_numbers(name, value)
        numbers = [torch.as_tensor(x, dtype=torch.float64, device=device).reshape(()) for x in given]
        rows.append(torch.stack(numbers).expand(len(sizes)))
    return torch.stack(rows, dim=1).contiguous()
