"""SAM under the names of other packages: an optimizer class as base, first_step / second_step, base_optimizer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from oracle_optimizer import BACKENDS, Problem, bits
from torch import nn

from rst_fused import RST, SAM

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
PROBLEM = Problem([(5,), (3, 4), (33,)], 20)


def trained(opt: RST, params: list[nn.Parameter], steps: int = 6) -> list[bytes]:
    for t in range(steps):
        opt.step(lambda t=t: PROBLEM.backward(params, t))
    return bits(params)


CLASSES: list[tuple[type[torch.optim.Optimizer], str, dict[str, Any]]] = [
    (torch.optim.SGD, "sgd", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    (torch.optim.SGD, "sgd", {"lr": 0.05, "foreach": None, "fused": False}),
    (torch.optim.Adam, "adam", {"lr": 0.01, "betas": (0.8, 0.9), "amsgrad": False}),
    (torch.optim.AdamW, "adamw", {"lr": 0.01}),
]


@every_backend
@pytest.mark.parametrize("case", CLASSES, ids=lambda c: ",".join((c[1], *c[2])))
@pytest.mark.parametrize("form", ["base", "base_optimizer", "position"])
def test_class_of_a_fused_base_is_that_base(form: str, case: Any, backend: str) -> None:
    """With what the class gives where nothing is asked for: its defaults and its arithmetic."""
    cls, base, hyper = case
    params, others, thirds = (PROBLEM.parameters(torch.float64) for _ in range(3))
    if form == "position":
        opt = SAM(params, cls, 0.2, True, backend=backend, **hyper)
    else:
        opt = SAM(params, **{form: cls}, rho=0.2, adaptive=True, backend=backend, **hyper)
    assert opt.base is None and opt.base_optimizer is opt and f"base={base}," in repr(opt)
    known = {k: v for k, v in hyper.items() if v not in (None, False)}
    twin = RST(others, base=base, rho=0.2, adaptive=True, schedule=1.0, backend=backend, **known)
    assert trained(opt, params) == trained(twin, others)
    assert (opt.steps, opt.sam_steps) == (6, 6)
    wrapped = RST(base=cls(thirds, **hyper), rho=0.2, adaptive=True, schedule=1.0, backend=backend)
    trained(wrapped, thirds)
    for p, q in zip(params, thirds, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)  # float64, rounded in another order


@every_backend
@pytest.mark.parametrize("option", ["foreach", "fused"])
def test_option_that_no_fused_base_has_keeps_the_class(option: str, backend: str) -> None:
    params = PROBLEM.parameters(torch.float32)
    opt = SAM(params, torch.optim.AdamW, lr=0.01, seed=3, eta=0.1, backend=backend, **{option: True})
    assert type(opt.base) is torch.optim.AdamW and opt.base_optimizer is opt.base and opt.seed == 3
    assert opt.base.param_groups[0][option] is True
    before = bits(params)
    assert trained(opt, params) != before


@pytest.mark.parametrize("option", ["fused", "decoupled_weight_decay"])
def test_option_of_one_group_keeps_the_class(option: str) -> None:
    groups = [{"params": [p]} for p in PROBLEM.parameters(torch.float32)]
    groups[1][option] = True
    opt = SAM(groups, torch.optim.Adam, lr=0.01)
    assert type(opt.base) is torch.optim.Adam and opt.base.param_groups[1][option] is True
    groups = [{"params": [p], option: False, "name": "layer"} for p in PROBLEM.parameters(torch.float32)]
    assert SAM(groups, torch.optim.Adam, lr=0.01).base is None


@every_backend
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_amsgrad_is_fused_too(cls: Any, backend: str) -> None:
    params, others = PROBLEM.parameters(torch.float64), PROBLEM.parameters(torch.float64)
    opt = SAM(params, cls, lr=0.01, amsgrad=True, backend=backend)
    assert opt.base is None and opt.param_groups[0]["amsgrad"] is True
    wrapped = RST(base=cls(others, lr=0.01, amsgrad=True), schedule=1.0, backend=backend)
    trained(opt, params)
    trained(wrapped, others)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)  # float64, rounded in another order
        torch.testing.assert_close(opt.state[p]["max_exp_avg_sq"], wrapped.state[q]["max_exp_avg_sq"])


class Own(torch.optim.SGD):
    """Not torch.optim.SGD itself, so that its step must run."""


def test_class_derived_from_a_fused_one_is_left_alone() -> None:
    assert type(SAM([nn.Parameter(torch.ones(2))], Own, lr=0.1).base) is Own


def test_master_weights_and_model_reach_the_fused_base() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).bfloat16()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, master_weights=True, model=model)

    def closure() -> None:
        opt.zero_grad()
        model(torch.randn(8, 4, dtype=torch.bfloat16)).square().sum().backward()

    opt.step(closure)
    assert all(opt.state[p]["master"].dtype == torch.float32 for p in model.parameters())
    assert int(model[1].num_batches_tracked) == 1


@every_backend
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adagrad])
def test_loop_written_for_the_best_known_package(cls: Any, backend: str) -> None:
    """Its usual training loop, with a scheduler on base_optimizer; every step is a SAM step."""
    params, others = PROBLEM.parameters(torch.float64), PROBLEM.parameters(torch.float64)
    optimizer = SAM(params, cls, rho=0.2, adaptive=False, lr=0.1, backend=backend)
    plain = cls(others, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base_optimizer, 2, 0.5)
        reference = torch.optim.lr_scheduler.StepLR(plain, 2, 0.5)
        for t in range(20):
            PROBLEM.backward(params, t)
            optimizer.first_step(zero_grad=True)
            PROBLEM.backward(params, t)
            optimizer.second_step(zero_grad=True)
            scheduler.step()
            weights = [q.detach().clone() for q in others]
            PROBLEM.backward(others, t)
            norm = torch.cat([q.grad.flatten() for q in others]).norm()
            with torch.no_grad():
                for q in others:
                    q += 0.2 * q.grad / (norm + 1e-12)
            PROBLEM.backward(others, t)
            with torch.no_grad():
                for q, w in zip(others, weights, strict=True):
                    q.copy_(w)
            plain.step()
            reference.step()
            assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
            assert (optimizer.steps, optimizer.sam_steps) == (t + 1, t + 1)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)  # float64, rounded in another order


def test_every_step_is_a_sam_step() -> None:
    p = nn.Parameter(torch.ones(3))
    assert all(SAM([p], seed=seed).draw() for seed in range(300))  # p = 0.9 would pass with 0.9^300


def test_wrong_arguments() -> None:
    p = nn.Parameter(torch.ones(3))
    for name in ("schedule", "gamma"):
        with pytest.raises(TypeError, match=rf"SAM takes no {name}, given 0\.5: .*use RST"):
            SAM([p], lr=0.1, **{name: 0.5})
    with pytest.raises(TypeError, match="params=None"):
        SAM(None, torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match=r"base='adam' and base_optimizer=.*SGD.*: expected one of them"):
        SAM([p], "adam", base_optimizer=torch.optim.SGD)
    for value in (0.9, 0, False, None, torch.ones(2)):
        with pytest.raises(TypeError, match="momentun"):
            SAM([p], torch.optim.SGD, lr=0.1, momentun=value)
    with pytest.raises(ValueError, match=r"rho=-1: expected"):
        SAM([p], torch.optim.SGD, -1, lr=0.1)
