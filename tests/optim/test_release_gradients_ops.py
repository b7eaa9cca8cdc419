"""release_gradients=True where one op of several that update a bucket fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle_optimizer import BACKENDS, bits
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from rst_fused import RST
from rst_fused._step import release


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_updated_before_an_op_failed_is_counted(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.linspace(-1, 1, 5) + i) for i in range(2)]
    groups = [{"params": [params[0]], "amsgrad": False}, {"params": [params[1]], "amsgrad": True}]
    opt = RST(groups, base="adam", lr=0.1, schedule=0.0, backend=backend, release_gradients=True)

    def loss() -> torch.Tensor:
        return torch.stack([p.square().sum() for p in params]).sum()

    loss().backward()
    opt.step()
    before = [bits([p]) for p in params]
    real = type(opt.rule).call

    def call(*args: Any) -> Any:
        op, arguments = real(*args)  # type: ignore[arg-type]
        return (op, arguments) if args[8].states == 2 else (broken, ())

    def broken() -> None:
        raise ArithmeticError

    monkeypatch.setattr(type(opt.rule), "call", call)
    monkeypatch.setattr(release, "BUCKET", sum(p.nbytes for p in params))  # both in one launch
    with pytest.raises(ArithmeticError) as caught, opt.second_pass():
        loss().backward()
    assert any("1 of 2 parameters had been updated" in note for note in caught.value.__notes__)
    assert [bits([p]) == old for p, old in zip(params, before, strict=True)] == [False, True]
    assert [float(opt.state[p]["step"]) for p in params] == [2, 1]
    assert params[0].grad is None and opt.steps == 1


@pytest.mark.parametrize("base", ["sgd", "adam", "lion"])
def test_the_plan_of_perturbations_is_kept(base: str) -> None:
    params = [nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3) + i) for i in range(3)]
    opt = RST(params, base, lr=0.01, schedule=1.0, release_gradients=True)
    plans = []
    for _ in range(4):
        for again in (False, True):
            torch.stack([p.sin().sum() for p in params]).sum().backward()
            if not again:
                assert opt.perturb()
                plans.append(opt._plans._plan)
        opt.step()
    assert opt.backend.plans == "" or (plans[-1] is not None and plans[1] is plans[2] is plans[3])


def test_memory_that_kept_weights_is_free_after_the_step() -> None:
    """Also what a launch plan, which goes on, had kept."""
    params = [nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3) + i) for i in range(3)]
    opt = RST(params, lr=0.01, momentum=0.9, schedule=1.0, release_gradients=True)
    for _ in range(3):
        torch.stack([p.sin().sum() for p in params]).sum().backward()
        assert opt.perturb()
        kept = [StorageWeakRef(w.untyped_storage()) for w in opt._step_state.saved.values()]
        assert len(kept) == 3 and not any(ref.expired() for ref in kept)
        torch.stack([p.sin().sum() for p in params]).sum().backward()
        opt.step()
        assert all(ref.expired() for ref in kept)
