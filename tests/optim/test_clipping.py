"""max_grad_norm: clipping by the norm of what an update applies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from paths import every_executor, has_plan
from torch import Tensor

from rst_fused import RST
from rst_fused.schedule import draw

SHAPES = ((7, 5), (3,), (0, 2), (4, 1, 3))
# float32: the factor is rounded once more than in a loop that multiplies gradients, and each gradient once.
TOLERANCE = 2e-6


def params_and_grads(steps: int) -> tuple[list[Tensor], list[list[list[Tensor]]]]:
    """Parameters, and for every step gradients of both passes."""
    generator = torch.Generator().manual_seed(0)

    def tensors() -> list[Tensor]:
        return [torch.randn(shape, generator=generator) for shape in SHAPES]

    return [torch.nn.Parameter(p) for p in tensors()], [[tensors(), tensors()] for _ in range(steps)]


def run(opt: RST, params: list[Tensor], grads: list[list[list[Tensor]]], scale: float = 1.0) -> list[float]:
    """The norms of what was applied."""
    norms = []
    for first, second in grads:
        for p, g in zip(params, first, strict=True):
            p.grad = g * scale
        if opt.perturb():
            for p, g in zip(params, second, strict=True):
                p.grad = g * scale
        if scale != 1.0:
            opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(0.0)
        opt.step()
        if scale != 1.0:
            del opt.grad_scale, opt.found_inf
        norms.append(opt.last_update_norm)
    return norms


def expected(
    params: list[Tensor], grads: list[list[list[Tensor]]], fired: list[bool], gamma: float, most: float, lr: float
) -> tuple[list[Any], list[float]]:
    """SGD with momentum 0.9 in float64: mixes, clips as torch.nn.utils.clip_grad_norm_ documents it, updates."""
    weights = [p.detach().double().numpy() for p in params]
    momenta = [np.zeros_like(w) for w in weights]
    norms = []
    for (first, second), sam in zip(grads, fired, strict=True):
        one, two = ([g.double().numpy() for g in pair] for pair in (first, second))
        applied = [(1 - gamma) * a + gamma * b for a, b in zip(one, two, strict=True)] if sam else one
        norms.append(math.sqrt(sum(float((g * g).sum()) for g in applied)))
        factor = min(1.0, most / (norms[-1] + 1e-6))
        for i, g in enumerate(applied):
            momenta[i] = 0.9 * momenta[i] + factor * g
            weights[i] = weights[i] - lr * momenta[i]
    return weights, norms


@every_executor
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("gamma", [1.0, 2.0])
@pytest.mark.parametrize("most", [1.5, 1e3])
def test_clips_what_the_update_applies(served_by: str, executor: str, most: float, gamma: float, scale: float):
    params, grads = params_and_grads(8)
    opt = RST(params, lr=0.1, momentum=0.9, schedule=0.5, gamma=gamma, max_grad_norm=most, backend=served_by, seed=0)
    before = [p.detach().clone() for p in params]
    fired = [draw(0, t, 0.5) for t in range(8)]
    norms = run(opt, params, grads, scale)
    weights, expected_norms = expected(before, grads, fired, gamma, most, 0.1)
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    assert any(norm > 1.5 for norm in norms) and True in fired and False in fired
    for p, w in zip(params, weights, strict=True):
        assert np.abs(p.detach().double().numpy() - w).max(initial=0.0) <= TOLERANCE
    assert has_plan(opt) == (executor == "cpu plan")


@every_executor
def test_equals_clip_grad_norm_before_adamw(served_by: str):
    params, grads = params_and_grads(6)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    opt = RST(params, "adamw", lr=0.01, schedule=0.0, max_grad_norm=1.0, backend=served_by)
    theirs = torch.optim.AdamW(others, lr=0.01)
    run(opt, params, grads)
    for first, _ in grads:
        for p, g in zip(others, first, strict=True):
            p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        theirs.step()
    for p, other in zip(params, others, strict=True):
        torch.testing.assert_close(p, other, rtol=1e-5, atol=TOLERANCE)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_around_an_optimizer_instance(scale: float):
    params, grads = params_and_grads(6)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    around = RST(base=torch.optim.SGD(params, lr=0.1, momentum=0.9), gamma=2.0, max_grad_norm=1.0)
    fused = RST(others, lr=0.1, momentum=0.9, gamma=2.0, max_grad_norm=1.0)
    assert run(around, params, grads, scale) == pytest.approx(run(fused, others, grads, scale), rel=1e-6)
    for p, other in zip(params, others, strict=True):
        torch.testing.assert_close(p, other, rtol=1e-5, atol=TOLERANCE)


def test_compiled_as_eager():
    params, grads = params_and_grads(5)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    eager, compiled = (
        RST(ps, lr=0.1, momentum=0.9, schedule=0.5, gamma=2.0, max_grad_norm=1.0) for ps in (params, others)
    )
    run(eager, params, grads)
    perturb = torch.compile(lambda fire: compiled.perturb(fire), fullgraph=True)
    step = torch.compile(lambda: compiled.step(), fullgraph=True)
    for first, second in grads:
        for p, g in zip(others, first, strict=True):
            p.grad = g.clone()
        if perturb(compiled.draw()):
            for p, g in zip(others, second, strict=True):
                p.grad = g.clone()
        step()
    for p, other in zip(params, others, strict=True):
        torch.testing.assert_close(p, other, rtol=0, atol=TOLERANCE)
    assert compiled.last_update_norm == pytest.approx(eager.last_update_norm, rel=1e-6)


def test_an_overflow_skips_the_step_all_the_same():
    params, grads = params_and_grads(1)
    opt = RST(params, lr=0.1, schedule=1.0, gamma=2.0, max_grad_norm=1.0)
    before = [p.detach().clone() for p in params]
    for p, g in zip(params, grads[0][0], strict=True):
        p.grad = g.clone()
    opt.perturb()
    for p, g in zip(params, grads[0][1], strict=True):
        p.grad = g * math.inf
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    opt.step()
    assert all(p.equal(w) for p, w in zip(params, before, strict=True))


@pytest.mark.parametrize(("given", "error"), [(-1.0, ValueError), (math.nan, ValueError), ("1", TypeError)])
def test_refuses(given: Any, error: type[Exception]):
    with pytest.raises(error, match="max_grad_norm"):
        RST([torch.zeros(3, requires_grad=True)], max_grad_norm=given)
    opt = RST([torch.zeros(3, requires_grad=True)], max_grad_norm=1.0)
    with pytest.raises(error, match="max_grad_norm"):
        opt.max_grad_norm = given
    assert opt.max_grad_norm == 1.0


def test_no_norm_is_known_where_none_was_asked_for():
    params, grads = params_and_grads(1)
    opt = RST(params, lr=0.1)
    assert all(math.isnan(norm) for norm in run(opt, params, grads))
