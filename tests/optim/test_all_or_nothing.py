"""An update happens as a whole or not at all: weights, state, step counts and the optimizer's own counters.

Whatever strikes, an interrupt or an exception. The perturbation, of which this holds weight by weight:
test_interrupts.py and test_exceptions.py.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from interrupts import Interrupt
from optimizer_cases import PROBLEM, hold
from oracle_optimizer import BACKENDS
from paths import every_executor, observed
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from rst_fused import RST

pytestmark = pytest.mark.usefixtures("one_thread")
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "adam": {"base": "adam"},
    "mixed": {"base": "adamw", "gamma": 2.0},
    "amsgrad": {"base": "adam", "amsgrad": True},
    "lion": {"base": "lion", "gamma": 2.0},
    "rounding": {"momentum": 0.9, "dtype": torch.bfloat16},
    "masters": {"base": "adamw", "master_weights": True, "dtype": torch.bfloat16},
    "remainders": {"base": "lion", "gamma": 2.0, "master_weights": "remainder", "dtype": torch.bfloat16},
    "two calls": {"groups": ({"momentum": 0.0}, {"momentum": 0.9})},  # groups that one call cannot serve
    "two calls of adam": {"base": "adam", "groups": ({"maximize": True}, {}), "gamma": 2.0},
    "held": {"momentum": 0.9, "held": True},  # some gradients are, and weights go to backups
    "instance": {"instance": torch.optim.SGD},
    "instance mixed": {"instance": torch.optim.Adam, "gamma": 2.0},
}
every_case = pytest.mark.parametrize("case", CASES)
MOST = 60  # interrupts of one step: in longer ones, where plain torch repeats its lines, not at every line


def make(case: str, backend: str, **more: Any) -> tuple[list[nn.Parameter], RST]:
    options = {"schedule": 1.0, "rho": 0.5, "lr": 0.05, "backend": backend, **CASES[case], **more}
    params = PROBLEM.parameters(options.pop("dtype", torch.float32))
    given: Any = params
    if options.pop("held", False):
        hold(params[1::2])
    if "groups" in options:
        first, second = options.pop("groups")
        given = [{"params": params[:2], **first}, {"params": params[2:], **second}]
    if "instance" in options:
        lr = options.pop("lr")
        return params, RST(base=options.pop("instance")(given, lr=lr), **options)
    return params, RST(given, **options)


def step(params: list[nn.Parameter], opt: RST, t: int) -> None:
    opt.step(lambda: PROBLEM.backward(params, t))


def started(case: str, backend: str, **more: Any) -> tuple[list[nn.Parameter], RST]:
    params, opt = make(case, backend, **more)
    for t in range(2):
        step(params, opt, t)
    return params, opt


def before_and_after(case: str, backend: str, sam: bool) -> tuple[list[Any], list[Any]]:
    """What is seen before and after the third step, and after another one that follows each."""
    seen, next_ones = [], []
    for takes_it in (False, True):
        params, opt = started(case, backend)
        if takes_it:
            third_step(params, opt, sam, 0)
        seen.append(observed(params, opt))
        step(params, opt, 3)
        next_ones.append(observed(params, opt))
    return seen, next_ones


def third_step(params: list[nn.Parameter], opt: RST, sam: bool, stop: int) -> int:
    """Its update is interrupted before a line of the package. Returns how many ran."""
    PROBLEM.backward(params, 2)
    if opt.perturb(sam):
        PROBLEM.backward(params, 2)
    interrupt = Interrupt(stop)
    try:
        with interrupt:
            opt.step()
    except KeyboardInterrupt:
        opt.restore()  # the caller's part, who perturbed
    return interrupt.lines


@every_executor
@every_case
@pytest.mark.parametrize("sam", [True, False], ids=["SAM step", "base step"])
def test_interrupt_before_a_line_of_an_update(sam: bool, case: str, served_by: str) -> None:
    allowed, next_ones = before_and_after(case, served_by, sam)
    assert allowed[0] != allowed[1]
    count = third_step(*started(case, served_by), sam, 0)
    for stop in range(1, count + 1, 1 + count // MOST):
        params, opt = started(case, served_by)
        assert third_step(params, opt, sam, stop) == stop
        where = f"line {stop} of {count}"
        assert observed(params, opt) in allowed, where
        which = allowed.index(observed(params, opt))
        step(params, opt, 3)
        assert observed(params, opt) == next_ones[which], where


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """Interrupts this thread after so many seconds."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@every_executor
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_a_signal_in_the_middle_of_a_kernel(base: str, served_by: str, alarm: Callable[[float], None]) -> None:
    """A tensor large enough for signals to arrive while a kernel is at work, which none can divide."""
    if served_by == "reference":
        pytest.skip("plain torch is many kernels: interrupts before each of its lines are tested above")
    n = 3 * 10**7
    p = nn.Parameter(torch.zeros(n))
    opt = RST([p], base, lr=0.1, schedule=0.0, backend=served_by, **({"momentum": 0.9} if base == "sgd" else {}))
    state = "momentum_buffer" if base == "sgd" else "exp_avg"
    p.grad = torch.ones_like(p)
    opt.step()
    start = time.perf_counter()
    opt.step()
    usual = time.perf_counter() - start
    for trial in range(12):
        before = p[0].item(), opt.state[p][state][0].item(), opt.steps
        with suppress(KeyboardInterrupt):
            alarm(usual * (trial + 0.5) / 10)
            opt.step()
            time.sleep(2 * usual)
        alarm(0)
        now = p[0].item(), opt.state[p][state][0].item(), opt.steps
        changed = {a != b for a, b in zip(before, now, strict=True)}
        assert len(changed) == 1, (before, now)
        assert p.min() == p.max() and opt.state[p][state].min() == opt.state[p][state].max()
        if base == "adam":
            assert float(opt.state[p]["step"]) == opt.steps


# --- exceptions -----------------------------------------------------------------------------------------------------
@every_executor
@every_case
@pytest.mark.parametrize("registered", ["on the optimizer", "for all"])
@pytest.mark.parametrize("sam", [True, False], ids=["SAM step", "base step"])
def test_hook_that_raises(sam: bool, registered: str, case: str, served_by: str) -> None:
    """One before the step: nothing has happened. One after it: all has, and is counted."""
    allowed, next_ones = before_and_after(case, served_by, sam)

    def fails(*_: Any) -> None:
        raise ArithmeticError

    for which, (own, common) in enumerate([
        ("register_step_pre_hook", register_optimizer_step_pre_hook),
        ("register_step_post_hook", register_optimizer_step_post_hook),
    ]):  # fmt: skip
        params, opt = started(case, served_by)
        if opt.base is not None and (registered, which) == ("for all", 1):
            continue  # torch calls it within the step of the base, too, which has then failed halfway
        handle = getattr(opt, own)(fails) if registered == "on the optimizer" else common(fails)
        try:
            with pytest.raises(ArithmeticError):
                third_step(params, opt, sam, 0)
        finally:
            handle.remove()
        assert observed(params, opt) == allowed[which]
        step(params, opt, 3)
        assert observed(params, opt) == next_ones[which]


@every_executor
@pytest.mark.parametrize("case", [case for case in CASES if "instance" not in case])
@pytest.mark.parametrize("sam", [True, False], ids=["SAM step", "base step"])
@pytest.mark.parametrize("what", ["state", "gradient", "hyperparameter"])
def test_what_does_not_fit_the_last_parameter(what: str, sam: bool, case: str, served_by: str) -> None:
    """Found before the first one is changed, in whichever call it stands."""
    allowed, next_ones = before_and_after(case, served_by, sam)
    params, opt = started(case, served_by)
    PROBLEM.backward(params, 2)
    if opt.perturb(sam):
        PROBLEM.backward(params, 2)
    last, group = opt.state[params[-1]], opt.param_groups[-1]
    name = next((n for n in ("momentum_buffer", "exp_avg") if n in last), "")
    kept, lr = last[name], group["lr"]
    if what == "state":
        last[name] = kept.double()
    elif what == "hyperparameter":
        group["lr"] = float("nan")
    else:
        params[-1].grad = torch.zeros_like(params[-1]).to_sparse()
    with pytest.raises((RuntimeError, ValueError)):
        opt.step()
    last[name], group["lr"] = kept, lr
    assert observed(params, opt) == allowed[0]
    step(params, opt, 3)
    assert observed(params, opt) == next_ones[0]


@pytest.mark.parametrize("name", BACKENDS)
def test_base_instance_that_fails_in_the_middle(name: str) -> None:
    """What it did before is its own affair; the weights are back and nothing is counted."""

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise ArithmeticError

    params = PROBLEM.parameters(torch.float32)
    opt = RST(base=Failing(params, lr=0.05), schedule=1.0, gamma=2.0, backend=name)
    before = observed(params, opt)
    with pytest.raises(ArithmeticError):
        step(params, opt, 0)
    assert observed(params, opt) == before
