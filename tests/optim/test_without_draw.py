"""step() that nobody drew for: the warning of silent base steps, and what must not warn."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import ranks
import torch

from rst_fused import RST

BASES = ("sgd", "adamw", "instance")


def make(base: str = "sgd", **options: Any) -> tuple[torch.nn.Module, RST]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    options.setdefault("schedule", 1.0)
    if base == "instance":
        return model, RST(None, torch.optim.RMSprop(model.parameters(), lr=0.1), **options)
    return model, RST(model.parameters(), base, lr=0.1, **options)


def backward(model: torch.nn.Module, opt: RST) -> torch.Tensor:
    opt.zero_grad()
    loss = model(torch.ones(2, 4)).square().sum()
    loss.backward()
    return loss


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.mark.parametrize("base", BASES)
def test_a_loop_without_perturb_is_told_so_once(base):
    model, opt = make(base)
    backward(model, opt)
    with pytest.warns(RuntimeWarning, match=r"without a closure and without perturb.*is 1 at step 0") as seen:
        opt.step()
    assert seen[0].filename == __file__
    for text in ("step(closure)", "opt.perturb()", "opt.second_pass(model)", "rst_fused.integrations"):
        assert text in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            backward(model, opt)
            opt.step()
    assert (opt.steps, opt.sam_steps) == (4, 0)


def test_every_optimizer_warns_for_itself():
    for _ in range(2):
        model, opt = make()
        backward(model, opt)
        with pytest.warns(RuntimeWarning):
            opt.step()


def test_the_warning_comes_when_the_warm_up_ends():
    model, opt = make(schedule=lambda t: 0.0 if t < 3 else 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            backward(model, opt)
            opt.step()
    backward(model, opt)
    with pytest.warns(RuntimeWarning, match="is 0.5 at step 3"):
        opt.step()


def test_the_warning_comes_after_steps_that_were_drawn():
    model, opt = make(schedule=0.5)
    for _ in range(4):
        backward(model, opt)
        if opt.perturb():
            backward(model, opt)
        opt.step()
    backward(model, opt)
    with pytest.warns(RuntimeWarning, match="at step 4"):
        opt.step()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_what_draws_does_not_warn(silent, base, p):
    model, opt = make(base, schedule=p)
    for _ in range(6):
        opt.step(lambda: backward(model, opt))
        backward(model, opt)
        if opt.perturb():
            with opt.second_pass():
                backward(model, opt)
        opt.step()
    assert opt.steps == 12 and (p == 0.5 or opt.sam_steps == 12 * p)


def test_a_perturbation_that_was_forbidden_and_a_draw_alone_do_not_warn(silent):
    model, opt = make()
    backward(model, opt)
    opt.perturb(fire=False)
    opt.step()
    opt.draw()
    backward(model, opt)
    opt.step()
    assert (opt.steps, opt.sam_steps) == (2, 0)


def test_a_new_schedule_after_the_draw_does_not_warn(silent):
    model, opt = make(schedule=0.0)
    backward(model, opt)
    opt.perturb()
    opt.schedule = 1e-9
    opt.step()


def test_compiled_steps_do_not_warn(silent):
    model, opt = make()
    update = torch.compile(opt.step, backend="eager")
    for _ in range(3):
        backward(model, opt)
        opt.draw()
        update()
    assert opt.steps == 3


def test_steps_without_gradients_or_with_lr_0_are_steps():
    model, opt = make(schedule=0.0)
    opt.step()
    model.zero_grad()
    for group in opt.param_groups:
        group["lr"] = 0.0
    backward(model, opt)
    opt.step()
    assert opt.steps == 2


def _steps_of_shards() -> list[int]:
    """At lr 0: with gradients that are all zero, and with those of the first rank alone zero."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    steps = []
    for g in (torch.zeros(4), torch.tensor([0.0, 0.0, 1.0, 0.0])):
        p = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
        opt = RST([p], lr=0.0, momentum=0.9, schedule=0.0)
        p.grad = distribute_tensor(g, mesh, [Shard(0)])
        opt.step()
        steps.append(opt.steps)
    return steps


def test_ranks_agree_whether_gradients_are_zero():
    assert ranks.run(2, _steps_of_shards) == [[0, 1]] * 2
