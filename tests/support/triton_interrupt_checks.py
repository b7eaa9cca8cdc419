"""Interrupts and launches that fail, in steps of the Triton backend: all is as before the step or as after it.

Collected by test_triton_plan only, in processes where a plugin runs the kernels on CPU tensors.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from interrupts import Interrupt
from paths import no_plans, observed
from triton_plan_checks import Run

from rst_fused.kernels import launch_groups

pytestmark = pytest.mark.usefixtures("one_thread")


def started(base: str, own: bool = False) -> Run:
    run = Run(base, own=own)
    run.step(0)
    return run


def interrupted(run: Run, stop: int) -> int:
    """A SAM step that is interrupted before its ``stop``-th line; how many there are."""
    run.gradients(2)
    interrupt = Interrupt(stop)
    try:
        with interrupt:
            run.opt.perturb(True)
            run.gradients(3)
            run.opt.step()
    except KeyboardInterrupt:
        run.opt.restore()
    return interrupt.lines


@pytest.mark.parametrize("plans", [True, False], ids=["plan", "ops"])
@pytest.mark.parametrize(
    ("base", "own"), [("sgd", False), ("sgd", True), ("amsgrad-mixed", False), ("masters-mixed", False)]
)
def test_an_interrupt_leaves_all_as_before_or_all_as_after(base: str, own: bool, plans: bool) -> None:
    with nullcontext() if plans else no_plans():
        run = started(base, own)
        before = seen(run)
        lines = interrupted(run, 0)
        after = seen(run)
        every = max(1, lines // 40)
        for stop in range(1, lines + 1, every):
            run = started(base, own)
            interrupted(run, stop)
            assert seen(run) in (before, after), f"line {stop} of {lines}"


def seen(run: Run) -> Any:
    """Weights and state. The counts are read and written by lines of their own."""
    found = observed(run.params, run.opt)
    return found["weights"], found["state"], found["perturbed"]


@pytest.mark.parametrize("plans", [True, False], ids=["plan", "ops"])
@pytest.mark.parametrize(
    ("error", "when"), [(KeyboardInterrupt, "before"), (KeyboardInterrupt, "after"), (RuntimeError, "before")]
)
@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("own", [False, True], ids=["held gradients", "own gradients"])
def test_a_launch_that_is_interrupted_or_fails(
    own: bool, at: int, error: type[BaseException], when: str, plans: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``after``: in the Python code that follows the start of a kernel, which then has not failed to start."""
    calls: list[int] = []
    starter = launch_groups.starter

    def failing(*variant: Any) -> Any:
        start = starter(*variant)

        def run(*args: Any) -> None:
            calls.append(0)
            if len(calls) == at + 1 and when == "before":
                raise error
            start(*args)
            if len(calls) == at + 1:
                raise error

        return run

    with nullcontext() if plans else no_plans():
        run, twin = started("sgd", own), started("sgd", own)
        before = seen(run)
        twin.step(1)
        run.opt._plans.drop()
        with monkeypatch.context() as patch:
            patch.setattr(launch_groups, "starter", failing)
            with pytest.raises(error):
                run.step(1)
            run.opt._plans.drop()
            assert not own or at == 2 or all(p.grad is None for p in run.params if p in run.opt._step_state.saved)
        run.opt.restore()
        assert seen(run) == (seen(twin) if (at, when) == (2, "after") else before)
        run.step(2)
        assert all(p.isfinite().all() for p in run.params)
