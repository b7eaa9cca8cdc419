"""Checks of a call's arguments: whatever would be read or written out of bounds raises here.

The first list of a call leads: every other list has a tensor of the same shape and device for each of its tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
TRITON_DTYPE = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
    torch.complex64: tl.float32, torch.complex128: tl.float64,
}  # fmt: skip
STATS = 6  # numbers that grad_norm leaves behind, see rst_fused._schemas
KEPT = "kept"  # dtype of masters among which a parameter that has none stands for it


# --- lists and scalars ----------------------------------------------------------------------------------------------
def require(condition: bool, op: str, complaint: str) -> None:
    if not condition:
        raise RuntimeError(f"rst_fused::{op}: {complaint}")


def check_scalars(
    op: str, name: str, given: Tensor, dtype: torch.dtype, least: int, on: torch.device | None = None
) -> None:
    """At least ``least`` of them. They may be on the CPU or on a device, unless ``on`` says where they must be."""
    if given.dtype != dtype or not given.is_contiguous() or (on is not None and given.device.type != on.type):
        where, got = "" if on is None else f" on {on.type}", f"got {given.dtype} on {given.device}"
        raise RuntimeError(f"rst_fused::{op}: {name} must be a contiguous tensor of dtype {dtype}{where}, {got}")
    require(given.numel() >= least, op, f"{name} has {given.numel()} elements, expected at least {least}")


def runs_on(op: str, name: str, given: Tensor) -> None:
    require(
        given.device.type != "cpu" or triton.knobs.runtime.interpret, op,
        f"{name} is on the CPU, where Triton does not run: move the tensors to a GPU, or use backend='cpu'",
    )  # fmt: skip


def _check_groups(op: str, group_sizes: Sequence[int], count: int) -> None:
    require(all(size >= 0 for size in group_sizes), op, f"group_sizes holds {group_sizes}, expected counts >= 0")
    total = sum(group_sizes)
    require(total == count, op, f"group_sizes sum to {total}, expected the number of parameters, {count}")


def are_shards(shards: Sequence[int], count: int) -> bool:
    """Whether these are offset, run and stride of so many tensors, or none for whole ones."""
    return not shards or (len(shards) == 3 * count and min(shards) >= 0)


def check_places(op: str, count: int, indices: Sequence[int], shards: Sequence[int]) -> None:
    """The places of so many parameters among all, and of their elements in whole tensors."""
    require(
        not indices or (len(indices) == count and min(indices) >= 0 and max(indices) < 2**31), op,
        f"indices has {len(indices)} numbers, expected none, or a number from 0 to 2^31 - 1 for each of {count} "
        "parameters",
    )  # fmt: skip
    require(
        are_shards(shards, count), op,
        f"shards has {len(shards)} numbers, expected none, or three numbers >= 0 for each of {count} parameters",
    )  # fmt: skip


def are_remainders(masters: Sequence[Tensor]) -> bool:
    """Whether masters are what bfloat16 parameters lack to be float32, rather than copies: all of a call are alike."""
    return len(masters) > 0 and masters[0].dtype == torch.int16


# --- memory layout --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Operand:
    """One list of a call. ``optional``: it may be absent, that is empty. ``dtype``: None for the parameter's own."""

    name: str
    tensors: Sequence[Tensor]
    written: bool = False
    read: bool = True
    dtype: torch.dtype | str | None = None
    optional: bool = False
    rounded: bool = False  # may be bfloat16 where float32 is expected, and is rounded stochastically then


def _order(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """The dimensions from the outermost inwards."""
    return sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: -stride[d])


@lru_cache(maxsize=4096)
def dense(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides without gaps, with the dimensions in the same order; those of dimensions of size 1 stay as they are."""
    out, step = list(stride), 1
    for d in reversed(_order(shape, stride)):
        out[d], step = step, step * shape[d]
    return tuple(out)


@lru_cache(maxsize=4096)
def overlaps(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """True if two indices may reach the same element."""
    if 0 in shape:
        return False
    reached = 0
    for d in reversed(_order(shape, stride)):
        if stride[d] <= reached:
            return True
        reached += (shape[d] - 1) * stride[d]
    return False


_facts = attrgetter("dtype", "shape", "device", "layout")


def _check_operand(op: str, operand: Operand, lead: Sequence[Tensor], facts: Sequence[Any]) -> None:
    count = len(operand.tensors)
    require(count == len(lead), op, f"{operand.name} has {count} entries, expected {len(lead)}, one per parameter")
    own_facts = list(map(_facts, operand.tensors))
    if operand.dtype is not None or own_facts != facts:
        for i, ((dtype, shape, device, layout), (own, *like)) in enumerate(zip(own_facts, facts, strict=True)):
            expected = own if operand.dtype is None else operand.dtype
            if operand.dtype == KEPT:
                expected = own if dtype == own else dtype if dtype == torch.int16 else torch.float32
            require(
                operand.name != "masters" or (operand.dtype == KEPT and expected == own) or own in SIXTEEN_BIT, op,
                f"masters go with bfloat16 and float16 parameters, but parameter {i} has dtype {own}",
            )  # fmt: skip
            require(
                expected != torch.int16 or own == torch.bfloat16, op,
                f"int16 masters, which are remainders, go with bfloat16 parameters, but parameter {i} has dtype {own}",
            )  # fmt: skip
            if operand.rounded and (dtype, expected) == (torch.bfloat16, torch.float32):
                expected = dtype
            if dtype != expected or [device, layout] != like[1:]:
                raise RuntimeError(
                    f"rst_fused::{op}: {operand.name}[{i}] is {layout} of dtype {dtype} on {device}, expected "
                    f"{expected} on {like[1]}"
                )
            require(shape == like[0], op, f"{operand.name}[{i}] does not have the shape of the parameter")
    for i, t in enumerate(operand.tensors if operand.written else ()):
        if overlaps(t.shape, t.stride()):
            raise RuntimeError(
                f"rst_fused::{op}: {operand.name}[{i}] is written, but several of its elements share memory (an "
                "expanded tensor?); clone it first"
            )


def check_lists(op: str, operands: Sequence[Operand], group_sizes: Sequence[int]) -> None:
    """Raises for whatever would be read or written out of bounds. The first operand leads."""
    lead = operands[0].tensors
    _check_groups(op, group_sizes, len(lead))
    facts = list(map(_facts, lead))
    for i, (dtype, _, _, layout) in enumerate(facts):
        if dtype not in TRITON_DTYPE or layout != torch.strided:
            raise RuntimeError(
                f"rst_fused::{op}: {operands[0].name}[{i}] is {layout} of dtype {dtype}, which no kernel serves"
            )
    for operand in operands:
        if operand.tensors or not operand.optional:
            _check_operand(op, operand, lead, facts)
