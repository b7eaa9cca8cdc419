"""Checks of arguments: each raises an error naming the argument; those called as_ return a plain value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from operator import index
from typing import Any

import torch

PLAIN = (torch.Tensor, torch.nn.Parameter)
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *SIXTEEN_BIT, torch.complex64, torch.complex128)


def are_copies(masters: Sequence[Any]) -> bool:
    """Whether masters, all of them alike, take the place of backups: int16 ones are what bfloat16 parameters lack."""
    return len(masters) > 0 and getattr(masters[0], "dtype", None) != torch.int16


def as_integer(name: str, value: Any, low: int, high: float = math.inf) -> int:
    """``value`` as an int from low to high. Takes numpy's integers; refuses bool and every float."""
    if type(value) is int and low <= value <= high:
        return value
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        limit = f"an integer >= {low}" if high == math.inf else f"an integer from {low} to {high}"
        raise ValueError(f"{name}={value!r}: expected {limit}")
    return number


def as_real(name: str, value: Any, low: float, high: float) -> float:
    """``value`` as a float from low to high, so not NaN. Takes any ``numbers.Real``; refuses bool."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
        raise ValueError(f"{name}={value!r}: expected a number in [{low:g}, {high:g}]")
    return float(value)


def check_number(name: str, value: Any, low: float, high: float | None = None) -> None:
    """Raises unless ``value`` (a number or one-element tensor) is finite and lies in [low, high)."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            given = f"a tensor of shape {tuple(value.shape)}"
            raise ValueError(f"{name} is {given}: expected a number or a one-element tensor")
        is_number = value.dtype != torch.bool and not value.is_complex()
    if not is_number:
        raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}")
    number = float(value)
    if not low <= number or (high is not None and not number < high) or not math.isfinite(number):
        limits = "a finite number" if low == -math.inf else f"a finite number >= {low}"
        limits = limits if high is None else f"a number in [{low}, {high})"
        raise ValueError(f"{name}={value!r}: expected {limits}")


def as_flag(name: str, value: Any) -> bool:
    """``value`` as a bool. Takes what equals one, such as numpy's; refuses strings and all else that has a truth."""
    try:
        known = value in (False, True)
    except (ValueError, RuntimeError):  # arrays and tensors of several elements
        known = False
    if not known:
        raise ValueError(f"{name}={value!r}: expected True or False")
    return bool(value)


def required_params(params: Iterable[Any] | None) -> Iterable[Any]:
    """``params`` unless it is None; raises TypeError then."""
    if params is None:
        raise TypeError("params=None: expected parameters, unless base is an optimizer instance that holds them")
    return params


def address_of(t: torch.Tensor) -> int:
    """Of its first element; 0 where it has no memory of its own."""
    try:
        return t.data_ptr()
    except RuntimeError:  # tensors of torch.func
        return 0


def last_offset(t: torch.Tensor) -> int:
    """From the first element of a tensor, which has some, to its last one."""
    if t.is_contiguous():
        return t.numel() - 1
    return sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


def first_overlap(tensors: Sequence[torch.Tensor]) -> tuple[int, int] | None:
    """Positions i < j of two tensors that share memory, or None. Plain tensors with memory."""
    spans = []
    for i, t in enumerate(tensors):
        if type(t) in PLAIN and (t.is_cpu or t.is_cuda or t.is_xpu) and t.numel() > 0:
            start = address_of(t)
            if start != 0:
                spans.append((start, start + (last_offset(t) + 1) * t.element_size(), i))
    spans.sort()
    reaching: list[tuple[int, int]] = []  # (end, position) of those that may reach beyond the next start
    for start, end, j in spans:
        reaching = [(other, i) for other, i in reaching if other > start]
        for _, i in reaching:
            if _share_memory(tensors[i], tensors[j]):
                return min(i, j), max(i, j)
        reaching.append((end, j))
    return None


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """For two tensors whose spans overlap: certain unless one has gaps, in which the other may be."""
    if not (_has_gaps(a) or _has_gaps(b)):
        return True
    unit = math.gcd(a.element_size(), b.element_size())
    return bool(torch.isin(_addresses(a, unit), _addresses(b, unit)).any())


def _has_gaps(t: torch.Tensor) -> bool:
    return t.numel() != 1 + last_offset(t)


def _addresses(t: torch.Tensor, unit: int) -> torch.Tensor:
    """Of every ``unit`` bytes of a tensor."""
    found = torch.tensor([t.data_ptr()], dtype=torch.int64, device="cpu")
    steps = [(size, stride * t.element_size()) for size, stride in zip(t.shape, t.stride(), strict=True)]
    for size, stride in (*steps, (t.element_size() // unit, unit)):
        found = (found.unsqueeze(1) + torch.arange(size, device="cpu") * stride).flatten()
    return found


def may_overlap_itself(t: torch.Tensor) -> bool:
    """Whether two elements of a tensor may share memory."""
    if t.is_contiguous() or t.numel() < 2:
        return False
    reached = 0  # the largest offset that the dimensions so far can reach
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride <= reached:
                return True
            reached += (size - 1) * stride
    return False
