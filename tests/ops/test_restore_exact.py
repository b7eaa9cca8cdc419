"""perturb_, then restore_ or the restore inside an update: every bit comes back, over 10^5 tensors of random bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import op_db
import pytest
import torch
from op_db import BACKEND_IDS, BACKENDS
from torch import Tensor

from rst_fused import ops

pytestmark = pytest.mark.usefixtures("one_thread")
on_backends = pytest.mark.parametrize(("backend", "device"), BACKENDS, ids=BACKEND_IDS)
of_dtypes = pytest.mark.parametrize("dtype", op_db.DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# Per dtype and way to restore; compiled: 6 dtypes * 3 ways * 6 rounds * 1000 = 108,000 tensors.
TENSORS, ROUNDS = 1000, {"reference": 1}
ROUNDS_COMPILED = 6
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def noise(flat: Tensor, seed: int) -> Tensor:
    """Random bits: NaNs of every payload, infinities, subnormals, zeros of both signs and all exponents."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.view_as_real(flat) if flat.is_complex() else flat
    integers = real.view(INTEGERS[real.element_size()])
    limits = torch.iinfo(integers.dtype)
    integers.random_(limits.min, limits.max, generator=generator)
    subnormal = torch.finfo(real.dtype).tiny / 4
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, subnormal], dtype=real.dtype)
    chosen = torch.randint(0, 40, real.shape, generator=generator)
    for i, value in enumerate(special):
        real[chosen == i] = value
    return flat


def pieces(flat: Tensor, sizes: list[int]) -> list[Tensor]:
    """Small tensors at every alignment within one storage; one number between each and the next."""
    return [part[:-1] for part in flat.split([n + 1 for n in sizes])]


def by_restore(w: list[Tensor], g: list[Tensor], kept: list[Tensor], backend: str) -> None:
    ops.restore_(w, kept, backend=backend)


def by_sgd(w: list[Tensor], g: list[Tensor], kept: list[Tensor], backend: str) -> None:
    overflow = torch.ones((), device=w[0].device)
    ops.restore_sgd_step_(w, g, kept, lr=0.1, weight_decay=0.1, found_inf=overflow, backend=backend)


def by_adam(w: list[Tensor], g: list[Tensor], kept: list[Tensor], backend: str) -> None:
    overflow = torch.full((1,), 3.0, device=w[0].device)  # it sums over devices
    m, v = [torch.ones_like(t) for t in w], [torch.ones_like(t) for t in w]
    ops.restore_adam_step_(w, g, kept, m, v, step=1, first_grads=g, gamma=0.5, found_inf=overflow, backend=backend)
    assert all((a == 1).all() and (b == 1).all() for a, b in zip(m, v, strict=True))


@on_backends
@of_dtypes
@pytest.mark.parametrize("restore", [by_restore, by_sgd, by_adam])
def test_every_bit_comes_back(restore: Callable[..., None], dtype: torch.dtype, backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for seed in range(ROUNDS.get(backend, ROUNDS_COMPILED)):
        sizes = torch.randint(0, 40, (TENSORS,), generator=generator).tolist()
        total = sum(sizes) + TENSORS
        flat = noise(torch.empty(total, dtype=dtype), seed).to(device)
        original, kept_flat = flat.clone(), torch.zeros_like(flat)
        gradients = torch.randn(total, generator=generator).to(device).to(dtype)
        w, kept, g = pieces(flat, sizes), pieces(kept_flat, sizes), pieces(gradients, sizes)
        stats = ops.grad_norm(g, backend=backend)
        ops.perturb_(w, g, kept, stats, rho=100.0, adaptive=seed % 2 == 1, eta=1.0, step=seed, backend=backend)
        assert not op_db.same_bits(flat, original), "the perturbation did nothing"
        restore(w, g, kept, backend)
        assert op_db.same_bits(flat, original)


@on_backends
@of_dtypes
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_a_learning_rate_of_zero_restores(adam: bool, dtype: torch.dtype, backend: str, device: str) -> None:
    """Finite weights come back through the arithmetic of the update; -0.0 may become 0.0, for -0.0 + 0.0 is 0.0."""
    flat = noise(torch.empty(50_000, dtype=dtype), 5)
    flat = torch.where(flat.isfinite(), flat, torch.ones_like(flat)).to(device)
    original, kept = flat.clone(), torch.zeros_like(flat)
    g = [torch.randn(50_000, generator=torch.Generator().manual_seed(2)).to(device).to(dtype)]
    stats = ops.grad_norm(g, backend=backend)
    ops.perturb_([flat], g, [kept], stats, rho=100.0, backend=backend)
    assert not torch.equal(flat, original)
    if adam:
        m, v = torch.zeros_like(flat), torch.zeros_like(flat)
        ops.restore_adam_step_([flat], g, [kept], [m], [v], step=1, lr=0.0, backend=backend)
    else:
        ops.restore_sgd_step_([flat], g, [kept], lr=0.0, backend=backend)
    assert torch.equal(flat, original)


@on_backends
@of_dtypes
def test_both_zeros_survive_an_overflow(dtype: torch.dtype, backend: str, device: str) -> None:
    """found_inf != 0 leaves even the sign of zero, and buffers, masters and parameters of a base step, as they are."""
    w = noise(torch.empty(5000, dtype=dtype), 3).to(device)
    buffer = noise(torch.empty(5000, dtype=dtype), 4).to(device)
    before = w.clone(), buffer.clone()
    g = [torch.full_like(w, math.inf)]
    ops.sgd_step_([w], g, [buffer], lr=0.1, momentum=0.9, found_inf=torch.ones(1, device=device), backend=backend)
    assert op_db.same_bits(w, before[0]) and op_db.same_bits(buffer, before[1])


@on_backends
@pytest.mark.parametrize("dtype", op_db.HALVES)
@pytest.mark.parametrize("step", ["restore_", "sgd", "adam"])
def test_masters_round_to_nearest(step: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Beside a master copy the parameter is what torch rounds the master to, NaN and overflow to infinity included."""
    bits = torch.arange(-(2**31), 2**31, 65521, dtype=torch.int64).to(torch.int32)  # all exponents, ties among them
    master = torch.cat([bits.view(torch.float32), torch.tensor([65519.9, 65520.0, 1 + 2**-9, 1 + 3 * 2**-9, 2**-25])])
    master = master.to(device)
    masters, w = [master.clone()], [torch.zeros_like(master, dtype=dtype)]
    g, overflow = [torch.ones_like(w[0])], torch.ones(1, device=device)
    if step == "restore_":
        ops.restore_(w, masters=masters, backend=backend)
    elif step == "sgd":
        ops.restore_sgd_step_(w, g, None, lr=0.1, masters=masters, found_inf=overflow, backend=backend)
    else:
        m, v = [torch.zeros_like(master)], [torch.zeros_like(master)]
        ops.restore_adam_step_(w, g, None, m, v, step=1, masters=masters, found_inf=overflow, backend=backend)
    expected, nan = master.to(dtype), master.isnan()
    assert op_db.same_bits(masters[0], master)
    assert w[0][nan].isnan().all() and op_db.same_bits(w[0][~nan], expected[~nan])


@on_backends
@of_dtypes
def test_gamma_one_is_the_second_gradient(dtype: torch.dtype, backend: str, device: str) -> None:
    """RST is G-RST with gamma = 1: no finite gradient changes at all; with gamma = 0 it is the first gradient."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(3000, generator=generator).to(device).to(dtype) for _ in range(2))
    for gamma, wanted in ((1.0, second), (0.0, first)):
        g, w = [second.clone()], [torch.zeros_like(second)]
        ops.restore_(w, w, grads=g, first_grads=[first], gamma=gamma, backend=backend)
        assert torch.equal(g[0], wanted)
