"""The dtypes that ops take, and how far their results may be from the oracle's. Seen by tests through op_db."""

from __future__ import annotations

from typing import NamedTuple

import oracle
import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES, torch.complex64, torch.complex128)
# The dtypes of one call, one after another through its lists.
KINDS: dict[str, tuple[torch.dtype, ...]] = {str(d).removeprefix("torch."): (d,) for d in DTYPES} | {"mixed": DTYPES}


class Tolerance(NamedTuple):
    """|result - exact| <= arithmetic * (sum of the magnitudes of the terms) + store * |exact| + least."""

    arithmetic: float  # of the dtype that is computed in
    store: float  # of rounding the result to the dtype that is stored
    least: float  # half the distance between subnormal numbers, where the relative bounds end


# No formula has more than 12 roundings one after another (Adam with mixing, decay and a gradient scale; the numbers
# are rounded, too), each of at most one unit roundoff u of what is computed in: u = 2^-24 in float32, 2^-53 in float64,
# where the oracle itself rounds as often again. Storing costs half a spacing: 2^-8 in bfloat16, 2^-11 in float16.
_SINGLE, _DOUBLE = 12 * 2.0**-24, 24 * 2.0**-53
TOLERANCES = {
    torch.float32: Tolerance(_SINGLE, 0.0, 1e-37),
    torch.complex64: Tolerance(_SINGLE, 0.0, 1e-37),
    torch.float64: Tolerance(_DOUBLE, 0.0, 1e-300),
    torch.complex128: Tolerance(_DOUBLE, 0.0, 1e-300),
    torch.bfloat16: Tolerance(_SINGLE, 2.0**-8, 1e-37),
    torch.float16: Tolerance(_SINGLE, 2.0**-11, 2.0**-25),
}


def bits(t: Tensor) -> Tensor:
    """The bit patterns, as integers on the CPU."""
    t = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]).cpu()


def whole(t: Tensor) -> Tensor:
    """All of the tensor's storage, the gaps between its elements included."""
    flat = torch.empty(0, dtype=t.dtype, device=t.device)
    return flat.set_(t.untyped_storage(), 0, (t.untyped_storage().nbytes() // t.element_size(),), (1,))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def assert_close(name: str, actual: Tensor, expected: oracle.Bounded, stochastic: bool = False) -> None:
    """Within the dtype's tolerance; stochastic rounding may go to either neighbour, so twice as far."""
    arithmetic, store, least = TOLERANCES[actual.dtype]
    value = oracle.numbers(actual)
    rounding = (store * abs(expected.value) + least) * (2 if stochastic else 1)
    excess = abs(value - expected.value) - (arithmetic * expected.scale + rounding)
    # "not <= 0" and not "> 0": NaN must fail too.
    wrong = (~(excess <= 0)).reshape(-1).nonzero()[0]
    if wrong.size:
        i, flat = wrong[0], (value.reshape(-1), expected.value.reshape(-1))
        raise AssertionError(
            f"{name}, {actual.dtype} {tuple(actual.shape)} strides {actual.stride()}: {wrong.size} of {value.size} are "
            f"off; number {i} is {flat[0][i]!r}, expected {flat[1][i]!r}"
        )
