"""One optimizer over parameters on several devices: one norm, one draw, and every device served by its own ops.

Where there is one device, every second parameter is given out as being on a CPU called cpu:1: it is the optimizer's own
notion of where a parameter is that divides the work, and all that follows is real.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_cases import GROUPS, METHODS, SHAPES, split
from oracle_optimizer import BACKENDS, Oracle, Problem, arrays, bits

from rst_fused import RST, optimizer
from rst_fused._step import columns, devices, dispatch, validation

SECOND = torch.device("cpu", 1)
STEPS = 30


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Ids of the parameters on the second device; ids, since a parameter may be compared but not searched for."""
    ids: set[int] = set()
    for module in (devices, columns, dispatch, validation, optimizer):
        monkeypatch.setattr(module, "device_of", lambda p: SECOND if id(p) in ids else p.device)
    return ids


def apart(params: list[Any], away: set[int]) -> list[Any]:
    away.update(id(p) for p in params[1::2])
    return params


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", GROUPS)
def test_against_the_oracle(case: str, method: str, backend: str, away: set[int]) -> None:
    """float64 and 30 steps: a dozen roundings of 1.1e-16 each, ten times that for Adam's quotient."""
    base = case.partition("-")[0]
    problem = Problem(SHAPES, STEPS)
    problem.missing = {(t, i) for t in range(STEPS) for i in range(len(SHAPES)) if (t + i) % 7 == 0}
    params = apart(problem.parameters(torch.float64), away)
    opt = RST(split(params, GROUPS[case]), base=base, seed=3, backend=backend, **METHODS[method])
    oracle = Oracle(split(problem.start, GROUPS[case]), base, seed=3, **METHODS[method])
    for t in range(STEPS):
        opt.step(lambda t=t: problem.backward(params, t))
        oracle.step(problem)
    assert [place.device for place in opt._devices] == [torch.device("cpu"), SECOND]
    worst = max(np.abs(p - w).max(initial=0) for p, w in zip(arrays(params), oracle.w, strict=True))
    assert worst < (1e-13 if base == "sgd" else 1e-12)
    assert opt.last_grad_norm == pytest.approx(oracle.norm, rel=1e-11)
    assert opt.sam_steps == oracle.sam_steps


def pair(away: set[int], dtype: torch.dtype = torch.float32, **options: Any) -> tuple[RST, list[torch.nn.Parameter]]:
    params = apart([torch.nn.Parameter(torch.linspace(-1, 1, n).to(dtype)) for n in (5, 7)], away)
    return RST(params, **{"lr": 0.1, "momentum": 0.9, "schedule": 1.0, **options}), params


def give(params: list[torch.nn.Parameter], *grads: float) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.full_like(p, g)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_norm_on_one_device_holds_everywhere_and_counts_once(bad: float, away: set[int]) -> None:
    opt, params = pair(away)
    before = bits(params)
    for grads in ((1.0, bad), (bad, 1.0), (bad, bad)):
        give(params, *grads)
        assert opt.perturb() and bits(params) == before
        opt.restore()
    assert opt.non_finite_norms == 3
    give(params, 1.0, 2.0)
    opt.perturb()
    assert bits(params)[0] != before[0] and bits(params)[1] != before[1]
    assert opt.non_finite_norms == 3 and opt.last_grad_norm == pytest.approx((5 * 1 + 7 * 4) ** 0.5)


def test_no_gradient_on_one_device(away: set[int]) -> None:
    opt, params = pair(away)
    before = bits(params)
    params[0].grad = torch.ones_like(params[0])
    opt.perturb()
    assert bits(params)[0] != before[0] and bits(params)[1] == before[1]
    opt.restore()
    assert bits(params) == before


def test_an_error_on_the_second_device_brings_back_the_first(away: set[int]) -> None:
    opt, params = pair(away, backend="reference")
    before = bits(params)

    def fails(*args: Any) -> None:
        raise RuntimeError("out of memory")

    ops = copy.copy(opt._devices[1].backend.ops)
    ops.perturb_ = fails
    opt._devices[1].backend = replace(opt._devices[1].backend, ops=ops)
    give(params, 1.0, 1.0)
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.perturb()
    assert bits(params) == before
    give(params, 1.0, 1.0)  # the perturbation has taken the others
    opt.step()  # usable: a base step
    assert bits(params) != before


def test_a_parameter_that_moves_between_the_passes_comes_back(
    away: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, params = pair(away)
    before = bits(params)
    give(params, 1.0, 1.0)
    opt.perturb()
    assert bits(params) != before
    elsewhere = torch.device("cpu", 2)
    for module in (validation, columns, dispatch):
        monkeypatch.setattr(module, "device_of", lambda p: elsewhere if p is params[1] else p.device)
    give(params, 1.0, 1.0)
    with pytest.raises(RuntimeError, match="parameter 1 of group 0 is on .*made for cpu and cpu:1"):
        opt.step()
    assert bits(params) == before and not opt._step_state.saved


def test_random_bits_differ_between_the_devices_and_stay_between_runs(away: set[int]) -> None:
    """bfloat16 with stochastic rounding: two equal parameters must not get equal noise."""
    results = []
    for _ in range(2):
        params = apart([torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)], away)
        opt = RST(params, lr=0.1, rho=0.1, schedule=1.0, seed=7)
        give(params, 1.0, 1.0)
        opt.perturb()
        assert bits(params)[0] != bits(params)[1]
        results.append(bits(params))
    assert results[0] == results[1]


def test_saved_and_copied(away: set[int]) -> None:
    opt, params = pair(away)
    for grads in ((1.0, float("nan")), (1.0, 2.0)):
        give(params, *grads)
        opt.perturb()
        give(params, 0.5, 0.5)
        opt.step()
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert (other.steps, other.non_finite_norms, other.last_grad_norm) == (2, 1, opt.last_grad_norm)
    fresh, others = pair(away)
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    for o, ps in ((opt, params), (fresh, others)):
        give(ps, 2.0, -1.0)
        o.perturb()
        give(ps, 1.0, 1.0)
        o.step()
    assert bits(params) == bits(others) and fresh.non_finite_norms == 1


def test_a_group_on_another_device_is_added_later(away: set[int]) -> None:
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    away.add(id(second))
    opt = RST([first], lr=0.1, schedule=1.0)
    assert len(opt._devices) == 1
    opt.add_param_group({"params": [second]})
    give([first, second], 3.0, 4.0)
    opt.perturb()
    assert opt.last_grad_norm == pytest.approx((3 * 25) ** 0.5)
    give([first, second], 0.0, 0.0)
    opt.step()
    assert torch.equal(first.detach(), torch.ones(3)) and torch.equal(second.detach(), torch.ones(3))
