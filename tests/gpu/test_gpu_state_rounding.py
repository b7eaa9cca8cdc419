"""Updates that round a bfloat16 moment on a GPU, without one: bytes, launches, addresses, where numbers are read."""

from __future__ import annotations

from typing import Any

import gpu_simulator
import op_db
import pytest
import torch
from gpu_simulator import aligned, tensors

from rst_fused import ops

pytestmark = [pytest.mark.usefixtures("one_thread"), gpu_simulator.needed]
F32, BF16 = torch.float32, torch.bfloat16
N = 3 * 16384
RNG = (3, 2**40 + 4)


# Bytes read and written by Adam per parameter: 16 at a time, and 8 at a time.
TRAFFIC = {"fp32": (12, 2, 8, 2), "bf16": (8, 0, 6, 0), "masters": (12, 0, 12, 0)}


@pytest.mark.parametrize("kind", TRAFFIC)
def test_moves_the_fewest_bytes(kind: str, simulator: gpu_simulator.Simulator) -> None:
    """Beside four float32 numbers, of which a thread takes 16 bytes, it takes 8 of the moment."""
    dtype, masters = F32 if kind == "fp32" else BF16, kind == "masters"
    state = F32 if masters else dtype
    p, g = aligned(N, dtype), aligned(N, dtype)
    m, v, master = aligned(N, BF16), aligned(N, state), aligned(N, F32)
    given = {"masters": [master]} if masters else {}
    ops.adam_step_([p], [g], [m], [v], lr=0.1, step=1, rng=RNG, backend="simulated", **given)
    ((kernel, blocks, _, counted),) = simulator.launches
    assert gpu_simulator.rounds(kernel) and blocks == 3
    read16, read8, written16, written8 = TRAFFIC[kind]
    assert (16 * counted["ld_width"].get(16, 0), 16 * counted["st_width"].get(16, 0)) == (read16 * N, written16 * N)
    assert 8 * counted["st_width"].get(8, 0) == written8 * N
    assert 8 * counted["ld_width"].get(8, 0) >= read8 * N
    assert counted["ld_bytes"] - (read16 + read8) * N <= blocks * gpu_simulator.THREADS * 8 + 64


@pytest.mark.parametrize("shifted", ["params", "grads", "backups", "exp_avgs", "exp_avg_sqs"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_misaligned_operand(dtype: torch.dtype, shifted: str, simulator: gpu_simulator.Simulator) -> None:
    n = 4096 + 9
    for offset in (1, 2, 4):
        results = []
        for backend in ("simulated", "cpu"):
            lists: dict[str, Any] = {}
            for i, name in enumerate(("params", "grads", "backups", "exp_avgs", "exp_avg_sqs")):
                at, kind = offset if name == shifted else 0, BF16 if name == "exp_avgs" else dtype
                lists[name] = [aligned(n + at, kind)[at:]]
                lists[name][0].copy_(tensors(n, dtype=kind, seed=i)[0].abs())
            ops.restore_adam_step_(**lists, lr=0.1, step=2, rng=RNG, backend=backend)
            results.append([t for ts in lists.values() for t in ts])
        assert all(map(op_db.same_bits, *results))


def test_tensors_that_are_rounded_and_others_in_one_call(simulator: gpu_simulator.Simulator) -> None:
    """Two launches, each with its own; what a tensor gets does not depend on the others."""
    results = []
    for backend in ("simulated", "cpu"):
        p, g = tensors(40, 700, 33, 9, seed=1), tensors(40, 700, 33, 9, seed=2)
        m = [t.to(dtype) for t, dtype in zip(tensors(40, 700, 33, 9, seed=3), (F32, BF16, F32, BF16), strict=True)]
        ops.sgd_step_(p, g, m, lr=0.1, momentum=0.9, rng=RNG, indices=[3, 1, 4, 7], backend=backend)
        results.append([*p, *m])
    assert all(map(op_db.same_bits, *results))
    assert [gpu_simulator.rounds(kernel) for kernel, *_ in simulator.launches] == [False, True]


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_more_tensors_than_a_launch_takes(rule: str, simulator: gpu_simulator.Simulator) -> None:
    n, results = 800, []
    for backend in ("simulated", "cpu"):
        p, g = tensors(*[5] * n, seed=1), tensors(*[5] * n, seed=2)
        m = tensors(*[5] * n, dtype=BF16, seed=3)
        if rule == "sgd":
            ops.sgd_step_(p, g, m, lr=0.1, momentum=0.9, rng=RNG, backend=backend)
        else:
            v = [t.abs() for t in tensors(*[5] * n, seed=4)]
            ops.adam_step_(p, g, m, v, lr=0.1, step=2, rng=RNG, backend=backend)
        results.append([*p, *m])
    assert all(map(op_db.same_bits, *results))
    launches = simulator.launches
    assert len(launches) == -(-n // gpu_simulator.capacity(launches[0][0])) > 1


@pytest.mark.parametrize("by_value", [False, True], ids=["all on the device", "hyperparameters by value"])
def test_seed_and_step_on_the_device(
    by_value: bool, kernels: gpu_simulator.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in CUDA graphs."""
    results = []
    for on_device in (True, False):
        p, g, m = tensors(700, seed=1), tensors(700, seed=2), tensors(700, dtype=BF16, seed=3)
        with gpu_simulator.simulated(kernels, monkeypatch, on_device, by_value and on_device):
            ops.lion_step_(p, g, m, lr=0.1, rng=RNG, backend="simulated")
            assert bool(kernels.launches[0][2].params.rng) == on_device
        results.append([*p, *m])
    assert all(map(op_db.same_bits, *results))


@pytest.mark.parametrize("eps", [1e-30, 0.0])
def test_exact_roots(eps: float, simulator: gpu_simulator.Simulator) -> None:
    """Where eps is so small that the smallest roots count; whole tensors and shards get the same bits."""
    results = []
    for backend in ("simulated", "cpu"):
        p, g, m = tensors(4000, seed=1), tensors(4000, seed=2), tensors(4000, dtype=BF16, seed=3)
        v = [t.abs() * 1e-30 for t in tensors(4000, seed=4)]
        ops.adam_step_(p, g, m, v, lr=1e-3, eps=eps, step=2, rng=RNG, shards=[(2, 0, 0)], backend=backend)
        results.append([*p, *m, *v])
    assert all(map(op_db.same_bits, *results))
