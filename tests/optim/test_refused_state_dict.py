"""load_state_dict takes all or nothing: what cannot be loaded is refused before anything is changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import every_mode, make, train
from oracle_optimizer import BACKENDS
from paths import observed

pytestmark = pytest.mark.usefixtures("one_thread")
Saved = dict[str, Any]
REFUSALS = (ValueError, TypeError)


def group(name: str, value: Any) -> Callable[[Saved], Any]:
    return lambda saved: saved["param_groups"][0].update({name: value})


def state(name: str, value: Any) -> Callable[[Saved], Any]:
    """In the state of the last parameter: all others are there first."""
    return lambda saved: saved["state"][3].update({name: value})


COUNTERS: dict[str, Callable[[Saved], Any]] = {
    **{f"rst_steps={v!r}": group("rst_steps", v)
       for v in ("ten", -5, 1.5, True, None, 2**70, math.nan, [3], torch.ones(2))},
    **{f"rst_sam_steps={v!r}": group("rst_sam_steps", v) for v in ("ten", -1, 1.5, True, None, 2**70, math.inf)},
    **{f"rst_seed={v!r}": group("rst_seed", v) for v in ("x", -1, 1.5, True, None, 2**70)},
    **{f"rst_non_finite_norms={v!r}": group("rst_non_finite_norms", v) for v in ("x", -1, 1.5, None, 2**70)},
    "more SAM steps than steps": lambda saved: saved["param_groups"][0].update(rst_steps=2, rst_sam_steps=3),
    "SAM steps without steps": lambda saved: saved["param_groups"][0].pop("rst_steps"),
}  # fmt: skip
NUMBERS: dict[str, Callable[[Saved], Any]] = {
    **{f"lr={v!r}": group("lr", v) for v in (math.nan, math.inf, "0.1", None, True, [0.1], torch.ones(2))},
    **{f"rho={v!r}": group("rho", v) for v in (-0.1, math.nan, "0.1", None)},
    **{f"weight_decay={v!r}": group("weight_decay", v) for v in (math.nan, "x", None)},
    **{f"maximize={v!r}": group("maximize", v) for v in ("no", None, 3)},
    "no lr": lambda saved: saved["param_groups"][0].pop("lr"),
    "no weight decay": lambda saved: saved["param_groups"][0].pop("weight_decay"),
}
SGD: dict[str, Callable[[Saved], Any]] = {
    **{f"momentum={v!r}": group("momentum", v) for v in (math.nan, "x", None)},
    **{f"nesterov={v!r}": group("nesterov", v) for v in ("no", None)},
    **{f"buffer {v!r}": state("momentum_buffer", v) for v in ("x", 3.0, torch.ones(2), [1.0])},
    "state of adam": state("exp_avg", torch.ones(33)),
}
ADAM: dict[str, Callable[[Saved], Any]] = {
    **{f"betas={v!r}": group("betas", v) for v in (0.9, (0.9,), (0.9, 1.0), (0.9, "x"), (math.nan, 0.9), None)},
    **{f"eps={v!r}": group("eps", v) for v in (math.nan, "x", None)},
    **{f"exp_avg {v!r}": state("exp_avg", v) for v in (None, "x", 3.0, torch.ones(2), torch.ones(()))},
    **{f"exp_avg_sq {v!r}": state("exp_avg_sq", v) for v in (None, 1, torch.ones(4, 3))},
    **{f"step {v!r}": state("step", v) for v in (
        None, "7", [1], True, math.nan, -1, torch.ones(2), torch.empty(0), torch.tensor(math.nan), torch.tensor(1j))},
    "state of sgd": state("momentum_buffer", torch.ones(33)),
}  # fmt: skip
MASTERS: dict[str, Callable[[Saved], Any]] = {f"master {v!r}": state("master", v) for v in (None, "x", torch.ones(2))}
SHAPES: dict[str, Callable[[Saved], Any]] = {
    "no groups": lambda saved: saved["param_groups"].clear(),
    "groups are None": lambda saved: saved.update(param_groups=None),
    "a group is a list": lambda saved: saved.update(param_groups=[[0, 1, 2, 3]]),
    "another group": lambda saved: saved["param_groups"].append(dict(saved["param_groups"][0], params=[])),
    "no groups at all": lambda saved: saved.pop("param_groups"),
    "no state at all": lambda saved: saved.pop("state"),
    "state is None": lambda saved: saved.update(state=None),
    "state is a list": lambda saved: saved.update(state=[]),
    "state of a parameter is None": lambda saved: saved["state"].update({3: None}),
    "state of a parameter is a list": lambda saved: saved["state"].update({3: [torch.ones(33)]}),
    "state of a parameter is a tensor": lambda saved: saved["state"].update({3: torch.ones(33)}),
    "a parameter less": lambda saved: saved["param_groups"][0]["params"].pop(),
    "a parameter more": lambda saved: saved["param_groups"][0]["params"].append(4),
    "no parameters": lambda saved: saved["param_groups"][0].pop("params"),
}
KINDS = {"sgd": SGD, "adam-mixed": ADAM, "masters": ADAM | MASTERS, "flags": SGD, "instance": {}}
CASES = [
    pytest.param(mode, spoil, REFUSALS, id=f"{mode}-{name}"[:70])
    for mode, own in KINDS.items()
    for name, spoil in (COUNTERS if mode == "instance" else COUNTERS | NUMBERS | own).items()
]
# Much of this torch refuses itself, in its own words.
CASES += [
    pytest.param(mode, spoil, Exception, id=f"{mode}-{name}") for mode in KINDS for name, spoil in SHAPES.items()
]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cpu", "reference")])
@pytest.mark.parametrize(("mode", "spoil", "errors"), CASES)
def test_refused_before_anything_is_changed(
    mode: str, spoil: Callable[[Saved], Any], errors: Any, backend: str
) -> None:
    params, opt = make(mode, backend)
    others, twin = make(mode, backend)
    train(others, twin, 3)
    train(params, opt, 2)
    saved = copy.deepcopy(twin.state_dict())  # of a later step: what is taken of it shows
    saved["param_groups"][0].update(lr=0.07, rho=0.07)
    spoil(saved)
    before, groups, state_of = observed(params, opt), opt.param_groups, opt.state
    with pytest.raises(errors):
        opt.load_state_dict(saved)
    assert observed(params, opt) == before
    assert opt.param_groups is groups and opt.state is state_of
    train(params, opt, 2, 2)
    again, fresh = make(mode, backend)
    train(again, fresh, 4)
    assert observed(params, opt) == observed(again, fresh)


@every_mode
def test_hook_that_raises_while_loading(mode: str) -> None:
    params, opt = make(mode, "auto")
    train(params, opt, 2)
    before, saved = observed(params, opt), copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["lr"] = 0.07

    def fails(*_: Any) -> None:
        raise ArithmeticError

    handle = opt.register_load_state_dict_pre_hook(fails)
    with pytest.raises(ArithmeticError):
        opt.load_state_dict(saved)
    handle.remove()
    assert observed(params, opt) == before
