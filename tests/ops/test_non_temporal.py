"""Data larger than the caches is written past them: when, and that it changes nothing but time."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import op_db
import pytest
import torch
from op_db import Sample
from torch import Tensor
from triton_processes import run_python

from benchmarks.record import cache_bytes as listed_cache_bytes
from rst_fused import _backends

host = _backends.plan_extension()
LEVELS = [] if host is None else list(host.simd_levels())
pytestmark = pytest.mark.skipif(host is None, reason="the extension is not built: there are no CPU kernels")
AUTOMATIC, NEVER, ALWAYS = -1, 2**63 - 1, 0
VARIABLE = "RST_FUSED_NON_TEMPORAL_THRESHOLD"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    host.set_non_temporal_threshold(AUTOMATIC)
    yield
    host.set_non_temporal_threshold(int(os.environ.get(VARIABLE) or AUTOMATIC))
    torch.set_num_threads(threads)
    assert host.select_simd(os.environ.get("RST_FUSED_SIMD") or "auto")


_BUFFER, _MOMENTS = ("momentum_buffers",), ("exp_avgs", "exp_avg_sqs")
_STATS = torch.tensor([1.0, 1.0, 0, 0, 0, 1.0], dtype=torch.float64)
_DIRECT = {"stats": _STATS, "rho": 10.0, "seed": 3, "step": 4}
_MOMENTUM = {"lr": 0.1, "momentum": 0.9}
WRITTEN: list[tuple[str, tuple[str, ...], torch.dtype, dict[str, Any]]] = [
    ("perturb_", ("backups",), torch.float32, _DIRECT),
    ("perturb_", ("backups",), torch.float64, _DIRECT),
    ("perturb_", ("backups",), torch.bfloat16, _DIRECT),
    ("perturb_", ("backups",), torch.float16, _DIRECT),
    ("perturb_", ("masters",), torch.float16, {**_DIRECT, "backups": None}),
    ("restore_sgd_step_", ("backups", *_BUFFER), torch.float32, _MOMENTUM),
    ("restore_sgd_step_", ("masters", *_BUFFER), torch.bfloat16, {**_MOMENTUM, "backups": None}),
    ("restore_adam_step_", ("backups", *_MOMENTS), torch.float16, {"lr": 0.1, "step": 3}),
]


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "one element off"])
@pytest.mark.parametrize(("op", "lists", "dtype", "options"), WRITTEN)
def test_results_are_the_same_bits(
    op: str, lists: tuple[str, ...], dtype: torch.dtype, options: dict[str, Any], shift: int
) -> None:
    """Past the caches or not, at each level, on one thread and on several, which share the work in two ways."""
    block = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * 0.1

    def sample() -> Sample:
        made: dict[str, list[Tensor]] = {}
        for k, name in enumerate(("params", "grads", *lists)):
            wide = "masters" in lists and name in ("masters", *_BUFFER)
            made[name] = []
            for n in (600_011, 5, 70_000):
                values = (block.roll(k).abs() if name == "exp_avg_sqs" else block.roll(k)).repeat(10)[:n]
                whole = torch.empty(n + shift, dtype=torch.float32 if wide else dtype)
                made[name].append(whole[shift:].copy_(values))
        return Sample(made, options)

    expected: Sample | None = None
    for level in LEVELS:
        assert host.select_simd(level)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for threshold in (NEVER, ALWAYS):
                host.set_non_temporal_threshold(threshold)
                found = sample()
                found.run(op, "cpu")
                if expected is None:
                    expected = found
                for name, tensors in found.lists.items():
                    for t, other in zip(tensors, expected.lists[name], strict=True):
                        assert op_db.same_bits(t, other), f"{name}, {level}, {threads} threads, {threshold}"


def test_the_default_follows_the_caches() -> None:
    """The formula itself is tested in C++, with the caches of other machines."""
    own, last = host.core_cache_bytes(), host.cache_bytes()
    assert 0 < own <= last
    for threads in (1, 2, 1000):
        of_threads = 2 * threads * own
        assert host.non_temporal_threshold(threads) in {min(last, of_threads), min(last, max(of_threads, last // 2))}
    torch.set_num_threads(2)
    assert _backends.non_temporal_threshold() == host.non_temporal_threshold(2)
    host.set_non_temporal_threshold(12345)
    assert host.non_temporal_threshold(1) == host.non_temporal_threshold(2) == 12345


@pytest.mark.skipif(listed_cache_bytes() is None, reason="no cache is listed")
def test_the_cache_is_no_larger_than_the_system_says() -> None:
    """A C library may know only what the hypervisor's host has; a cache that is not there keeps nothing."""
    listed = listed_cache_bytes()
    assert listed is not None
    assert 0 < _backends.cache_bytes() <= listed


def in_a_process(value: str) -> subprocess.CompletedProcess[str]:
    return run_python(
        "-c", "from rst_fused import _backends; print(_backends.non_temporal_threshold())", **{VARIABLE: value}
    )


@pytest.mark.parametrize("value", ["0", "1000000", str(2**63 - 1)])
def test_a_variable_of_the_environment_is_another_threshold(value: str) -> None:
    done = in_a_process(value)
    assert done.stdout.strip() == value, done.stderr


def test_an_empty_variable_is_none() -> None:
    assert in_a_process("").stdout.strip() == str(_backends.non_temporal_threshold())


@pytest.mark.parametrize("value", ["-1", "4MB", "1e6", " 5", str(2**63), "9" * 5000, "\u0663"])
def test_what_is_no_number_of_bytes_is_refused(value: str) -> None:
    done = in_a_process(value)
    assert done.returncode != 0
    assert f"{VARIABLE}={value!r}: expected a number of bytes below 2**63, such as 16777216" in done.stderr
