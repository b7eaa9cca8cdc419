"""Numbers that are set in the param_groups after construction: by hand, by a scheduler, by load_state_dict."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle_optimizer import BACKENDS, Problem, bits
from torch import nn

from rst_fused import RST, ops
from rst_fused._step.rules import check_current

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
PROBLEM = Problem([(5,), (3, 4)], 10)
MODES: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "flags": {"momentum": 0.9, "dampening": 0.5},  # no launch plan
    "adam": {"base": "adam"},
    "lion": {"base": "lion"},
    "instance": {},
}


def make(mode: str, backend: str) -> tuple[list[nn.Parameter], RST]:
    params = PROBLEM.parameters(torch.float32)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.01, "rho": 0.1}]
    if mode == "instance":
        groups[1].pop("rho")
        return params, RST(base=torch.optim.SGD(groups, lr=0.05), schedule=1.0, backend=backend)
    return params, RST(groups, lr=0.05, schedule=1.0, backend=backend, **MODES[mode])


def everything(params: list[nn.Parameter], opt: RST) -> Any:
    state = [bits([v for _, v in sorted(opt.state.get(p, {}).items()) if v is not None]) for p in params]
    return bits(params), state, (opt.steps, opt.sam_steps, opt._step_state.perturbed)


def by_closure(params: list[nn.Parameter], opt: RST, t: int) -> None:
    opt.step(lambda: PROBLEM.backward(params, t))


def by_phases(params: list[nn.Parameter], opt: RST, t: int) -> None:
    PROBLEM.backward(params, t)
    opt.perturb()
    PROBLEM.backward(params, t)
    opt.step()


def by_draw(params: list[nn.Parameter], opt: RST, t: int) -> None:
    """What comes before a compiled step, which cannot look at its numbers."""
    opt.draw()
    by_phases(params, opt, t)


FORMS: tuple[Callable[..., None], ...] = (by_closure, by_phases, by_draw)
WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("rho", -0.1, ValueError, r"=-0\.1: expected a finite number >= 0"),
    ("rho", math.nan, ValueError, r"=nan: expected a finite number >= 0"),
    ("rho", math.inf, ValueError, r"=inf: expected a finite number >= 0"),
    ("rho", "0.1", TypeError, r"='0\.1': expected a number, got str"),
    ("rho", None, TypeError, r"=None: expected a number, got NoneType"),
    ("rho", torch.tensor(-1.0), ValueError, r"=tensor\(-1\.\): expected a finite number >= 0"),
    ("rho", torch.ones(2), ValueError, r" is a tensor of shape \(2,\): expected a number"),
    ("lr", math.nan, ValueError, r"=nan: expected a finite number$"),
    ("lr", -math.inf, ValueError, r"=-inf: expected a finite number$"),
    ("lr", None, TypeError, r"=None: expected a number, got NoneType"),
    ("lr", torch.tensor(math.nan), ValueError, r"=tensor\(nan\): expected a finite number$"),
    ("weight_decay", "0.1", TypeError, r"='0\.1': expected a number, got str"),
    ("momentum", math.nan, ValueError, r"=nan: expected a finite number$"),
    ("dampening", math.nan, ValueError, r"=nan: expected a finite number$"),
    ("betas", (0.9, math.nan), ValueError, r"\[1\]=nan: expected a number in \[0, 1\)$"),
    ("betas", (1.0, 0.999), ValueError, r"\[0\]=1\.0: expected a number in \[0, 1\)$"),
    ("betas", (0.9,), ValueError, r"=\(0\.9,\): expected a pair \(beta1, beta2\)$"),
    ("betas", 0.9, ValueError, r"=0\.9: expected a pair \(beta1, beta2\)$"),
    ("eps", math.inf, ValueError, r"=inf: expected a finite number$"),
]


def has(mode: str, name: str) -> bool:
    """An optimizer instance looks at all its numbers but rho itself."""
    return name == "rho" or (mode != "instance" and name in make(mode, BACKENDS[0])[1].param_groups[1])


every_case = pytest.mark.parametrize(
    ("mode", "case"),
    [
        pytest.param(mode, case, id=f"{mode}-{case[0]}={case[1]!r}")
        for mode in MODES
        for case in WRONG
        if has(mode, case[0])
    ],
)


@every_backend
@pytest.mark.parametrize("form", FORMS)
@every_case
def test_refused_before_anything_is_changed(case: Any, form: Any, mode: str, backend: str) -> None:
    """By group, name, value and limits; with the value of before it goes on like a twin that never saw it."""
    name, value, error, message = case
    params, opt = make(mode, backend)
    others, twin = make(mode, backend)
    for t in range(2):
        form(params, opt, t)
        form(others, twin, t)
    before, usual = everything(params, opt), opt.param_groups[1][name]
    opt.param_groups[1][name] = value
    for _ in range(2):
        with pytest.raises(error, match=rf"param_groups\[1\]\['{name}'\]{message}"):
            form(params, opt, 2)
        assert everything(params, opt) == before
    opt.param_groups[1][name] = usual
    for t in range(2, 5):
        form(params, opt, t)
        form(others, twin, t)
    assert everything(params, opt) == everything(others, twin)


@every_backend
def test_tensor_that_turns_negative_in_place(backend: str) -> None:
    params, opt = make("sgd", backend)
    rho = opt.param_groups[0]["rho"] = torch.tensor(0.1)
    by_closure(params, opt, 0)
    before = everything(params, opt)
    rho.neg_()
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['rho'\]=tensor\(-0\.1"):
        by_closure(params, opt, 1)
    assert everything(params, opt) == before


def test_tensor_on_a_device_is_not_waited_for() -> None:
    """A meta tensor stands for it: reading its number would raise."""
    elsewhere = torch.tensor(-1.0, device="meta")
    check_current(0, {"rho": elsewhere, "betas": (elsewhere, 0.9)}, ("rho", "betas"), 0.0)


@every_backend
@pytest.mark.parametrize("mode", ["sgd", "adam"])
def test_learning_rate_below_zero_is_taken_as_in_torch(mode: str, backend: str) -> None:
    """A scheduler that ends at 0 may come out an ulp below it."""
    params, opt = make(mode, backend)
    others = PROBLEM.parameters(torch.float32)
    plain = torch.optim.SGD(others, momentum=0.9) if mode == "sgd" else torch.optim.Adam(others)
    for group in (*opt.param_groups, *plain.param_groups):
        group["lr"] = -0.01
    for t in range(3):
        PROBLEM.backward(params, t)
        opt.step()
        PROBLEM.backward(others, t)
        plain.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@every_backend
@every_case
def test_state_dict_with_such_a_number_is_not_loaded(case: Any, mode: str, backend: str) -> None:
    name, value, error, message = case
    params, opt = make(mode, backend)
    by_closure(params, opt, 0)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][1][name] = value
    by_closure(params, opt, 1)
    before, groups = everything(params, opt), repr(opt.param_groups)
    with pytest.raises(error, match=rf"state_dict: param_groups\[1\]\['{name}'\]{message}"):
        opt.load_state_dict(saved)
    assert everything(params, opt) == before and repr(opt.param_groups) == groups
    by_closure(params, opt, 2)


@every_backend
@pytest.mark.parametrize("way", ["new", "copied", "pickled"])
def test_another_schedule_or_gamma_in_mid_run(way: str, backend: str) -> None:
    """As from the constructor, and gamma="match" goes with the current schedule."""
    params = PROBLEM.parameters(torch.float32)
    opt = RST(params, lr=0.01, schedule=1.0, gamma="match", backend=backend)
    if way != "new":
        opt = copy.deepcopy(opt) if way == "copied" else pickle.loads(pickle.dumps(opt))
        params = [p for group in opt.param_groups for p in group["params"]]
    by_phases(params, opt, 0)
    assert opt._step_state.gamma == 1.0
    opt.schedule = 0.5
    by_phases(params, opt, 1)
    assert (opt._step_state.gamma, repr(opt.schedule)) == (2.0, repr(RST(params, schedule=0.5).schedule))
    opt.gamma = 1.5
    opt.schedule = 0.25
    by_phases(params, opt, 2)
    assert opt._step_state.gamma == 1.5
    opt.gamma = "match"
    by_phases(params, opt, 3)
    assert opt._step_state.gamma == 4.0
    for name, value, expected in (("schedule", 1.5, r"schedule=1\.5"), ("gamma", "foo", "gamma='foo'")):
        with pytest.raises(ValueError, match=expected):
            setattr(opt, name, value)
    by_phases(params, opt, 4)
    assert (opt._step_state.gamma, opt.steps) == (4.0, 5)


@every_backend
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_another_default_device(base: str, backend: str) -> None:
    """torch.set_default_device concerns tensors of the user; ours lie where the parameters are."""
    results = []
    for device in ("cpu", "meta"):
        params = PROBLEM.parameters(torch.float32)
        with torch.device(device):
            opt = RST(params, base, lr=0.01, schedule=1.0, gamma=1.5, backend=backend)
            with torch.device("cpu"):
                gradients = [[torch.full_like(p, t + 1) for p in params] for t in range(8)]
            for t in range(4):
                for phase, finish in enumerate((opt.perturb, opt.step)):
                    for p, g in zip(params, gradients[2 * t + phase], strict=True):
                        p.grad = g
                    finish()
                opt.load_state_dict(opt.state_dict())
            stats = ops.grad_norm(gradients[0], backend=backend)
            backups = [torch.empty_like(p) for p in params]
            ops.perturb_(params, gradients[0], backups, stats, rho=0.1, backend=backend)
            ops.restore_(params, backups, backend=backend)
        results.append((everything(params, opt), bits([stats])))
    assert results[0] == results[1]
