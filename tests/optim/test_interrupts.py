"""Ctrl-C before any line of the package that a SAM step runs: each weight is as before the step or as after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interrupts import Interrupt
from optimizer_cases import hold
from oracle_optimizer import BACKENDS, Problem, bits
from torch import nn

from rst_fused import RST

pytestmark = pytest.mark.usefixtures("one_thread")
PROBLEM = Problem([(5,), (3, 4), (0,)], 3)
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "lr": 0.05},
    "adam-mixed": {"base": "adam", "gamma": 2.0},
    "lion": {"base": "lion", "lr": 0.01},
    "masters": {"base": "adamw", "master_weights": True, "dtype": torch.bfloat16},
    "remainders": {"momentum": 0.9, "master_weights": "remainder", "dtype": torch.bfloat16},
    "flags": {"momentum": 0.9, "dampening": 0.5},  # no launch plan
    "instance": {"instance": True, "gamma": 2.0},
    "held": {"momentum": 0.9, "lr": 0.05, "held": True},
}
FORMS = [(case, "closure") for case in CASES] + [("sgd", "two phases"), ("masters", "two phases")]
MOST = 150  # stops per run: in longer ones, where plain torch repeats its lines for each parameter, not at every line


def started(case: str, backend: str) -> tuple[list[nn.Parameter], RST]:
    """An optimizer after its first step."""
    options = {"schedule": 1.0, "rho": 0.5, "backend": backend, **CASES[case]}
    params = PROBLEM.parameters(options.pop("dtype", torch.float32))
    if options.pop("held", False):
        hold(params[:1])  # whose weights go to a backup
    if options.pop("instance", False):
        opt = RST(base=torch.optim.SGD(params, lr=0.05, momentum=0.9), **options)
    else:
        opt = RST(params, **options)
    opt.step(lambda: PROBLEM.backward(params, 0))
    return params, opt


def second_step(params: list[nn.Parameter], opt: RST, form: str, stop: int) -> tuple[int, bool]:
    """How many lines ran, and whether the step came to its end."""
    PROBLEM.backward(params, 1)
    interrupt = Interrupt(stop)
    try:
        with interrupt:
            if form == "closure":
                opt.step(lambda: PROBLEM.backward(params, 1))
            else:
                opt.perturb()
                PROBLEM.backward(params, 1)
                opt.step()
    except KeyboardInterrupt:
        if form == "two phases":
            opt.restore()  # the caller's part
        return interrupt.lines, False
    return interrupt.lines, True


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case, form", FORMS)
def test_interrupt_at_every_line(case: str, form: str, backend: str) -> None:
    params, opt = started(case, backend)
    before = bits(params)
    count, ended = second_step(params, opt, form, 0)
    assert ended and count > 50
    allowed = [set(pair) for pair in zip(before, bits(params), strict=True)]
    for stop in range(1, count + 1, 1 + count // MOST):
        params, opt = started(case, backend)
        _, ended = second_step(params, opt, form, stop)
        where = f"line {stop} of {count}"
        assert not ended, where
        assert all(b in pair for b, pair in zip(bits(params), allowed, strict=True)), where
        assert not opt._step_state.perturbed and not opt._step_state.swaps, where
        opt.zero_grad()
        opt.step(lambda params=params: PROBLEM.backward(params, 2))
        assert all(p.isfinite().all() for p in params), where
