"""Optimizers of every kind on one problem, and all that a step of theirs may change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle_optimizer import BACKENDS, Problem, bits
from torch import nn

from rst_fused import RST

every_backend = pytest.mark.parametrize("backend", BACKENDS)
PROBLEM = Problem([(5,), (3, 4), (0,), (33,)], 10)
MODES: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "lr": 0.05},
    "adam-mixed": {"base": "adam", "gamma": 2.0},
    "amsgrad": {"base": "adamw", "amsgrad": True},
    "lion-mixed": {"base": "lion", "lr": 0.01, "gamma": 2.0},
    "masters": {"base": "adamw", "master_weights": True, "dtype": torch.bfloat16},
    "remainders": {"momentum": 0.9, "lr": 0.05, "master_weights": "remainder", "dtype": torch.bfloat16},
    "bfloat16-state": {"base": "lion", "lr": 0.01, "gamma": 2.0, "state_dtype": torch.bfloat16},
    "flags": {"momentum": 0.9, "dampening": 0.5},  # no launch plan
    "instance": {"instance": True},
    "held": {"momentum": 0.9, "lr": 0.05, "held": True},  # some gradients are, and weights go to backups
}
every_mode = pytest.mark.parametrize("mode", MODES)
RefusedCall = Callable[[RST, list[nn.Parameter]], Any]
REFUSED_WITHIN_A_STEP: dict[str, RefusedCall] = {
    "step(closure)": lambda opt, ps: opt.step(lambda: PROBLEM.backward(ps, 0)),
    "state_dict": lambda opt, ps: opt.state_dict(),
    "load_state_dict": lambda opt, ps: opt.load_state_dict({}),
    "add_param_group": lambda opt, ps: opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
    "copying": lambda opt, ps: copy.deepcopy(opt),
    "pickling": lambda opt, ps: pickle.dumps(opt),
}
SHAPES = [(5,), (3, 4), (0,), (33,), ()]
METHODS: dict[str, dict[str, Any]] = {
    "sam": {"schedule": 1.0},
    "asam": {"schedule": 1.0, "adaptive": True, "eta": 0.01},
    "rst": {"schedule": 0.5},
    "grst": {"schedule": 0.5, "gamma": "match"},
    "mixed": {"schedule": lambda t: 0.25 + 0.5 * (t % 2), "gamma": lambda t: 0.5 * (t % 4), "adaptive": True},
}
# The second group of each run: its own numbers, and in the last rows other flags, so that one call cannot serve both.
GROUPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sgd": ({"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01, "rho": 0.1}, {"lr": 0.05, "momentum": 0.5, "rho": 0.3}),
    "adam": ({"lr": 0.01, "weight_decay": 0.1, "rho": 0.1}, {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "rho": 1}),
    "adamw": ({"lr": 0.01, "weight_decay": 0.1, "rho": 0.1}, {"lr": 0.03, "betas": (0.8, 0.95), "rho": 0.02}),
    "adam-amsgrad": (
        {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1, "rho": 0.1},
        {"lr": 0.03, "amsgrad": True, "betas": (0.8, 0.95), "rho": 0.3},
    ),
    "lion": ({"lr": 0.003, "weight_decay": 0.1, "rho": 0.1}, {"lr": 0.001, "betas": (0.8, 0.95), "rho": 0.3}),
    "sgd-flags": ({"lr": 0.02, "momentum": 0.9, "nesterov": True, "rho": 0.1}, {"lr": 0.05, "rho": 0.3}),
    "adam-flags": ({"lr": 0.02, "rho": 0.1}, {"lr": 0.01, "maximize": True, "rho": 0.3}),
    "adamw-amsgrad-flags": ({"lr": 0.02, "amsgrad": True, "rho": 0.1}, {"lr": 0.01, "rho": 0.3}),
    "lion-flags": ({"lr": 0.003, "rho": 0.1}, {"lr": 0.001, "maximize": True, "rho": 0.3}),
}


def make(mode: str, backend: str, **more: Any) -> tuple[list[nn.Parameter], RST]:
    options = {"schedule": 1.0, "rho": 0.5, **MODES[mode], **more}
    params = PROBLEM.parameters(options.pop("dtype", torch.float32))
    if options.pop("held", False):
        hold(params[1::2])
    if options.pop("instance", False):
        return params, RST(base=torch.optim.SGD(params, lr=0.05, momentum=0.9), backend=backend, **options)
    return params, RST(params, backend=backend, **options)


def hold(params: list[nn.Parameter]) -> None:
    """The last gradient of each is in another place than p.grad, too."""
    held: dict[int, Any] = {}
    for i, p in enumerate(params):
        p.register_post_accumulate_grad_hook(lambda p, i=i: held.__setitem__(i, p.grad))  # type: ignore[misc]


def everything(params: list[nn.Parameter], opt: RST) -> Any:
    """All that a step may change, exactly."""
    state = [bits([v for _, v in sorted(opt.state.get(p, {}).items())]) for p in params]
    numbers = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    return bits(params), state, repr(numbers), (opt.steps, opt.sam_steps, opt._step_state.perturbed)


def train(params: list[nn.Parameter], opt: RST, steps: int = 1, start: int = 0) -> None:
    for t in range(start, start + steps):
        opt.step(lambda t=t: PROBLEM.backward(params, t))


def usable(params: list[nn.Parameter], opt: RST, mode: str, backend: str, before: int) -> None:
    """Goes on exactly like a twin that never failed."""
    others, twin = make(mode, backend)
    train(others, twin, before)
    assert bits(params) == bits(others)
    train(params, opt, 3, before)
    train(others, twin, 3, before)
    assert everything(params, opt) == everything(others, twin)


def split(params: list[Any], numbers: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    """Parameter groups: the first three tensors, and the rest."""
    if len(numbers) == 1:
        return [{"params": params, **numbers[0]}]
    return [{"params": params[:3], **numbers[0]}, {"params": params[3:], **numbers[1]}]
