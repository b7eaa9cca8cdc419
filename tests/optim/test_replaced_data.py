"""Parameters that get other data while the optimizer knows them: other storage, another shape, another dtype."""

from __future__ import annotations

import math

import pytest
import torch
from optimizer_cases import PROBLEM, every_backend, every_mode, make, train
from oracle_optimizer import bits
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@every_backend
@every_mode
@pytest.mark.parametrize("when", ["between passes", "between steps"])
def test_swapped_storage(when: str, mode: str, backend: str) -> None:
    """p.data = other memory, as FSDP, model.to() and some EMA tools do: the numbers are those of an undisturbed run."""
    params, opt = make(mode, backend)
    others, twin = make(mode, backend)
    for t in range(4):
        for ps, o in ((params, opt), (others, twin)):
            PROBLEM.backward(ps, t)
            o.perturb()
            if ps is params and when == "between passes":
                old = [p.data for p in ps]
                for p in ps:
                    p.data = p.data.clone()
                for q in old:
                    q.fill_(math.nan)
            PROBLEM.backward(ps, t)
            o.step()
            if ps is params and when == "between steps":
                for p in ps:
                    p.data = p.data.clone()
        assert bits(params) == bits(others)


def ones(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


# What a parameter turns into between the passes: another shape, or another dtype; and what it was before, if not usual.
CHANGES = {
    "shape": (None, None),
    "float64": (torch.float64, None),
    "bfloat16": (torch.bfloat16, torch.float32),  # beside masters: gets none of its own in the middle of a step
    "float32": (torch.float32, torch.bfloat16),
}


@every_backend
@every_mode
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["step", "restore"])
def test_other_data_between_the_passes(how: str, change: str, mode: str, backend: str) -> None:
    """Refused by name; the other parameters come back bit for bit, and a converted one to what it was, converted."""
    becomes, was = CHANGES[change]
    params, opt = make(mode, backend, **({} if was is None else {"dtype": was}))
    original = [p.data for p in params]
    for p in params:  # what keeps weights of the other dtype exists already, and must not be taken for this one
        p.data = torch.zeros_like(p.data, dtype=becomes)
    ones(params)
    if change == "float64" and opt.state_dtype is not None:
        with pytest.raises(RuntimeError, match="parameter 0 of group 0 is torch.float64, whose state is not kept in"):
            opt.perturb()
        return
    opt.perturb()
    opt.restore()
    for p, data in zip(params, original, strict=True):
        p.data = data
        for name in opt.state[p].keys() - {"master"}:  # buffers would have to be converted with the model
            del opt.state[p][name]
    train(params, opt)
    steps, before, weights = opt.steps, bits(params), [p.detach().clone() for p in params]
    PROBLEM.backward(params, 1)
    opt.perturb()
    old = params[1].detach().clone()
    params[1].data = torch.full((9,), 7.0, dtype=old.dtype) if becomes is None else old.to(becomes)
    ones(params)
    if how == "step":
        with pytest.raises(RuntimeError, match="parameter 1 of group 0 is .*, but when it was perturbed it was "):
            opt.step()
    else:
        opt.restore()
    assert bits(params[:1] + params[2:]) == before[:1] + before[2:] and opt.steps == steps
    if becomes is None:
        assert params[1].tolist() == [7.0] * 9
    else:
        narrower = min(becomes, old.dtype, key=lambda dtype: dtype.itemsize)  # a master is finer than its parameter
        assert torch.equal(params[1].detach().to(narrower), weights[1].to(narrower))
    params[1].data = old
    ones(params)
    assert opt.perturb()  # usable
    opt.restore()
    assert torch.equal(params[1].detach(), old)
