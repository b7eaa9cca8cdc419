"""RST is a torch.optim.Optimizer in every respect: groups, schedulers, hooks, names, copies, reports."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from oracle_optimizer import BACKENDS, Problem, bits
from torch import nn
from torch.optim import lr_scheduler

from rst_fused import RST, SAM
from rst_fused import schedule as S

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [(5,), (3, 4), (33,)]
PROBLEM = Problem(SHAPES, 40)
BASES: dict[str, dict[str, Any]] = {
    "sgd": {"base": "sgd", "lr": 0.05, "momentum": 0.9},
    "adamw": {"base": "adamw", "lr": 0.01},
    "lion": {"base": "lion", "lr": 0.005},
    "instance": {"base": torch.optim.SGD, "lr": 0.05, "momentum": 0.9},
}
every_base = pytest.mark.parametrize("base", BASES)


def make(base: str = "sgd", params: Any = None, **kwargs: Any) -> tuple[list[nn.Parameter], RST]:
    params = params or PROBLEM.parameters(torch.float32)
    chosen = dict(BASES[base])
    if base == "instance":
        inner = chosen.pop("base")(params, **chosen)
        return params, RST(base=inner, **kwargs)
    return params, RST(params, **{**chosen, **kwargs})


def train(opt: RST, params: Any, steps: int, closure: bool = True, start: int = 0) -> None:
    for t in range(start, start + steps):
        if closure:
            opt.step(lambda t=t: PROBLEM.backward(params, t))
            continue
        PROBLEM.backward(params, t)
        if opt.perturb():
            PROBLEM.backward(params, t)
        opt.step()


# --- parameter groups -------------------------------------------------------------------------------------------------
@every_base
@pytest.mark.parametrize("backend", BACKENDS)
def test_add_param_group_later_equals_groups_from_the_start(base: str, backend: str) -> None:
    """The late group takes the defaults, the base's included, but for its own lr and rho; its state starts late."""
    results = []
    for late in (False, True):
        params = PROBLEM.parameters(torch.float32)
        _, opt = make(base, params[:2], schedule=1.0, backend=backend)
        for t in range(4):
            if t == (2 if late else 0):
                opt.add_param_group({"params": params[2], "lr": 0.001, "rho": 0.5})
            with_third = t >= 2
            for phase in (opt.perturb, opt.step):
                PROBLEM.backward(params, t)
                if not with_third:
                    params[2].grad = None
                phase()
        results.append(bits(params))
        assert [len(g["params"]) for g in opt.param_groups] == [2, 1]
        assert opt.param_groups[1]["lr"] == 0.001 and opt.param_groups[1]["rho"] == 0.5
        assert set(opt.param_groups[0]) == set(opt.param_groups[1])
    assert results[0] == results[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_may_be_empty_and_are_added_to_the_base_too(backend: str) -> None:
    params = PROBLEM.parameters(torch.float32)
    opt = RST([{"params": []}, {"params": params[:1]}], lr=0.1, backend=backend)
    train(opt, params[:1], 2)
    inner = torch.optim.SGD(params[:1], lr=0.1)
    opt = RST(base=inner, rho=0.3, schedule=1.0, backend=backend)
    inner.add_param_group({"params": params[1:]})  # behind the back of opt, with no rho
    before = bits(params)
    PROBLEM.backward(params, 0)
    opt.perturb()
    assert all(a != b for a, b in zip(bits(params), before, strict=True))
    assert opt.param_groups[1]["rho"] == 0.3
    opt.restore()


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_replaced_parameter_is_trained_and_the_old_one_is_left_alone(p: float, backend: str) -> None:
    """As when a model grows or shrinks between steps: a new tensor in the group, its state moved over by hand."""
    params, opt = make("adamw", backend=backend, schedule=p)
    train(opt, params, 2)
    old = params[0]
    new = params[0] = nn.Parameter(old.detach().clone())
    opt.param_groups[0]["params"][0] = new
    opt.state[new] = opt.state.pop(old)
    frozen, before = bits([old]), bits([new])
    assert old.grad is not None
    train(opt, params, 2, start=2)
    assert bits([old]) == frozen and bits([new]) != before


@pytest.mark.parametrize("backend", BACKENDS)
def test_replaced_state_is_used(backend: str) -> None:
    """As torch.optim, which looks its state up at every step."""
    results = []
    for replaced in (False, True):
        params, opt = make("sgd", backend=backend)
        train(opt, params, 3)
        for p in params:
            if replaced:
                opt.state[p]["momentum_buffer"] = torch.zeros_like(p)
            else:
                opt.state[p]["momentum_buffer"].zero_()
        train(opt, params, 3, start=3)
        results.append(bits(params))
    assert results[0] == results[1]


def test_named_parameters_and_what_torch_refuses() -> None:
    model = nn.Linear(3, 2)
    opt = RST(model.named_parameters(), lr=0.1)
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    copied = RST(model.named_parameters(), lr=0.1)
    copied.load_state_dict(opt.state_dict())
    with pytest.raises(TypeError, match="ordered collections"):
        RST([{"params": set(model.parameters())}])
    with pytest.raises(ValueError, match="empty parameter list"):
        RST([])
    with pytest.raises(TypeError, match="iterable of Tensors"):
        RST(model.weight)
    with pytest.raises(ValueError, match="non-leaf"):
        RST([model.weight * 2])
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        RST([3])


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_zero_grad_between_the_passes(set_to_none: bool, gamma: float, backend: str) -> None:
    """Gradients accumulate as anywhere in torch; perturb() has taken those of the first pass, and keeps them safe."""
    params, opt = make(schedule=1.0, gamma=gamma, backend=backend)
    others, twin = make(schedule=1.0, gamma=gamma, backend=backend)
    for t in range(3):
        opt.zero_grad(set_to_none)
        assert all((p.grad is None) if set_to_none or t == 0 else not p.grad.any() for p in params)
        loss(params, t).backward()
        assert opt.perturb()
        opt.zero_grad(set_to_none)
        loss(params, t).backward()
        opt.step()
    train(twin, others, 3)
    assert bits(params) == bits(others)


def loss(params: Any, t: int) -> torch.Tensor:
    """Problem.backward without its backward and its clearing of gradients."""
    w = torch.cat([p.reshape(-1) for p in params])
    b = torch.cat([torch.tensor(b).reshape(-1) for b in PROBLEM.noise[t]]).to(w.dtype)
    return (1.5 * w.square() + 0.5 * torch.cos(2 * w) - b * w).sum()


# --- schedulers -------------------------------------------------------------------------------------------------------
SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=13),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
}


@every_base
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("closure", [True, False])
def test_schedulers_without_a_warning(name: str, closure: bool, base: str) -> None:
    """The same numbers as on torch.optim, and momentum or beta1 cycle under OneCycleLR."""
    params, opt = make(base)
    cls = torch.optim.AdamW if base == "adamw" else torch.optim.SGD
    plain = cls(PROBLEM.parameters(torch.float32), **{k: v for k, v in BASES[base].items() if k != "base"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, theirs = SCHEDULERS[name](opt), SCHEDULERS[name](plain)
        seen = []
        for t in range(12):
            train(opt, params, 1, closure, start=t)
            plain.step()
            for s in (ours, theirs):
                s.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            group, other = opt.param_groups[0], plain.param_groups[0]
            cycled = "betas" if base == "adamw" else "momentum"
            assert (group["lr"], group[cycled]) == (other["lr"], other[cycled])
            seen.append((group["lr"], group[cycled]))
    assert len(set(seen)) > 2
    assert opt.steps == 12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_tensor_lr_under_a_scheduler(base: str, backend: str) -> None:
    results = []
    for as_tensor in (False, True):
        lr = 0.0625  # exact in float32, and so are its halves
        params, opt = make(base, lr=torch.tensor(lr) if as_tensor else lr, backend=backend)
        scheduler = lr_scheduler.StepLR(opt, 2, 0.5)
        for t in range(6):
            train(opt, params, 1, start=t)
            scheduler.step()
        assert isinstance(opt.param_groups[0]["lr"], torch.Tensor) == as_tensor
        assert float(opt.param_groups[0]["lr"]) == lr / 8
        results.append(bits(params))
    assert results[0] == results[1]


# --- hooks ------------------------------------------------------------------------------------------------------------
@every_base
@pytest.mark.parametrize("closure", [True, False])
def test_hooks_fire_once_per_step(closure: bool, base: str) -> None:
    params, opt = make(base, schedule=1.0)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre"))
    opt.register_step_post_hook(lambda o, args, kwargs: calls.append("post"))
    if opt.base is not None:
        opt.base.register_step_post_hook(lambda o, args, kwargs: calls.append("base"))
    train(opt, params, 3, closure)
    assert calls == ["pre", *(["base"] if opt.base else []), "post"] * 3


def test_hooks_of_a_subclass_fire_once() -> None:
    class Mine(RST):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    params = PROBLEM.parameters(torch.float32)
    opt = Mine(params, lr=0.1, schedule=1.0)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre"))
    opt.register_step_post_hook(lambda o, args, kwargs: calls.append("post"))
    train(opt, params, 2)
    assert calls == ["pre", "post"] * 2


@every_base
def test_state_dict_hooks(base: str) -> None:
    params, opt = make(base)
    train(opt, params, 2)
    calls: list[str] = []
    opt.register_state_dict_pre_hook(lambda o: calls.append("pre"))
    opt.register_state_dict_post_hook(lambda o, s: {**s, "note": calls.append("post")})
    saved = opt.state_dict()
    assert calls == ["pre", "post"] and "note" in saved

    def rename(o: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("load pre")
        return {"state": state["saved state"], "param_groups": state["param_groups"]}

    opt.register_load_state_dict_pre_hook(rename)
    opt.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
    opt.load_state_dict({"saved state": saved["state"], "param_groups": saved["param_groups"]})
    assert calls == ["pre", "post", "load pre", "load post"]
    assert opt.steps == 2


@every_base
def test_profiler_sees_one_step(base: str) -> None:
    params, opt = make(base, schedule=1.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        train(opt, params, 3)
        opt.zero_grad()
    counts = {e.key: e.count for e in profiler.key_averages() if e.key.startswith("Optimizer.")}
    assert counts.pop("Optimizer.step#RST.step") == 3
    assert counts.pop("Optimizer.zero_grad#RST.zero_grad") == 1
    assert counts == ({"Optimizer.step#SGD.step": 3} if base == "instance" else {})


# --- copies -----------------------------------------------------------------------------------------------------------
@every_base
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_go_on_like_the_original(how: str, base: str, backend: str) -> None:
    params, opt = make(base, gamma="match", seed=5, backend=backend)
    lr_scheduler.StepLR(opt, 100)  # patches opt.step
    train(opt, params, 5)
    both = (params, opt)
    others, twin = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert twin.param_groups[0]["params"][0] is others[0] and others[0] is not params[0]
    assert (twin.steps, twin.sam_steps, twin.last_grad_norm) == (opt.steps, opt.sam_steps, opt.last_grad_norm)
    assert "step" in vars(opt) and "step" not in vars(twin)
    before = bits(params)
    train(twin, others, 5, start=5)
    assert bits(params) == before
    train(opt, params, 5, start=5)
    assert bits(params) == bits(others)
    assert opt.draw() == twin.draw()


# --- reports ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
def test_repr_names_backend_schedule_and_base(backend: str) -> None:
    _, opt = make(backend=backend, schedule=S.linear(0.3, steps=10), gamma="match")
    text = repr(opt)
    for part in (f"backend={backend}", "linear(p=0.3, steps=10)", "match", "base=sgd", "momentum: 0.9", "rho: 0.05"):
        assert part in text
    assert repr(RST([nn.Parameter(torch.ones(1))], backend="auto")).count("backend=") == 1
    assert "Adagrad" in repr(SAM([nn.Parameter(torch.ones(1))], torch.optim.Adagrad, lr=0.1, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("closure", [True, False])
def test_counters_and_cost(closure: bool, backend: str) -> None:
    params, opt = make(schedule=0.5, seed=11, backend=backend)
    assert (opt.steps, opt.sam_steps, opt.cost, opt.non_finite_norms) == (0, 0, 1.0, 0)
    assert opt.last_grad_norm != opt.last_grad_norm  # NaN: none yet
    fired = 0
    for t in range(20):
        drawn = S.draw(11, t, 0.5)
        fired += drawn
        assert opt.draw() == opt.draw() == drawn
        train(opt, params, 1, closure, start=t)
        assert (opt.steps, opt.sam_steps, opt.cost) == (t + 1, fired, 1 + fired / (t + 1))
    assert isinstance(opt.sam_steps, int) and isinstance(opt.steps, int)
    assert opt.last_grad_norm > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_last_grad_norm_is_that_of_the_first_pass(backend: str) -> None:
    params, opt = make(schedule=1.0, backend=backend)
    PROBLEM.backward(params, 0)
    norm = torch.stack([p.grad.double().norm() for p in params]).norm().item()
    opt.perturb()
    assert opt.last_grad_norm == pytest.approx(norm, rel=1e-6)
    PROBLEM.backward(params, 1)
    opt.step()
    assert opt.last_grad_norm == pytest.approx(norm, rel=1e-6)


def test_fire_overrides_the_draw() -> None:
    params, opt = make(schedule=0.0)
    PROBLEM.backward(params, 0)
    before = bits(params)
    assert opt.perturb(fire=True) and bits(params) != before
    opt.restore()
    assert bits(params) == before and (opt.steps, opt.sam_steps) == (0, 0)
    params, opt = make(schedule=1.0)
    PROBLEM.backward(params, 0)
    assert not opt.perturb(fire=False) and bits(params) == before
    opt.step()
    assert (opt.steps, opt.sam_steps) == (1, 0)


def test_step_returns_the_first_loss_and_closures_see_gradients_enabled() -> None:
    params, opt = make(schedule=1.0)
    losses: list[float] = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        losses.append(float(PROBLEM.backward(params, 0)))
        return torch.tensor(losses[-1])

    with torch.no_grad():
        returned = opt.step(closure)
    assert len(losses) == 2 and losses[0] != losses[1]
    assert float(returned) == losses[0]
    PROBLEM.backward(params, 1)
    assert opt.step() is None
