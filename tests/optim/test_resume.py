"""A run that is saved and resumed is the run that was not, bit for bit, from whichever step."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle_optimizer import BACKENDS, Problem, bits
from torch import nn

from rst_fused import RST, SAM
from rst_fused import schedule as S

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 10
PROBLEM = Problem([(5,), (3, 4), (0,), (70,)], STEPS)
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "lr": 0.05},
    "sgd-dampening": {"momentum": 0.9, "dampening": 0.5, "lr": 0.05},  # its first step is special
    "sgd-mixed": {"momentum": 0.9, "nesterov": True, "gamma": "match", "schedule": S.linear(0.5, steps=STEPS)},
    "adam": {"base": "adam", "lr": 0.02, "adaptive": True},
    "adamw-mixed": {"base": "adamw", "lr": 0.02, "gamma": 1.5},
    "amsgrad": {"base": "adam", "lr": 0.02, "amsgrad": True, "gamma": 1.5},
    "lion": {"base": "lion", "lr": 0.005, "weight_decay": 0.1},
    "masters-lion": {"dtype": torch.bfloat16, "base": "lion", "lr": 0.005, "master_weights": True},
    "bfloat16": {"dtype": torch.bfloat16, "base": "adamw", "lr": 0.02},  # stochastic rounding resumes too
    "masters": {"dtype": torch.bfloat16, "base": "adamw", "lr": 0.02, "master_weights": True},
    "masters-sgd": {"dtype": torch.float16, "momentum": 0.9, "master_weights": True, "gamma": 2.0},
    "remainders": {"dtype": torch.bfloat16, "momentum": 0.9, "lr": 0.05, "master_weights": "remainder"},
    "state": {"base": "adam", "lr": 0.02, "state_dtype": torch.bfloat16, "gamma": 1.5},
    "state-of-halves": {"dtype": torch.bfloat16, "momentum": 0.9, "lr": 0.05, "state_dtype": torch.bfloat16},
    "state-masters": {
        "dtype": torch.float16, "base": "lion", "lr": 0.005, "master_weights": True, "state_dtype": torch.bfloat16,
    },
    "instance": {"instance": torch.optim.SGD, "momentum": 0.9},
    "instance-adamw": {"instance": torch.optim.AdamW, "gamma": "match"},
}
every_case = pytest.mark.parametrize("case", CASES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def make(case: str, backend: str, seed: int = 7) -> tuple[list[nn.Parameter], RST]:
    options = {"seed": seed, "rho": 0.3, "backend": backend, **CASES[case]}
    params = PROBLEM.parameters(options.pop("dtype", torch.float32))
    groups = [{"params": params[:1], "lr": 0.01}, {"params": params[1:]}]
    cls = options.pop("instance", None)
    if cls is not None:
        hyper = {"momentum": options.pop("momentum")} if "momentum" in options else {}
        return params, RST(base=cls(groups, lr=0.05, **hyper), **options)
    return params, RST(groups, **options)


def advance(params: list[nn.Parameter], opt: RST, t: int) -> None:
    """One step; some gradients are missing in some steps, so that the counts of Adam differ."""
    PROBLEM.backward(params, t)
    if opt.perturb():
        PROBLEM.backward(params, t)
    if t % 3 == 1:
        params[1].grad = None
    opt.step()
    opt.param_groups[1]["lr"] *= 0.9


def everything(params: list[nn.Parameter], opt: RST) -> Any:
    state = [{k: (v.dtype, bits([v])) for k, v in opt.state.get(p, {}).items() if v is not None} for p in params]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    return bits(params), state, groups, opt.steps, opt.sam_steps, opt.seed, opt.draw()


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)  # weights_only: plain tensors and numbers


@every_case
@every_backend
@pytest.mark.parametrize("how", ["state_dict", "pickle"])
def test_resume_from_every_step(how: str, case: str, backend: str) -> None:
    """state_dict: into a new optimizer with another seed, lr and rho, all of which the saved ones replace."""
    params, opt = make(case, backend)
    history: list[Any] = []
    saves: list[Any] = []
    for t in range(STEPS):
        history.append(everything(params, opt))
        if how == "pickle":
            saves.append(pickle.dumps((params, opt)))
        else:
            saves.append(through_a_file({"params": [p.detach() for p in params], "opt": opt.state_dict()}))
        advance(params, opt, t)
    history.append(everything(params, opt))
    assert 0 < opt.sam_steps < STEPS
    for start, save in enumerate(saves):
        if how == "pickle":
            others, resumed = pickle.loads(save)
        else:
            others, resumed = make(case, backend, seed=99)
            for group in resumed.param_groups:
                group.update(lr=0.7, rho=0.7)
            with torch.no_grad():
                for p, saved in zip(others, save["params"], strict=True):
                    p.copy_(saved)
            resumed.load_state_dict(save["opt"])
        assert everything(others, resumed) == history[start]
        for t in range(start, STEPS):
            advance(others, resumed, t)
            assert everything(others, resumed) == history[t + 1]


@every_backend
def test_non_finite_norms_and_last_norm_after_resuming(backend: str) -> None:
    params, opt = make("sgd", backend)
    PROBLEM.backward(params, 0)
    params[0].grad[0] = torch.nan
    opt.perturb(fire=True)
    opt.restore()
    advance(params, opt, 0)
    others, resumed = make("sgd", backend)
    resumed.load_state_dict(through_a_file(opt.state_dict()))
    assert resumed.non_finite_norms == opt.non_finite_norms == 1
    assert resumed.last_grad_norm != resumed.last_grad_norm  # NaN: it is no part of a run's state
    assert pickle.loads(pickle.dumps(opt)).non_finite_norms == 1


def test_a_pickle_from_before_stats_had_a_squared_norm() -> None:
    params, opt = make("sgd", "reference")
    PROBLEM.backward(params, 0)
    opt.perturb(fire=True)
    opt.restore()
    state = copy.deepcopy(opt.__getstate__())
    state["_saved_stats"] = state["_saved_stats"][:5].clone()
    other = RST.__new__(RST)
    other.__setstate__(state)
    assert other.last_grad_norm == opt.last_grad_norm and len(other._devices[0].stats) == 6


@every_case
def test_loading_twice_and_into_a_used_optimizer(case: str) -> None:
    params, opt = make(case, "auto")
    for t in range(4):
        advance(params, opt, t)
    saved, weights = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    results = []
    for _ in range(2):
        for t in range(4, 8):
            advance(params, opt, t)
        results.append(everything(params, opt))
        opt.load_state_dict(copy.deepcopy(saved))
        with torch.no_grad():
            for p, w in zip(params, weights, strict=True):
                p.copy_(w)
    assert results[0] == results[1]


TORCH: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.9), "amsgrad": True}),
}


@every_backend
@pytest.mark.parametrize("base", TORCH)
def test_state_of_torch_optim(base: str, backend: str) -> None:
    """A run begun with torch.optim goes on with RST (p = 0 shows that nothing is lost); rho stays, draws start at 0."""
    cls, hyper = TORCH[base]
    params, others = PROBLEM.parameters(torch.float64), PROBLEM.parameters(torch.float64)
    plain = cls(params, lr=0.02, **hyper)
    for t in range(STEPS):
        if t == 5:
            opt = RST(others, base=base, rho=0.3, schedule=0.0, backend=backend, lr=1.0)
            opt.load_state_dict(through_a_file(plain.state_dict()))
            with torch.no_grad():
                for p, q in zip(params, others, strict=True):
                    q.copy_(p)
        PROBLEM.backward(params, t)
        plain.step()
        if t >= 5:
            PROBLEM.backward(others, t)
            assert not opt.perturb()
            opt.step()
    group = opt.param_groups[0]
    assert (group["lr"], group["rho"], opt.steps) == (0.02, 0.3, 5)
    for name, value in hyper.items():
        assert group[name] == value
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)
        if base != "sgd":
            assert float(opt.state[q]["step"]) == float(plain.state[p]["step"]) == STEPS


@every_backend
def test_state_goes_back_to_torch_optim(backend: str) -> None:
    params, opt = make("adamw-mixed", backend)
    for t in range(4):
        advance(params, opt, t)
    plain = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    plain.load_state_dict(opt.state_dict())
    counts = [float(plain.state[p]["step"]) for p in params]
    assert sorted(counts) == [3, 4, 4, 4]
    PROBLEM.backward(params, 5)
    plain.step()
    assert [float(plain.state[p]["step"]) for p in params] == [c + 1 for c in counts]


@every_backend
@pytest.mark.parametrize("direction", ["gains masters", "loses masters", "torch.optim to masters"])
def test_masters_on_one_side_only(direction: str, backend: str) -> None:
    """The state takes the dtype of the optimizer that loads it; a missing master starts from the weights."""
    dtype, hyper = torch.bfloat16, {"lr": 0.05, "momentum": 0.9}
    params, others = PROBLEM.parameters(dtype), PROBLEM.parameters(dtype)
    if direction == "torch.optim to masters":
        donor: torch.optim.Optimizer = torch.optim.SGD(params, foreach=False, **hyper)
    else:
        donor = RST(params, master_weights=direction == "loses masters", backend=backend, **hyper)
    for t in range(3):
        PROBLEM.backward(params, t)
        donor.step()
    opt = RST(others, master_weights=direction != "loses masters", backend=backend, **hyper)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    opt.load_state_dict(through_a_file(donor.state_dict()))
    for t in range(3, 6):
        opt.step(lambda t=t: PROBLEM.backward(others, t))
    wanted = dtype if direction == "loses masters" else torch.float32
    for q in others:
        assert opt.state[q]["momentum_buffer"].dtype == wanted
        assert q.isfinite().all()
        if direction != "loses masters":
            assert opt.state[q]["master"].dtype == torch.float32 and torch.equal(opt.state[q]["master"].to(dtype), q)


@every_backend
def test_base_instance_that_loads_by_itself(backend: str) -> None:
    """base.load_state_dict replaces its groups and state: RST follows."""
    params, opt = make("instance", backend)
    for t in range(3):
        advance(params, opt, t)
    opt.base.load_state_dict(copy.deepcopy(opt.base.state_dict()))
    opt.base.param_groups[0]["lr"] = 0.0
    before = bits(params)
    PROBLEM.backward(params, 3)
    opt.perturb(fire=True)
    PROBLEM.backward(params, 3)
    opt.step()
    assert opt.param_groups is opt.base.param_groups and opt.state is opt.base.state
    assert bits(params)[0] == before[0] and bits(params)[1] != before[1]


def test_sam_resumes_in_its_own_form() -> None:
    params = PROBLEM.parameters(torch.float32)
    opt = SAM(params, torch.optim.SGD, lr=0.05, momentum=0.9, rho=0.2)
    others = PROBLEM.parameters(torch.float32)
    for t in range(6):
        if t == 3:
            twin = SAM(others, torch.optim.SGD, lr=9.0)
            twin.load_state_dict(through_a_file(opt.state_dict()))
            with torch.no_grad():
                for p, q in zip(params, others, strict=True):
                    q.copy_(p)
        for ps, o in ((params, opt), *([(others, twin)] if t >= 3 else [])):
            for phase in (o.first_step, o.second_step):
                PROBLEM.backward(ps, t)
                phase()
    assert bits(params) == bits(others)
    assert (twin.steps, twin.sam_steps, twin.param_groups[0]["rho"]) == (6, 6, 0.2)
