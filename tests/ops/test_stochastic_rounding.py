"""The perturbation of bfloat16 and float16: rounded up or down at random, right in the mean, the same in every run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import op_db
import pytest
import torch
from op_db import BACKEND_IDS, BACKENDS
from rounding_oracle import FORMATS, normal_values, random_bits, rounded_with, values
from torch import Tensor

from rst_fused import ops

pytestmark = pytest.mark.usefixtures("one_thread")
on_backends = pytest.mark.parametrize(("backend", "device"), BACKENDS, ids=BACKEND_IDS)
of_halves = pytest.mark.parametrize("dtype", op_db.HALVES, ids=["bfloat16", "float16"])



def rounded(x: Tensor, dtype: torch.dtype, backend: str, **options: Any) -> Tensor:
    """float32 ``x`` as perturb_ rounds it: the master copy is x and e is -0.0, so that nothing else is rounded."""
    p, zero = torch.zeros_like(x, dtype=dtype), torch.full_like(x, -0.0, dtype=dtype)
    stats = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64, device=x.device)
    ops.perturb_([p], [zero], None, stats, rho=1.0, masters=[x], backend=backend, **options)
    return p


def neighbours(x: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the format at or below and at or above float64 ``x``; beyond the largest, infinity."""
    significant, smallest, _ = FORMATS[dtype]
    exponents = np.frexp(x)[1] - significant  # x = m 2^k with 1/2 <= |m| < 1
    quantum = np.ldexp(1.0, np.maximum(exponents, smallest))
    largest = torch.finfo(dtype).max
    below, above = np.floor(x / quantum) * quantum, np.ceil(x / quantum) * quantum
    above[above > largest], below[below < -largest] = math.inf, -math.inf
    return below, above


@on_backends
@of_halves
def test_goes_to_a_neighbour(dtype: torch.dtype, backend: str, device: str) -> None:
    x = values(dtype).to(device)
    below, above = neighbours(x.cpu().double().numpy(), dtype)
    for step in range(4):
        result = rounded(x, dtype, backend, step=step).cpu().double().numpy()
        assert ((result == below) | (result == above)).all()
        between = below != above
        assert 0.4 < (result == above)[between].mean() < 0.6, "both neighbours are taken"


@on_backends
@of_halves
def test_numbers_of_the_format_never_move(dtype: torch.dtype, backend: str, device: str) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every.to(device)
    for seed in range(3):
        result = rounded(every.float(), dtype, backend, seed=seed)
        nan = every.isnan()
        assert result[nan].isnan().all() and op_db.same_bits(result[~nan], every[~nan])


@on_backends
@of_halves
def test_frequencies_follow_the_fraction(dtype: torch.dtype, backend: str, device: str) -> None:
    """P(away from zero) is the fraction cut off, for numbers of both signs, normal and subnormal: within 5 sigma."""
    n, tiny = 40_000, torch.finfo(dtype).smallest_normal
    spacing = torch.finfo(dtype).eps
    for seed, fraction in enumerate((1 / 16, 0.25, 0.5, 0.875)):
        for base, quantum in ((1.0, spacing), (1.5, spacing), (96.0, 64 * spacing), (0.0, tiny * spacing)):
            for sign in (1.0, -1.0):
                x = torch.full((n,), sign * (base + fraction * quantum), dtype=torch.float32, device=device)
                assert x[0].item() == sign * (base + fraction * quantum), "the sample is not exact"
                away = (rounded(x, dtype, backend, seed=seed).float().abs() > base).double().mean().item()
                assert abs(away - fraction) < 5 * math.sqrt(fraction * (1 - fraction) / n), (base, sign)


@on_backends
@of_halves
def test_unbiased_over_steps(dtype: torch.dtype, backend: str, device: str) -> None:
    """The mean over steps converges to the number itself, for each element and for all together."""
    x, steps = values(dtype, 2000, seed=1).to(device), 400
    exact = x.cpu().double().numpy()
    below, above = neighbours(exact, dtype)
    inside = np.isfinite(below) & np.isfinite(above) & (below != above)
    total = sum(rounded(x, dtype, backend, step=s).cpu().double().numpy() for s in range(steps))
    off = (total / steps - exact)[inside] / (above - below)[inside]  # in spacings
    assert np.abs(off).max() < 6 * 0.5 / math.sqrt(steps)
    assert abs(off.mean()) < 5 * 0.5 / math.sqrt(steps * inside.sum())


@on_backends
def test_subnormal_float16_keeps_small_perturbations(backend: str, device: str) -> None:
    """Far below the smallest float16 (6e-8) the mean still is the number, down to 2^-37."""
    for x in (2.0**-26, 3 * 2.0**-30, 1e-9):
        n = 200_000
        result = rounded(torch.full((n,), x, device=device), torch.float16, backend).double()
        hits = (result != 0).sum().item()
        assert set(result.unique().tolist()) <= {0.0, 2.0**-24}
        expected = n * x / 2.0**-24
        assert abs(hits - expected) < 6 * math.sqrt(expected) + 1


# --- a pure function of (seed, step, index) -------------------------------------------------------------------------
@on_backends
@of_halves
@pytest.mark.parametrize(
    ("seed", "step", "index"), [(0, 0, 0), (1, 2, 3), (2**63 - 1, 2**40 + 1, 10**6), (2**32, 0, 7)]
)
def test_known_bits(seed: int, step: int, index: int, dtype: torch.dtype, backend: str, device: str) -> None:
    """Recorded runs depend on these bits: they may never change, nor differ between backends."""
    x = normal_values(dtype)
    expected = rounded_with(random_bits(seed, step, index, np.arange(len(x))), x, dtype).to(device)
    result = rounded(x.to(device), dtype, backend, seed=seed, step=step, first_index=index)
    assert op_db.same_bits(result, expected)


@on_backends
@of_halves
@pytest.mark.parametrize(
    "shard",
    [(0, 0, 0), (5, 0, 0), (2**32 - 700, 0, 0), (2**32 - 701, 0, 0), (2**40 + 3, 0, 0), (4, 64, 128), (7, 63, 129),
     (2**32 - 99, 1, 2), (2, 3, 2**31 - 1), (6, 1000, 2**32 - 1500), (2**62, 2048, 2**32)],
    ids=str,
)  # fmt: skip
def test_known_bits_of_shards(shard: tuple[int, int, int], dtype: torch.dtype, backend: str, device: str) -> None:
    """Element i is rounded as that at its position in the whole tensor, across the blocks of 2^32 that share a key."""
    x, (offset, run, stride) = normal_values(dtype), shard
    positions = [offset + (i // run * stride + i % run if run else i) for i in range(len(x))]
    expected = rounded_with(random_bits(9, 8, 7, np.array(positions, dtype=np.uint64)), x, dtype).to(device)
    assert op_db.same_bits(
        rounded(x.to(device), dtype, backend, seed=9, step=8, first_index=7, shards=[shard]), expected
    )


def test_first_bits() -> None:
    """The twin itself: fixed numbers."""
    assert random_bits(0, 0, 0, np.arange(3)).tolist() == [10049, 13995, 1224]


@on_backends
@of_halves
def test_depends_on_seed_step_and_place_alone(dtype: torch.dtype, backend: str, device: str) -> None:
    x = values(dtype, 4000).to(device)
    first = rounded(x, dtype, backend, seed=1, step=2, first_index=3)
    assert op_db.same_bits(first, rounded(x, dtype, backend, seed=1, step=2, first_index=3))
    for other in ({"seed": 2}, {"step": 3}, {"first_index": 4}, {"seed": 1 + 2**32}, {"step": 2 + 2**32}):
        options = {"seed": 1, "step": 2, "first_index": 3, **other}
        differ = (op_db.bits(first) != op_db.bits(rounded(x, dtype, backend, **options))).double().mean()
        assert 0.3 < differ < 0.6, f"{other} gives other bits, independent of the first ones"


@on_backends
@of_halves
def test_a_list_is_its_tensors_one_by_one(dtype: torch.dtype, backend: str, device: str) -> None:
    """Splitting a call, as groups or devices do, changes nothing as long as first_index counts on."""
    w = [values(dtype, n, n).to(dtype).to(device) for n in (10, 1000, 3)]
    g = [torch.randn(t.shape, generator=torch.Generator().manual_seed(0)).to(device).to(dtype) for t in w]
    stats = ops.grad_norm(g, backend=backend)
    together, alone = [t.clone() for t in w], [t.clone() for t in w]
    ops.perturb_(together, g, [t.clone() for t in w], stats, rho=10.0, seed=5, first_index=2, backend=backend)
    for i, (p, grad) in enumerate(zip(alone, g, strict=True)):
        ops.perturb_([p], [grad], [p.clone()], stats, rho=10.0, seed=5, first_index=2 + i, backend=backend)
        assert op_db.same_bits(p, together[i])


@on_backends
@of_halves
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 1, 2)], ids=["plain", "channels_last", "turned"])
@pytest.mark.parametrize("turn_gradient", [False, True])
def test_bits_follow_memory(
    turn_gradient: bool, order: tuple[int, ...], dtype: torch.dtype, backend: str, device: str
) -> None:
    """A dense parameter is rounded as the flat memory it lies in, whatever its dimensions and its gradient's."""
    place = op_db.dense((8, 3, 5, 7), order)
    x = values(dtype, 840).to(device)
    flat = rounded(x, dtype, backend, seed=9)
    p = torch.zeros(840, dtype=dtype, device=device).as_strided(place.size, place.stride)
    g = torch.zeros((8, 3, 5, 7), dtype=dtype, device=device) if turn_gradient else torch.zeros_like(p)
    stats = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64, device=device)
    masters = [x.as_strided(place.size, place.stride)]
    ops.perturb_([p], [g], None, stats, rho=1.0, masters=masters, seed=9, backend=backend)
    assert op_db.same_bits(op_db.whole(p), flat)


@pytest.mark.skipif("cpu" not in BACKEND_IDS, reason="only the reference is available")
@of_halves
@pytest.mark.parametrize("n", [1, 7, 16, 17, 1023, 16385, 40000])
def test_backends_agree_bit_for_bit(n: int, dtype: torch.dtype) -> None:
    x = values(dtype, n, seed=n)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 65519.0, 2.0**-40, 1e-45, 3.39e38])
    x = torch.where(torch.arange(n) % 5 == 2, special[torch.arange(n) % 8], x)
    for seed in range(3):
        options = {"seed": seed, "step": 17, "first_index": 4}
        results = [rounded(x.to(device), dtype, name, **options).cpu() for name, device in (b.values for b in BACKENDS)]
        assert all(op_db.same_bits(r, results[-1]) for r in results)


# --- why it is there ------------------------------------------------------------------------------------------------
@on_backends
def test_plain_rounding_loses_most_of_the_perturbation(backend: str, device: str) -> None:
    """e = rho g / ||g|| is below the resolution of bfloat16: rounded to nearest, most weights do not move at all."""
    n, generator = 1_000_000, torch.Generator().manual_seed(0)
    w = (0.1 * torch.randn(n, generator=generator)).to(torch.bfloat16).to(device)
    g = [torch.randn(n, generator=generator).to(torch.bfloat16).to(device)]
    stats = ops.grad_norm(g, backend=backend)
    kept = {}
    for stochastic in (False, True):
        p = w.clone()
        ops.perturb_([p], g, [w.clone()], stats, rho=0.05, stochastic_rounding=stochastic, backend=backend)
        e = p.double() - w.double()
        along = (e * g[0].double()).sum().item() / stats[0].item()  # the length of e in the direction of g: rho
        kept[stochastic] = (along / 0.05, (e != 0).double().mean().item())
    assert kept[False][0] < 0.35 and kept[False][1] < 0.25
    assert kept[True][0] == pytest.approx(1.0, abs=0.05)
