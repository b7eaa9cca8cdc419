"""An optimizer in a cycle of references is collected, with its weights, as those of torch.optim are."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from oracle_optimizer import BACKENDS
from torch import nn
from torch.optim import lr_scheduler

from rst_fused import RST

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_collection_meanwhile() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def step(opt: RST) -> None:
    for finish in (opt.perturb, opt.step):
        opt.param_groups[0]["params"][0].grad = torch.ones(5)
        finish()


def in_its_group(opt: RST) -> None:
    opt.param_groups[0]["scheduler"] = lr_scheduler.StepLR(opt, 1)


def in_its_state(opt: RST) -> None:
    opt.state[opt.param_groups[0]["params"][0]]["optimizer"] = opt


def as_an_attribute(opt: RST) -> None:
    opt.myself = opt  # type: ignore[attr-defined]


WAYS: list[Callable[[RST], None]] = [in_its_group, in_its_state, as_an_attribute]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("when", ["before the first step", "after it"])
@pytest.mark.parametrize("way", WAYS)
def test_a_cycle_is_collected(way: Callable[[RST], None], when: str, perturbed: bool, backend: str) -> None:
    weight = nn.Parameter(torch.ones(5))
    opt = RST([weight], lr=0.1, momentum=0.9, schedule=1.0, backend=backend)

    if when == "before the first step":
        way(opt)
    step(opt)
    if when == "after it":
        way(opt)
    step(opt)  # with a plan that knows the cycle
    if perturbed:
        weight.grad = torch.ones(5)
        opt.perturb()
    watched = [weakref.ref(opt), weakref.ref(weight)]
    del opt, weight
    assert watched[0]() is not None  # so only the collector can find it
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
