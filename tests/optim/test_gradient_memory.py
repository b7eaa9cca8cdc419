"""perturb() keeps weights in the memory of gradients: never where anybody else can see it, and with the same bits as
where it keeps them in backups."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from held_gradients import APART, WAYS, WEAK, Seen, give, unchanged, value_for
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import EXECUTORS, every_executor, no_plans, observed
from torch import nn

from rst_fused import RST
from rst_fused._step import plan

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [(5,), (3, 4), (33,), (2, 2)]
BASES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.05, "momentum": 0.9}, "adamw": {"base": "adamw"}, "lion": {"base": "lion", "lr": 0.01},
    "instance": {"instance": True},
}  # fmt: skip


def make(base: str, backend: str, **more: Any) -> tuple[list[nn.Parameter], RST]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    options = {"schedule": 1.0, "rho": 0.5, **BASES[base], **more}
    if options.pop("instance", False):
        return params, RST(base=torch.optim.SGD(params, lr=0.05, momentum=0.9), backend=backend, **options)
    return params, RST(params, backend=backend, **options)


def backed(params: list[nn.Parameter], opt: RST) -> set[int]:
    """Which parameters have a backup."""
    return {i for i, p in enumerate(params) if p in opt._step_state.backups}


class Twin:
    """The same training with every gradient held, from beginning to end: that with backups."""

    def __init__(self, base: str, backend: str, **more: Any) -> None:
        self.params, self.opt = make(base, backend, **more)
        self.held: list[Any] = []

    def step(self, t: int, abandoned: bool = False) -> None:
        for phase in (self.opt.perturb, *((self.opt.restore, self.opt.perturb) if abandoned else ()), self.opt.step):
            if phase != self.opt.restore:
                for i, p in enumerate(self.params):
                    p.grad = value_for(p, t, phase == self.opt.step, i)
                    self.held.append(p.grad)
            phase()
        assert backed(self.params, self.opt) == set(range(len(self.params)))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    way=st.sampled_from(list(WAYS)), executor=st.sampled_from(EXECUTORS), base=st.sampled_from(list(BASES)),
    which=st.sets(st.integers(0, len(SHAPES) - 1), min_size=1), begin=st.integers(0, 2), length=st.integers(1, 3),
    in_second_pass=st.booleans(), in_place=st.booleans(), abandoned=st.booleans(), adaptive=st.booleans(),
)  # fmt: skip
def test_who_holds_a_gradient_never_sees_weights_in_it(
    way: str, executor: str, base: str, which: set[int], begin: int, length: int, in_second_pass: bool, in_place: bool,
    abandoned: bool, adaptive: bool,
) -> None:  # fmt: skip
    """Held from a step on and for some: what is held keeps its bits through every call."""
    hold_and_train(way, executor, base, which, range(begin, begin + length), in_second_pass, in_place, abandoned,
                   adaptive=adaptive)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@every_executor
def test_every_way_to_hold_a_gradient(executor: str, way: str) -> None:
    """Half of the gradients, from the second step on."""
    hold_and_train(way, executor, "sgd", {1, 2}, range(1, 4))


def hold_and_train(
    way: str, executor: str, base: str, which: set[int], held_at: range, in_second_pass: bool = False,
    in_place: bool = False, abandoned: bool = False, **options: Any,
) -> None:  # fmt: skip
    backend, _, how = executor.partition(" ")
    ever: set[int] = set()
    with no_plans() if how == "ops" else nullcontext():
        params, opt = make(base, backend, **options)
        twin = Twin(base, backend, **options)
        seen: list[Seen] = []
        for t in range(5):
            twin.step(t, abandoned)
            for phase in (opt.perturb, *((opt.restore, opt.perturb) if abandoned else ()), opt.step):
                holds = t in held_at and in_second_pass == (phase == opt.step)
                if phase != opt.restore and (holds or not in_place):
                    seen = []
                for i, p in enumerate(params if phase != opt.restore else ()):
                    value = value_for(p, t, phase == opt.step, i)
                    if holds and i in which:
                        seen.append(WAYS[way](p, value))
                    elif in_place and p.grad is not None and not p.grad.requires_grad:
                        p.grad.copy_(value)  # what was held at the step before may still be
                    else:
                        give(p, value)
                    del value
                if phase == opt.perturb and seen and not set(APART) & {way}:
                    ever |= which
                with unchanged(seen, way in WEAK):
                    phase()
                assert backed(params, opt) <= ever
                if holds and phase == opt.perturb and way not in APART:
                    assert backed(params, opt) >= which
            assert observed(params, opt) == observed(twin.params, twin.opt)
            assert not opt._step_state.saved and not opt._step_state.swaps


def test_backups_go_when_nobody_holds_gradients_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LOOK_AGAIN", 3)
    p = nn.Parameter(torch.linspace(-1, 1, 6))
    opt = RST([p], lr=0.01, momentum=0.9, schedule=1.0)
    backups = []
    for t in range(7):
        p.sin().sum().backward()
        held = p.grad if t == 2 else None
        assert opt.perturb()
        backups.append(len(opt._step_state.backups))
        del held
        p.sin().sum().backward()
        opt.step()
        opt.zero_grad()
    kept = 1 if opt.backend.plans else 0  # the ops look at every step
    assert backups == [0, 0, 1, kept, kept, 0, 0]
