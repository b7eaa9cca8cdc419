"""Every SIMD level this processor can run computes the same bits: a run can move between machines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import op_db
import pytest
import torch
from op_db import OPS, Sample
from torch import Tensor

from benchmarks.record import cache_bytes as listed_cache_bytes
from rst_fused import _backends, ops

host = _backends.plan_extension()
LEVELS = [] if host is None else list(host.simd_levels())
pytestmark = [
    pytest.mark.skipif(host is None, reason="the extension is not built: there are no SIMD levels"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def level_in_use() -> Iterator[None]:
    before = host.simd_level()
    yield
    assert host.select_simd(before)


def at_each_level(sample: Sample, op: str) -> dict[str, tuple[Sample, Any]]:
    results = {}
    for level in LEVELS:
        assert host.select_simd(level) and _backends.simd_level() == level
        copy = sample.copied()
        results[level] = copy, copy.run(op, "cpu")
    return results


def assert_levels_agree(sample: Sample, op: str) -> None:
    (first, first_result), *others = at_each_level(sample, op).values()
    for other, result in others:
        assert result is None or op_db.same_bits(result, first_result)
        for name, tensors in first.lists.items():
            for i, t in enumerate(tensors):
                assert op_db.same_bits(op_db.whole(t), op_db.whole(other.lists[name][i])), f"{name}[{i}]"


def test_levels_are_ordered_and_unknown_ones_refused() -> None:
    assert LEVELS[0] == "plain" and [x for x in ("plain", "avx2", "avx512") if x in LEVELS] == LEVELS
    for name in ("", "sse", "AVX2", "avx1024"):
        assert not host.select_simd(name)
        assert _backends.simd_level() in LEVELS


CASES = [
    pytest.param(op, spec, kind, id=f"{op.name}-{spec.name}-{kind}")
    for op in OPS.values() for spec in op.specs for kind in spec.kinds()
]  # fmt: skip


@pytest.mark.parametrize(("op", "spec", "kind"), CASES)
def test_levels_agree(op: op_db.OpInfo, spec: op_db.Spec, kind: str) -> None:
    assert_levels_agree(op_db.build(op, spec, kind), op.name)


def rough(t: Tensor) -> None:
    """Finite numbers of all exponents, subnormal ones and zeros of both signs: where rounding is hardest."""
    real = torch.view_as_real(t) if t.is_complex() else t
    info, generator = torch.finfo(real.dtype), torch.Generator().manual_seed(real.numel())
    low, high = torch.tensor([info.tiny * info.eps, info.max], dtype=torch.float64).log2().tolist()
    exponents = torch.rand(real.shape, generator=generator, dtype=torch.float64) * (high - low) * 0.49 + low
    signs = torch.randint(-1, 2, real.shape, generator=generator)
    real.copy_(signs * 2.0**exponents)


def rough_specs(op: op_db.OpInfo) -> Iterator[op_db.Spec]:
    yield op_db.Spec("plain", "sizes")
    if "masters" in op.arguments:
        yield op_db.Spec("masters", "sizes", ("masters",))
    if op.restores:
        grads = () if "grads" in op.lists else ("grads",)
        yield op_db.Spec("mixing", "small", (*grads, "first_grads"), {"gamma": 0.3})


ROUGH = [
    pytest.param(op, spec, kind, id=f"{op.name}-{spec.name}-{kind}")
    for op in OPS.values() for spec in rough_specs(op) for kind in spec.kinds()
]  # fmt: skip


@pytest.mark.parametrize(("op", "spec", "kind"), ROUGH)
def test_levels_agree_on_rough_numbers(op: op_db.OpInfo, spec: op_db.Spec, kind: str) -> None:
    """Conversions to and from 16 bits, subnormal results, divisions and roots: the same at each level."""
    sample = op_db.build(op, spec, kind)
    for name, tensors in sample.lists.items():
        for t in tensors:
            rough(t)
            if name == "exp_avg_sqs":
                t.copy_(torch.view_as_complex(torch.view_as_real(t).abs()) if t.is_complex() else t.abs())
    assert_levels_agree(sample, op.name)


@pytest.mark.parametrize("dtype", op_db.HALVES)
def test_all_16_bit_numbers_convert_alike(dtype: torch.dtype) -> None:
    """Each of the finite ones, through float32 and back by a step along a zero gradient; NaN stays NaN."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for level in LEVELS:
        host.select_simd(level)
        w = [torch.zeros_like(every)]
        ops.restore_sgd_step_(w, [torch.zeros_like(every)], [every], lr=1.0, backend="cpu")
        assert w[0][every.isnan()].isnan().all()
        assert op_db.same_bits(w[0][every.isfinite()], every[every.isfinite()])


@pytest.mark.parametrize("dtype", op_db.HALVES)
def test_rounding_to_16_bits_is_torchs(dtype: torch.dtype) -> None:
    """float32 of every exponent, ties and overflow among them, rounded to nearest even at each level."""
    patterns = torch.arange(-(2**31), 2**31, 9973, dtype=torch.int64).to(torch.int32).view(torch.float32)
    ties = (torch.arange(-(2**15), 2**15 - 1).to(torch.int16).view(dtype).float(),) if dtype == torch.float16 else ()
    halfway = [(t[:-1] + t[1:]) / 2 for t in ties]
    master = torch.cat([patterns, *halfway, torch.tensor([65519.99, 65520.0, 3.3961776e38, 2.0**-25, 1.1 * 2.0**-25])])
    expected, nan = master.to(dtype), master.isnan()
    for level in LEVELS:
        host.select_simd(level)
        w = [torch.zeros_like(expected)]
        ops.restore_(w, masters=[master], backend="cpu")
        assert w[0][nan].isnan().all() and op_db.same_bits(w[0][~nan], expected[~nan])


# --- data beyond the cache: write-only streams bypass it ------------------------------------------------------------
def cache_bytes() -> int:
    """As the kernels find it; glibc's _SC_LEVEL3_CACHE_SIZE is 194, a name that Python does not have."""
    try:
        found = os.sysconf(194) if sys.platform == "linux" else 0
    except OSError:
        found = 0
    return found if found > 0 else 32 << 20


# Op, lists, dtype, numbers, and the least number of streams that the op moves.
_BUFFER, _MOMENTS = ("momentum_buffers",), ("exp_avgs", "exp_avg_sqs")
# Random bits depend on the position within the tensor, so pieces can only be rounded to nearest.
_STATS = torch.tensor([1.0, 1.0, 0, 0, 0, 1.0], dtype=torch.float64)
_DIRECT = {"stats": _STATS, "rho": 10.0, "stochastic_rounding": False}
_MOMENTUM = {"lr": 0.1, "momentum": 0.9}
STREAMED: list[tuple[str, tuple[str, ...], torch.dtype, dict[str, Any], int]] = [
    ("perturb_", ("backups",), torch.float32, _DIRECT, 4),
    ("perturb_", ("backups",), torch.bfloat16, _DIRECT, 4),
    ("restore_sgd_step_", ("backups", *_BUFFER), torch.float32, _MOMENTUM, 5),
    ("restore_sgd_step_", ("masters", *_BUFFER), torch.bfloat16, {**_MOMENTUM, "backups": None}, 5),
    ("restore_adam_step_", ("backups", *_MOMENTS), torch.float16, {"lr": 0.1, "step": 3}, 7),
]


@pytest.mark.skipif(cache_bytes() > 600 << 20, reason="this cache holds more than the tests should allocate")
@pytest.mark.parametrize(("op", "lists", "dtype", "options", "streams"), STREAMED)
def test_large_data_is_computed_as_small_data(
    op: str, lists: tuple[str, ...], dtype: torch.dtype, options: dict[str, Any], streams: int
) -> None:
    """Streaming stores change nothing: one large misaligned tensor against its pieces, each far below the cache."""
    n = cache_bytes() // streams // dtype.itemsize + 50_000
    block = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * 0.1

    def tensors() -> dict[str, Tensor]:
        """One element off the alignment that streaming stores need."""
        made = {}
        for k, name in enumerate(("params", "grads", *lists)):
            wide = "masters" in lists and name in ("masters", *_BUFFER)
            source = (block.roll(k).abs() if name == "exp_avg_sqs" else block.roll(k)).repeat(n // len(block) + 1)[:n]
            made[name] = torch.empty(n + 1, dtype=torch.float32 if wide else dtype)[1:].copy_(source)
        return made

    for level in (LEVELS[0], LEVELS[-1]):
        host.select_simd(level)
        whole, parts = tensors(), tensors()
        Sample({name: [t] for name, t in whole.items()}, options).run(op, "cpu")
        for begin in range(0, n, 1 << 20):
            Sample({name: [t[begin : begin + (1 << 20)]] for name, t in parts.items()}, options).run(op, "cpu")
        for name, t in whole.items():
            assert op_db.same_bits(t, parts[name]), f"{name} at level {level}"


def test_a_norm_that_flushes_denormal_numbers() -> None:
    """Squares too small for fp32 count where they make up the norm, even if the processor takes them for zero."""
    g = torch.full((16384,), 0.9e-19)
    g[5] = 1e-15
    expected = g.double().norm().item()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    try:
        norms = [host.select_simd(level) and float(ops.grad_norm([g], backend="cpu")[0]) for level in LEVELS]
    finally:
        torch.set_flush_denormal(False)
    assert norms == pytest.approx([expected] * len(LEVELS), rel=1e-6)


@pytest.mark.skipif(listed_cache_bytes() is None, reason="no cache is listed")
def test_the_cache_is_no_larger_than_the_system_says() -> None:
    """A C library may know only what the hypervisor's host has; writing past a cache that is not there is slow."""
    listed = listed_cache_bytes()
    assert listed is not None
    assert 0 < _backends.cache_bytes() <= listed
