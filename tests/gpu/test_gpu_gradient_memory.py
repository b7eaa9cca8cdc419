"""Weights in the place of gradients on GPU kernels, without a GPU: the bits of backups, and launches that fail."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import gpu_simulator
import pytest
import torch
from oracle_optimizer import bits
from paths import has_plan, no_plans, observed
from torch import nn

from rst_fused import RST, _backends
from rst_fused._step import release

pytestmark = [pytest.mark.usefixtures("one_thread"), gpu_simulator.needed]
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
SHAPES = ((5, 7), (33,), (), (0,))
STEPS = 6
CASES: dict[str, dict[str, Any]] = {
    "sgd": {}, "nesterov": {"momentum": 0.9, "nesterov": True}, "asam": {"adaptive": True, "eta": 0.01},
    "adamw": {"base": "adamw"}, "amsgrad": {"base": "adam", "amsgrad": True}, "lion": {"base": "lion", "lr": 0.01},
    "remainders": {"base": "adamw", "master_weights": "remainder"},
}  # fmt: skip


def make(*dtypes: torch.dtype, **options: Any) -> tuple[list[nn.Parameter], RST]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for dtype in dtypes for s in SHAPES]
    return params, RST(params, **{"lr": 0.05, "schedule": 1.0, "backend": "simulated", **options})


def give(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = p.detach() / 2 + torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("plans", [True, False], ids=["plan", "ops"])
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F32, F64)], ids=["float32", "bfloat16", "both"])
@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_steps_with_backups(
    case: str, dtypes: tuple[torch.dtype, ...], plans: bool, simulator: gpu_simulator.Simulator
) -> None:
    seen = []
    with nullcontext() if plans else no_plans():
        for holds in (False, True):
            params, opt = make(*dtypes, **CASES[case], stochastic_rounding=BF16 in dtypes)
            for t in range(STEPS):
                give(params, 2 * t)
                held = [p.grad for p in params if holds]
                opt.perturb()
                held.clear()
                give(params, 2 * t + 1)
                opt.step()
            assert has_plan(opt) == plans and len(opt._step_state.backups) == (len(params) if holds else 0)
            seen.append(observed(params, opt))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("plans", [True, False], ids=["plan", "ops"])
@pytest.mark.parametrize("warm", [True, False], ids=["later step", "first step"])
@pytest.mark.parametrize("fails", [0, 1, 2, 3])
def test_a_launch_that_fails_in_the_middle_of_perturb(
    fails: int, warm: bool, plans: bool, simulator: gpu_simulator.Simulator
) -> None:
    """Norm and perturbation of two dtypes: four launches. The weights are back, and no gradient holds any."""
    params, opt = make(F32, F64)
    launch, launches = simulator.launch, 0

    def failing(*args: Any) -> None:
        nonlocal launches
        launches += 1
        if launches == fails + 1:
            raise RuntimeError("this launch fails")
        launch(*args)

    with nullcontext() if plans else no_plans():
        for t in range(2 if warm else 0):
            give(params, 2 * t)
            opt.perturb()
            give(params, 2 * t + 1)
            opt.step()
        give(params, 8)
        before, gradients = bits(params), [bits([p.grad]) for p in params if p.grad is not None]
        _backends.plan_extension().simulate_gpu(failing)
        with pytest.raises(RuntimeError, match="this launch fails"):
            opt.perturb()
        assert launches > fails
        _backends.plan_extension().simulate_gpu(launch)
        assert bits(params) == before
        assert all(p.grad is None or bits([p.grad]) == g for p, g in zip(params, gradients, strict=True))
        opt.restore()
        assert bits(params) == before and not opt._step_state.saved and not opt._step_state.perturbed
        give(params, 8)
        opt.perturb()
        opt.restore()
        assert bits(params) == before


def test_an_update_within_a_backward_that_fails_between_launches(
    simulator: gpu_simulator.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of all are back, those of the first launch too, and nothing is counted."""
    params, opt = make(F32, F64, base="adam", release_gradients=True)
    monkeypatch.setattr(release, "BUCKET", sum(p.nbytes for p in params))
    launch, launches = simulator.launch, 0

    def failing(*args: Any) -> None:
        nonlocal launches
        launches += 1
        if launches == 2:
            raise RuntimeError("this launch fails")
        launch(*args)

    def passes(t: int) -> None:
        noise = torch.Generator().manual_seed(t)
        sum((p * torch.randn(p.shape, generator=noise).to(p)).sum() for p in params).backward()

    def step(t: int) -> None:
        passes(t)
        opt.perturb()
        passes(t + 1)
        opt.step()

    step(0)
    before = bits(params)
    passes(2)
    opt.perturb()
    _backends.plan_extension().simulate_gpu(failing)
    with pytest.raises(RuntimeError, match="this launch fails"):
        passes(3)
    _backends.plan_extension().simulate_gpu(launch)
    opt.restore()
    assert launches == 2 and bits(params) == before and opt.steps == 1
    step(4)
    assert opt.steps == 2 and all(p.isfinite().all() for p in params)
