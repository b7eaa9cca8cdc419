"""Checks of arguments: each returns a plain value or raises an error naming the argument."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from operator import index
from typing import Any


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
    """``value`` as a float from low to high, so not NaN. Takes any ``numbers.Real``."""
    if not isinstance(value, Real) or not low <= float(value) <= high:
        raise ValueError(f"{name}={value!r}: expected a number in [{low:g}, {high:g}]")
    return float(value)


def as_flag(name: str, value: Any) -> bool:
    """``value`` as a bool. Takes what equals one, such as numpy's; refuses strings and all else that has a truth."""
    if value not in (False, True):
        raise ValueError(f"{name}={value!r}: expected True or False")
    return bool(value)


def required_params(params: Iterable[Any] | None) -> Iterable[Any]:
    """``params`` unless it is None; raises TypeError then."""
    if params is None:
        raise TypeError("params=None: expected parameters, unless base is an optimizer instance that holds them")
    return params
