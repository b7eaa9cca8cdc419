"""release_gradients=True on the Triton backend: plans perturb, and the ops update parameters within the backward.

Collected by test_triton_plan only, in processes where a plugin runs the kernels on CPU tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle_optimizer import bits
from paths import observed
from torch import nn
from triton_plan_checks import Run

from rst_fused import RST
from rst_fused._step import release
from rst_fused.kernels import launch_groups

pytestmark = pytest.mark.usefixtures("one_thread")


def backward(run: Run, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    aims = [torch.randn(p.shape, generator=generator) for p in run.params]
    torch.stack([(p.float() - aim).square().sum() for p, aim in zip(run.params, aims, strict=True)]).sum().backward()


@pytest.mark.parametrize(
    ("base", "bucket"), [("sgd", 1), ("adamw", 1), ("adamw", 100), ("plain-mixed", 100), ("remainders-asam", 1)]
)
def test_the_bits_of_a_run_without_it(monkeypatch: pytest.MonkeyPatch, base: str, bucket: int) -> None:
    """With 1 byte every parameter is updated at once, with 100 some are left for step(). One step is a base step."""
    monkeypatch.setattr(release, "BUCKET", bucket)
    found = []
    for released in (False, True):
        run = Run(base, release_gradients=released, schedule=lambda t: t != 1)
        for t in range(4):
            backward(run, 2 * t)
            sam = run.opt.perturb()
            if sam:
                backward(run, 2 * t + 1)
            left = [p for p in run.params if p.grad is not None]
            assert len(left) < len(run.params) if released else len(left) == len(run.params)
            run.opt.step()
            run.opt.zero_grad()
        assert not run.opt._step_state.saved and not run.opt._step_state.released
        found.append(observed(run.params, run.opt))
    assert found[0] == found[1] and found[0]["sam_steps"] == 3


def test_an_update_that_fails_between_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the first launch are updated and counted, and the others go back to their weights."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(5, generator=generator).to(d)) for d in (torch.float32, torch.float64)]
    monkeypatch.setattr(release, "BUCKET", sum(p.nbytes for p in params))
    opt = RST(params, "adam", lr=0.05, schedule=1.0, backend="triton", release_gradients=True)
    starter, calls = launch_groups.starter, []

    def failing(*variant: Any) -> Any:
        start = starter(*variant)

        def run(*args: Any) -> None:
            calls.append(0)
            if len(calls) == 2:
                raise RuntimeError("this launch fails")
            start(*args)

        return run

    def step(t: int, then: Any = lambda: None) -> None:
        for seed in (2 * t, 2 * t + 1):
            generator.manual_seed(seed)
            sum((p * torch.randn(5, generator=generator).to(p)).sum() for p in params).backward()  # type: ignore[union-attr]
            if seed % 2 == 0:
                opt.perturb()
                then()

    step(0)
    opt.step()
    before = [(bits([p]), {k: bits([v]) for k, v in opt.state[p].items()}) for p in params]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="this launch fails"):
        step(1, lambda: patch.setattr(launch_groups, "starter", failing))
    opt.restore()
    after = [(bits([p]), {k: bits([v]) for k, v in opt.state[p].items()}) for p in params]
    moved = [a[0] != b[0] for a, b in zip(after, before, strict=True)]
    assert sorted(moved) == [False, True] and len(calls) == 2 and opt.steps == 1
    assert [float(opt.state[p]["step"]) for p in params] == [1.0 + m for m in moved]
    assert [a == b for a, b in zip(after, before, strict=True)] == [not m for m in moved]
    step(2)
    opt.step()
    assert [float(opt.state[p]["step"]) for p in params] == [2.0 + m for m in moved]
