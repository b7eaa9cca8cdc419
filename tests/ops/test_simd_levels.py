"""Every SIMD level this processor can run computes the same bits: a run can move between machines."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import op_db
import pytest
import torch
from op_db import OPS, Sample
from torch import Tensor
from triton_processes import run_python

from rst_fused import _backends, ops

host = _backends.plan_extension()
LEVELS = [] if host is None else list(host.simd_levels())
pytestmark = [
    pytest.mark.skipif(host is None, reason="the extension is not built: there are no SIMD levels"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def level_in_use() -> Iterator[None]:
    yield
    assert host.select_simd(os.environ.get("RST_FUSED_SIMD") or "auto")


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
    for name in ("", "sse", "AVX2", "Auto", "avx1024"):
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


def zen4() -> bool:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    return "AuthenticAMD" in text and re.search(r"^cpu family\s*: 25$", text, re.M) is not None and "avx512" in LEVELS


def test_a_level_that_was_chosen_is_that_of_all_data() -> None:
    for level in LEVELS:
        assert host.select_simd(level)
        assert host.simd_level() == host.simd_level_from_memory() == level
    assert host.select_simd("auto")
    assert host.simd_level() == LEVELS[-1]
    assert host.simd_level_from_memory() == ("avx2" if zen4() else LEVELS[-1])


@pytest.mark.parametrize("value", ["auto", *LEVELS, "avx1024"])
def test_a_variable_of_the_environment_chooses_a_level(value: str) -> None:
    code = "from rst_fused import _backends; print(_backends.simd_level())"
    done = run_python("-c", code, RST_FUSED_SIMD=value)
    if value == "avx1024":
        assert done.returncode != 0 and f"RST_FUSED_SIMD='avx1024': expected auto or one of {LEVELS}" in done.stderr
    else:
        assert done.stdout.strip() == (LEVELS[-1] if value == "auto" else value), done.stderr


@pytest.mark.skipif(host is None or host.cache_bytes() > 2**26, reason="data larger than these caches is large")
def test_data_larger_than_all_caches() -> None:
    """Of which some processors take a part with vectors of another level than the rest, unless a level was chosen."""
    n = int(host.cache_bytes()) // torch.float32.itemsize + 4321
    g = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).repeat(-(-n // (1 << 16)))[:n]
    found = []
    for level in ("plain", "auto"):
        assert host.select_simd(level)
        w, backup = torch.ones(n), torch.empty(n)
        stats = ops.grad_norm([g], backend="cpu")
        ops.perturb_([w], [g], [backup], stats, rho=10.0, backend="cpu")
        perturbed = w.clone()
        ops.restore_sgd_step_([w], [g], [backup], lr=0.1, backend="cpu")
        found.append((stats[:2], perturbed, w))
    for one, other in zip(*found, strict=True):
        assert op_db.same_bits(one, other)


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
