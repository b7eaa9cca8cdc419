"""Shards of a tensor: each is perturbed as its slice of the whole tensor, bit for bit, however that is cut."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import gpu_simulator
import op_db
import pytest
import torch
from op_db import BACKEND_IDS, BACKENDS
from torch import Tensor

from rst_fused import ops

pytestmark = pytest.mark.usefixtures("one_thread", "simulation")
SIMULATED = pytest.param("simulated", "cpu", marks=gpu_simulator.needed)
on_backends = pytest.mark.parametrize(
    ("backend", "device"), [*BACKENDS, SIMULATED], ids=[*BACKEND_IDS, "simulated"]
)  # fmt: skip


@pytest.fixture
def simulation(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["backend"] == "simulated":
        request.getfixturevalue("simulator")


class Cut(NamedTuple):
    index: tuple[slice, ...]
    shard: tuple[int, int, int]  # offset, run, stride


def along(shape: Sequence[int], dim: int, *bounds: int) -> list[Cut]:
    """One dimension cut at these places: for 0, runs that follow one another."""
    inner = math.prod(shape[dim + 1 :])
    return [
        Cut((*[slice(None)] * dim, slice(a, b)), (a * inner, (b - a) * inner, shape[dim] * inner))
        for a, b in itertools.pairwise(bounds)
    ]


def blocks(shape: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> list[Cut]:
    width = shape[1]
    return [
        Cut((slice(a, b), slice(c, d)), (a * width + c, d - c, width))
        for a, b in itertools.pairwise(rows) for c, d in itertools.pairwise(columns)
    ]  # fmt: skip


CUTS: dict[str, tuple[tuple[int, ...], list[Cut]]] = {
    "rows": ((12, 10), along((12, 10), 0, 0, 3, 6, 9, 12)),
    "uneven rows": ((7, 9), along((7, 9), 0, 0, 1, 1, 4, 7)),  # at odd places, and one empty
    "columns": ((33, 16), along((33, 16), 1, 0, 8, 16)),
    "uneven columns": ((33, 17), along((33, 17), 1, 0, 5, 5, 16, 17)),
    "single columns": ((60, 3), along((60, 3), 1, 0, 1, 2, 3)),
    "blocks": ((12, 15), blocks((12, 15), (0, 5, 12), (0, 4, 7, 15))),
    "middle": ((4, 6, 5), along((4, 6, 5), 1, 0, 1, 4, 6)),
    "long rows": ((3, 20_001), along((3, 20_001), 0, 0, 1, 3)),
    "long columns": ((10, 8_000), along((10, 8_000), 1, 0, 3_001, 8_000)),
    "whole": ((7, 9), [Cut((slice(None),), (0, 0, 0)), Cut((slice(None),), (0, 63, 63))]),
}  # fmt: skip


def perturbed(
    w: list[Tensor], g: list[Tensor], backend: str, masters: bool, adaptive: bool,
    shards: list[tuple[int, int, int]] | None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """The perturbed weights and what keeps the old ones."""
    moved = [t.clone() for t in w]
    kept = [t.float() * 1.01 if masters else torch.zeros_like(t) for t in w]
    lists = {"masters": kept, "backups": None} if masters else {"backups": kept}
    stats = torch.tensor([3.0, 1 / 3, 0, 0, 0, 9.0], dtype=torch.float64, device=w[0].device)
    ops.perturb_(
        moved, g, stats=stats, rho=0.7, adaptive=adaptive, eta=0.01, seed=3, step=7, first_index=2, shards=shards,
        backend=backend, **lists,  # type: ignore[arg-type]
    )  # fmt: skip
    return moved, kept


@on_backends
@pytest.mark.parametrize("dtype", op_db.HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("masters", "adaptive"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("cut", CUTS)
def test_a_shard_is_a_slice_of_the_whole(
    cut: str, masters: bool, adaptive: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    """Beside a tensor that is not cut. Gradients are views of the whole one: columns lie apart."""
    shape, cuts = CUTS[cut]
    w, g = ([op_db.make(name, i, op_db.dense(size), dtype, device) for i, size in enumerate((shape, (301,)))]
            for name in ("params", "grads"))  # fmt: skip
    whole, kept = perturbed(w, g, backend, masters, adaptive, None)
    assert not op_db.same_bits(whole[0], w[0]) and sum(w[0][index].numel() for index, _ in cuts) >= w[0].numel()
    for index, shard in cuts:
        parts = [w[0][index].contiguous(), w[1]], [g[0][index], g[1]]
        moved, saved = perturbed(*parts, backend, masters, adaptive, [shard, (0, 0, 0)])
        assert op_db.same_bits(moved[0], whole[0][index]) and op_db.same_bits(moved[1], whole[1])
        assert op_db.same_bits(saved[0], kept[0][index])


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_dtypes_that_are_not_rounded_do_not_care(dtype: torch.dtype, backend: str, device: str) -> None:
    w, g = ([op_db.make(name, 0, op_db.dense((501,)), dtype, device)] for name in ("params", "grads"))
    (moved,), _ = perturbed(w, g, backend, False, False, [(5, 7, 9)])
    assert op_db.same_bits(moved, perturbed(w, g, backend, False, False, None)[0][0])


@on_backends
@pytest.mark.parametrize("dtype", op_db.HALVES, ids=["bfloat16", "float16"])
def test_nearest_rounding_does_not_care(dtype: torch.dtype, backend: str, device: str) -> None:
    w, g = ([op_db.make(name, 0, op_db.dense((501,)), dtype, device)] for name in ("params", "grads"))
    stats = torch.tensor([3.0, 1 / 3, 0, 0, 0, 9.0], dtype=torch.float64, device=device)
    results = []
    for shards in (None, [(5, 7, 9)]):
        p = [w[0].clone()]
        ops.perturb_(
            p, g, [torch.empty_like(w[0])], stats, rho=0.7, stochastic_rounding=False, shards=shards, backend=backend
        )
        results.append(p[0])
    assert op_db.same_bits(*results)
