"""Shards of a tensor: each is perturbed as its slice of the whole tensor, bit for bit, however that is cut."""

from __future__ import annotations

import gpu_simulator
import op_db
import pytest
import torch
from cuts import CUTS
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
