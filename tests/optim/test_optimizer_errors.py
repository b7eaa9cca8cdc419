"""Wrong arguments: an exception that names the argument, what was given and what to do, before anything is changed."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from oracle_optimizer import BACKENDS, Problem, bits
from torch import nn

from rst_fused import RST, SAM

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
PROBLEM = Problem([(5,), (3, 4)], 10)


def new() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


def overlapping() -> list[nn.Parameter]:
    memory = torch.ones(5)
    return [nn.Parameter(memory[2:]), nn.Parameter(memory[:3])]


COMPLEX = torch.ones(2, dtype=torch.complex64)
# arguments, exception, what the message must say: the name, the value, what was expected
CONSTRUCTION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rho": -0.1}, ValueError, r"rho=-0\.1: expected a finite number >= 0"),
    ({"rho": math.nan}, ValueError, "rho=nan: expected a finite number >= 0"),
    ({"rho": math.inf}, ValueError, "rho=inf: expected a finite number >= 0"),
    ({"rho": "0.1"}, TypeError, "rho='0.1': expected a number, got str"),
    ({"rho": torch.ones(2)}, ValueError, r"rho is a tensor of shape \(2,\): expected a number"),
    ({"eta": -1.0}, ValueError, r"eta=-1\.0: expected a finite number >= 0"),
    ({"schedule": 1.5}, ValueError, r"schedule=1\.5: expected a number in \[0, 1\]"),
    ({"schedule": -0.5}, ValueError, r"schedule=-0\.5: expected a number in \[0, 1\]"),
    ({"schedule": "often"}, TypeError, "schedule='often': expected a number"),
    ({"gamma": -1.0}, ValueError, r"gamma=-1\.0: expected a finite number >= 0"),
    ({"gamma": math.nan}, ValueError, "gamma=nan"),
    ({"gamma": "foo"}, ValueError, "gamma='foo': expected a number, a callable step -> gamma, or 'match'"),
    ({"gamma": None}, TypeError, "gamma=None: expected a number"),
    ({"seed": -1}, ValueError, "seed=-1: expected an integer from 0"),
    ({"seed": 2**63}, ValueError, "seed=9223372036854775808: expected an integer from 0"),
    ({"seed": 0.5}, ValueError, r"seed=0\.5: expected an integer"),
    ({"backend": "gpu"}, ValueError, "backend='gpu': expected 'auto' or one of"),
    ({"base": "rmsprop"}, ValueError, "base='rmsprop': expected 'sgd', 'adam', 'adamw', 'lion' or"),
    ({"base": torch.optim.SGD}, ValueError, "base=.*SGD.*: expected 'sgd', 'adam', 'adamw', 'lion' or"),
    ({"momentun": 0.9}, TypeError, r"base='sgd' takes no \['momentun'\]: expected some of .*'momentum'"),
    ({"base": "adam", "momentum": 0.9}, TypeError, r"base='adam' takes no \['momentum'\]: expected some of .*'betas'"),
    ({"base": "sgd", "amsgrad": True}, TypeError, r"base='sgd' takes no \['amsgrad'\]"),
    ({"lr": math.nan}, ValueError, "lr=nan: expected a finite number >= 0"),
    ({"lr": -1e-3}, ValueError, r"lr=-0\.001: expected a finite number >= 0"),
    ({"lr": torch.tensor(-1.0)}, ValueError, r"lr=tensor\(-1\.\): expected a finite number >= 0"),
    ({"lr": None}, TypeError, "lr=None: expected a number"),
    ({"momentum": -0.9}, ValueError, r"momentum=-0\.9: expected a finite number >= 0"),
    ({"dampening": -math.inf}, ValueError, "dampening=-inf: expected a finite number$"),
    ({"weight_decay": -1}, ValueError, "weight_decay=-1: expected a finite number >= 0"),
    ({"nesterov": "no", "momentum": 0.9}, ValueError, "nesterov='no': expected True or False"),
    ({"base": "adam", "maximize": None}, ValueError, "maximize=None: expected True or False"),
    ({"adaptive": "no"}, ValueError, "adaptive='no': expected True or False"),
    ({"master_weights": 2}, ValueError, "master_weights=2: expected True or False, or 'remainder'"),
    ({"stochastic_rounding": "bf16"}, ValueError, "stochastic_rounding='bf16': expected True or False"),
    ({"adaptive": torch.ones(2)}, ValueError, r"adaptive=tensor\(.*: expected True or False"),
    ({"model": 3}, TypeError, "model=3: expected a torch.nn.Module, or None"),
    ({"nesterov": True}, ValueError, r"nesterov=True with momentum=0\.0, .*expected momentum > 0 and dampening = 0"),
    ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, r"nesterov=True.*dampening=0\.1"),
    ({"base": "adam", "betas": (0.9, 1.0)}, ValueError, r"betas\[1\]=1\.0: expected a number in \[0, 1\)"),
    ({"base": "adam", "betas": 0.9}, ValueError, r"betas=0\.9: expected a pair"),
    ({"base": "adamw", "eps": -1e-8}, ValueError, "eps=-1e-08: expected a finite number >= 0"),
    ({"params": None}, TypeError, "params=None: expected parameters"),
    ({"params": [{"params": [p]} for p in overlapping()]}, ValueError, r"params\[0\] and params\[1\] share memory"),
    ({"params": [torch.ones(2, dtype=torch.int64)]}, ValueError, r"params\[0\] is torch.int64: expected one of"),
    ({"params": [new(), torch.eye(2).to_sparse()]}, ValueError, r"params\[1\] has layout torch.sparse_coo: expected"),
    ({"params": [new(), torch.ones(2, device="meta")]}, ValueError, r"params\[1\] is on meta, without data"),
    ({"params": [torch.ones(1).expand(4)]}, ValueError, r"params\[0\] has shape \(4,\) and strides \(0,\), .*clone"),
    ({"params": [torch.ones(4).as_strided((2, 2), (1, 1))]}, ValueError, r"params\[0\] has shape \(2, 2\) .*clone"),
    ({"params": [COMPLEX.conj()]}, ValueError, r"params\[0\] is a view that is conjugated"),
    ({"params": [COMPLEX.conj().imag]}, ValueError, r"params\[0\] is a view .* negated"),
    *(
        ({"params": [{"params": [new()], name: 1}]}, TypeError, rf"group sets \['{name}'\], which all .* share")
        for name in ("schedule", "gamma", "adaptive", "eta", "seed", "master_weights")
    ),
    ({"params": [new()] * 2}, ValueError, "params holds a parameter twice"),
    ({"params": [new(), *overlapping()]}, ValueError, r"params\[1\] and params\[2\] share memory: .*same Parameter"),
    ({"params": [{"params": [new()], "rho": -1}]}, ValueError, "rho=-1: expected a finite number >= 0"),
    ({"params": [{"params": [new()], "lr": math.nan}]}, ValueError, "lr=nan"),
]


@pytest.mark.parametrize("case", CONSTRUCTION, ids=lambda c: ",".join(f"{k}={v!r}"[:40] for k, v in c[0].items()))
def test_wrong_arguments_of_the_constructor(case: Any) -> None:
    arguments, error, message = case
    with pytest.raises(error, match=f"(?s){message}"):
        RST(**{"params": [new()], "lr": 0.1, **arguments})


INSTANCE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": 0.1}, TypeError, r"\['lr'\] given beside an optimizer instance as base: set them there"),
    ({"master_weights": True}, ValueError, "master_weights=True with an optimizer"),
    ({"params": [new()]}, ValueError, r"params \(1 tensors\) are not those of the base .* \(1\): pass params=None"),
    ({"params": [{"params": []}]}, ValueError, r"params \(0 tensors\) are not those of the base optimizer"),
    ({"rho": -1.0}, ValueError, "rho=-1.0"),
]


@pytest.mark.parametrize("case", INSTANCE, ids=lambda c: next(iter(c[0])))
def test_wrong_arguments_beside_an_optimizer_instance(case: Any) -> None:
    arguments, error, message = case
    p = new()
    inner = torch.optim.SGD([p], lr=0.1)
    with pytest.raises(error, match=message):
        RST(**{"base": inner, **arguments})
    assert "rho" not in inner.param_groups[0]


def test_optimizer_instance_that_needs_a_closure_is_refused() -> None:
    inner = torch.optim.LBFGS([new()])
    with pytest.raises(ValueError, match=r"base=LBFGS\(\.\.\.\): its step needs a closure"):
        RST(base=inner)
    assert "rho" not in inner.param_groups[0]


def test_groups_of_an_optimizer_instance_stay_as_they_are_when_a_later_one_is_refused() -> None:
    inner = torch.optim.SGD([{"params": [new()]}, {"params": [new()], "rho": -1.0}], lr=0.1)
    with pytest.raises(ValueError, match="rho=-1"):
        RST(base=inner)
    assert "rho" not in inner.param_groups[0]


def test_group_that_an_optimizer_instance_got_later() -> None:
    inner = torch.optim.SGD([new()], lr=0.1)
    opt = RST(base=inner, rho=0.3)
    inner.add_param_group({"params": [new()]})
    assert opt.draw() in (False, True)
    assert [group["rho"] for group in inner.param_groups] == [0.3, 0.3]


@every_backend
def test_parameters_without_memory_are_not_taken_for_one(backend: str) -> None:
    """Freed storage, as FSDP leaves it between its passes, and layers that learn their shape from the first batch."""
    params = [new(), new()]
    for p in params:
        p.untyped_storage().resize_(0)
    RST(params, lr=0.1, backend=backend)
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(2))
    opt = RST(model.parameters(), lr=0.1, schedule=1.0, backend=backend)
    opt.step(lambda: model(torch.ones(4, 5)).sum().backward())
    assert opt.sam_steps == 1


def test_group_that_shares_memory_with_an_earlier_one_is_not_added() -> None:
    first, second = overlapping()
    for opt in (RST([first], lr=0.1), RST(base=torch.optim.SGD([first], lr=0.1))):
        with pytest.raises(ValueError, match=r"params\[1\] and a parameter of an earlier group share memory"):
            opt.add_param_group({"params": [new(), second]})
        assert len(opt.param_groups) == 1
    inner = torch.optim.SGD([first, second], lr=0.1)
    with pytest.raises(ValueError, match="share memory"):
        RST(base=inner)
    assert "rho" not in inner.param_groups[0]


def test_params_beside_an_optimizer_instance() -> None:
    p = new()
    inner = torch.optim.SGD([p], lr=0.1)
    for params in (p, [p], {"params": p}, [{"params": [p]}]):
        RST([params] if isinstance(params, dict) else params, base=inner)


def test_named_parameters_beside_an_optimizer_instance() -> None:
    model = nn.Linear(3, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    RST(model.named_parameters(), base=inner)
    with pytest.raises(ValueError, match=r"params \(2 tensors\) are not those"):
        RST(reversed(list(model.named_parameters())), base=inner)


@every_backend
@pytest.mark.parametrize("case", CONSTRUCTION[-9:] + CONSTRUCTION[:1], ids=lambda c: c[2][:30])
def test_wrong_group_is_not_added(case: Any, backend: str) -> None:
    arguments, error, message = case
    groups = arguments.get("params") or [new()]
    group = groups[0] if isinstance(groups[0], dict) else {**arguments, "params": groups}
    params = PROBLEM.parameters(torch.float32)
    opt = RST(params, lr=0.1, backend=backend)
    before = repr(opt.param_groups)
    with pytest.raises(error, match=f"(?s){message}"):
        opt.add_param_group(group)
    assert repr(opt.param_groups) == before


@every_backend
@pytest.mark.parametrize("what", ["schedule", "gamma"])
@pytest.mark.parametrize("form", ["closure", "two phases"])
def test_callable_that_leaves_its_range(what: str, form: str, backend: str) -> None:
    """p(3) = 1.5, gamma(3) = -1: found at that step, with the weights and the state as they were."""
    wrong: dict[str, Any] = {"gamma": lambda t: -1 if t == 3 else 2}
    if what == "schedule":
        wrong = {"schedule": lambda t: 1.5 if t == 3 else 1.0}
    params = PROBLEM.parameters(torch.float32)
    opt = RST(params, lr=0.1, momentum=0.9, backend=backend, **wrong)
    for t in range(3):
        opt.step(lambda t=t: PROBLEM.backward(params, t))
    before = bits(params), bits([opt.state[p]["momentum_buffer"] for p in params]), opt.steps
    for _ in range(2):
        with pytest.raises(ValueError, match=r"p=1\.5 at step 3" if what == "schedule" else r"gamma\(3\)=-1: expected"):
            if form == "closure":
                opt.step(lambda: PROBLEM.backward(params, 3))
            else:
                PROBLEM.backward(params, 3)
                opt.perturb()
        assert (bits(params), bits([opt.state[p]["momentum_buffer"] for p in params]), opt.steps) == before


@every_backend
def test_wrong_state_dicts(backend: str) -> None:
    """Another number of groups or parameters, another model, options that are not there: nothing is loaded."""
    params = PROBLEM.parameters(torch.float32)
    opt = RST(params, base="adamw", lr=0.1, backend=backend)
    for t in range(3):
        opt.step(lambda t=t: PROBLEM.backward(params, t))

    def everything() -> Any:
        return bits(params), bits([opt.state[p]["exp_avg"] for p in params]), opt.steps, repr(opt.param_groups)

    before = everything()

    def saved(*shapes: tuple[int, ...], **more: Any) -> dict[str, Any]:
        others = [nn.Parameter(torch.ones(s)) for s in shapes]
        donor = torch.optim.AdamW(others, lr=0.1, **more)
        for p in others:
            p.grad = torch.ones_like(p)
        donor.step()
        return donor.state_dict()

    two_groups = saved((5,), (3, 4))
    two_groups["param_groups"].append({**two_groups["param_groups"][0], "params": []})
    wrong = [
        (saved((5,)), "doesn't match the size"),
        (two_groups, "different number of parameter groups"),
        (saved((5,), (4, 3)), r"exp_avg.*parameter 1.*\(4, 3\).*\(3, 4\)"),
        (saved((5,), (4, 3), amsgrad=True), r"exp_avg.*parameter 1.*\(4, 3\).*\(3, 4\)"),
    ]
    twin = saved((5,), (3, 4), amsgrad=True)
    twin["state"][1]["max_exp_avg_sq"] = torch.ones(2)
    wrong.append((twin, r"max_exp_avg_sq of parameter 1 in shape \(2,\)"))
    for state, message in wrong:
        with pytest.raises(ValueError, match=f"(?s){message}"):
            opt.load_state_dict(state)
        assert everything() == before


@every_backend
@pytest.mark.parametrize("phase", ["perturb", "step"])
@pytest.mark.parametrize("wrong", ["shape", "dtype"])
def test_state_of_another_parameter_is_refused(wrong: str, phase: str, backend: str) -> None:
    """Put there by hand, past load_state_dict: an error and not a write beyond the end of a buffer."""
    params = PROBLEM.parameters(torch.float32)
    opt = RST(params, lr=0.1, momentum=0.9, schedule=1.0, backend=backend)
    shape, dtype = ((2, 4), torch.float32) if wrong == "shape" else ((3, 4), torch.bfloat16)
    opt.state[params[1]]["momentum_buffer"] = torch.zeros(shape, dtype=dtype)
    before = bits(params)
    PROBLEM.backward(params, 0)
    expected = rf"state 'momentum_buffer' of parameter 1 of group 0 is {re.escape(str(shape))} {dtype} on cpu, but its "
    with pytest.raises(RuntimeError, match=expected):
        getattr(opt, phase)()
    assert bits(params) == before


@every_backend
@pytest.mark.parametrize("wrong", [True, False])
def test_masters_of_another_dtype_are_refused_where_they_are_read(wrong: bool, backend: str) -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    opt = RST([p], lr=0.1, schedule=1.0, master_weights=wrong, backend=backend)
    opt.state[p]["master"] = torch.ones(3, dtype=torch.float64)
    p.grad = torch.ones_like(p)
    if wrong:
        with pytest.raises(RuntimeError, match="'master' of parameter 0 of group 0 is .*float64 .* needs .*float32"):
            opt.perturb()
    else:
        assert opt.perturb()
        opt.restore()
    assert p.tolist() == [1.0] * 3


@every_backend
def test_converted_model(backend: str) -> None:
    """model.double() between steps: backups and plans follow; state is refused until it is converted too."""
    for hyper in ({}, {"momentum": 0.9}):
        params = PROBLEM.parameters(torch.float32)
        opt = SAM(params, lr=0.1, backend=backend, **hyper)
        opt.step(lambda params=params: PROBLEM.backward(params, 0))
        for p in params:
            p.grad = None
            p.data = p.data.double()
        before = bits(params)
        if hyper:
            with pytest.raises(RuntimeError, match=r"'momentum_buffer' of parameter 0 .*float32 .* needs .*float64"):
                opt.step(lambda params=params: PROBLEM.backward(params, 1))
            assert bits(params) == before
            for p in params:
                opt.state[p]["momentum_buffer"] = opt.state[p]["momentum_buffer"].double()
        opt.step(lambda params=params: PROBLEM.backward(params, 1))
        assert bits(params) != before
        PROBLEM.backward(params, 2)
        held = [p.grad for p in params]  # so that weights need backups
        opt.perturb()
        assert held and all(opt._step_state.backups[p].dtype == torch.float64 for p in params)
