"""More tensors than one thread compares: a step on several threads sees every change that a step on one thread sees."""

from __future__ import annotations

import pytest
import torch
from oracle_optimizer import bits
from paths import has_plan, needs_plans
from torch import Tensor, nn

from rst_fused import RST, _backends

pytestmark = [needs_plans, pytest.mark.usefixtures("one_thread")]
COUNT = 777  # three threads have 259 of them each


def gradients(step: int) -> list[Tensor]:
    block = torch.randn(COUNT, 2, 3, generator=torch.Generator().manual_seed(step))
    return [t.clone() for t in block.unbind()]


def spoil(how: str, opt: RST, p: nn.Parameter) -> None:
    assert p.grad is not None
    if how == "moved":
        old = p.data
        p.data = old.clone()
        old.fill_(torch.nan)
    elif how == "other strides":
        p.grad = p.grad.t().contiguous().t()
    elif how == "no gradient":
        p.grad = None
    elif how == "negated":
        p.grad = (-p.grad)._neg_view()  # type: ignore[operator]
    elif how == "other state":
        old = opt.state[p]["momentum_buffer"]
        opt.state[p]["momentum_buffer"] = old.clone()
        old.fill_(torch.nan)
    elif how == "moved state":  # the same tensor in other memory
        for buffer in opt.state[p].values():
            old = buffer.data
            buffer.data = old.clone()
            old.fill_(torch.nan)


def trained(threads: int, how: str, which: int, held: bool) -> tuple[list[nn.Parameter], RST]:
    torch.set_num_threads(threads)
    params = [nn.Parameter(t) for t in gradients(-1)]
    opt = RST(params, "sgd", lr=0.1, momentum=0.9, rho=0.5, schedule=1.0)
    kept: list[Tensor] = []
    for step in range(4):
        for turn in range(2):
            for p, g in zip(params, gradients(2 * step + turn), strict=True):
                p.grad = g
                kept += [g] if held else []
            del g  # which would be another reference to the last gradient
            if step == 2:
                spoil(how, opt, params[which])
            if turn == 0:
                opt.perturb()
            else:
                opt.step()
    return params, opt


@pytest.mark.parametrize("held", [False, True], ids=["weights in gradients", "weights in backups"])
@pytest.mark.parametrize("which", [0, 258, 259, 387, 388, COUNT - 1])  # at the ends of what two and three threads have
@pytest.mark.parametrize("how", ["moved", "other strides", "no gradient", "negated", "other state", "moved state"])
def test_changes_are_seen(how: str, which: int, held: bool) -> None:
    assert _backends.plan_extension().knows_impl_layout()  # else one thread does it all
    expected, alone = trained(1, how, which, held)
    for threads in (2, 3):
        params, opt = trained(threads, how, which, held)
        assert has_plan(opt) and has_plan(alone)
        assert bits(params) == bits(expected)
        assert not any(p.isnan().any() for p in params)
