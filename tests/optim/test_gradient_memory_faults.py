"""Weights that are kept in gradients survive what happens between the passes: other paths, other memory, other threads.

Failures and interrupts themselves: test_exceptions.py, test_interrupts.py and test_all_or_nothing.py.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from held_gradients import Seen, value_for
from oracle_optimizer import bits
from paths import every_executor, has_plan, needs_plans, no_plans, observed
from torch import Tensor, nn

from rst_fused import RST
from rst_fused._step.plan import PlanCache

pytestmark = pytest.mark.usefixtures("one_thread")
PATHS = ("plan", "ops")


def made(backend: str = "cpu", **options: Any) -> tuple[list[nn.Parameter], RST]:
    """After one step."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5,), (3, 4), (0,))]
    opt = RST(params, **{"lr": 0.05, "momentum": 0.9, "rho": 0.5, "schedule": 1.0, "backend": backend, **options})
    step(params, opt, 0)
    return params, opt


def give(params: list[nn.Parameter], t: int, which: int = 0) -> None:
    for i, p in enumerate(params):
        p.grad = value_for(p, t, which, i).to(p.dtype)


def step(params: list[nn.Parameter], opt: RST, t: int) -> None:
    give(params, t)
    opt.perturb()
    give(params, t, 1)
    opt.step()


def by(path: str) -> Any:
    return no_plans() if path == "ops" else nullcontext()


@needs_plans
@pytest.mark.parametrize("end", ["step", "restore"])
@pytest.mark.parametrize("paths", list(product(PATHS, PATHS, PATHS)), ids="-".join)
def test_the_call_after_perturb_takes_another_path(paths: tuple[str, str, str], end: str) -> None:
    """The next step, too. The bits are those of one path and of backups."""
    seen = []
    for taken, holds in ((paths, False), (("plan",) * 3, False), (("ops",) * 3, True)):
        params, opt = made()
        for t in range(1, 4):
            with by(taken[0]):
                give(params, t)
                held = [p.grad for p in params if holds]
                opt.perturb()
                held.clear()
            with by(taken[1]):
                give(params, t, 1)
                opt.step() if end == "step" else opt.restore()
            assert not opt._step_state.saved
            with by(taken[2]):
                step(params, opt, t + 10)
        seen.append(observed(params, opt))
    assert seen[0] == seen[1] == seen[2]


def new_data(params: list[nn.Parameter], opt: RST) -> None:
    params[0].data = params[0].data.clone()


def new_storage(params: list[nn.Parameter], opt: RST) -> None:
    params[1].data.set_(params[1].data.clone().untyped_storage(), 0, (3, 4))


def other_strides(params: list[nn.Parameter], opt: RST) -> None:
    params[1].data = params[1].data.t().contiguous().t()


def without_plan(params: list[nn.Parameter], opt: RST) -> None:
    opt._plans.drop()


def swapped(params: list[nn.Parameter], opt: RST) -> None:
    for p in params:
        p.grad = None
    torch.utils.swap_tensors(params[0], nn.Parameter(params[0].detach().clone()))


def there_and_back(params: list[nn.Parameter], opt: RST) -> None:
    """The model on another device and here again."""
    nn.ParameterList(params).to("meta")
    for p in params:
        p.data = torch.full_like(p, 7.0, device="cpu")


CHANGES = [new_data, new_storage, other_strides, without_plan, swapped, there_and_back]


@every_executor
@pytest.mark.parametrize("end", ["step", "restore"])
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_in_other_memory(change: Callable[..., None], end: str, served_by: str) -> None:
    """Between the passes. As with backups, bit for bit, or refused as with these."""
    seen: list[Any] = []
    for holds in (False, True):
        params, opt = made(served_by)
        give(params, 1)
        held = [p.grad for p in params if holds]
        opt.perturb()
        held.clear()
        assert len(opt._step_state.backups) == (3 if holds else 0)
        change(params, opt)
        give(params, 1, 1)
        error = ""
        try:
            opt.step() if end == "step" else opt.restore()
        except RuntimeError as refused:
            error = str(refused)
            opt.restore()
        seen.append((error, observed(params, opt)))
        step(params, opt, 2)
        seen.append(observed(params, opt))
    assert seen[:2] == seen[2:]


@every_executor
@pytest.mark.parametrize("end", ["step", "restore"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_is_converted_between_the_passes(dtype: torch.dtype, end: str, served_by: str) -> None:
    """step() refuses it, and the weights are those of before, rounded."""
    params, opt = made(served_by)
    expected = bits([p.detach().to(dtype) for p in params])
    give(params, 1)
    opt.perturb()
    nn.ParameterList(params).to(dtype)
    give(params, 1, 1)
    if end == "step":
        with pytest.raises(RuntimeError, match="change it before perturb"):
            opt.step()
    else:
        opt.restore()
    assert bits(params) == expected and not opt._step_state.perturbed


@every_executor
@pytest.mark.parametrize("call", [copy.deepcopy, pickle.dumps, RST.state_dict])
def test_what_is_refused_while_weights_are_in_gradients(call: Callable[[RST], Any], served_by: str) -> None:
    params, opt = made(served_by)
    before = bits(params)
    give(params, 1)
    opt.perturb()
    assert not opt._step_state.backups
    with pytest.raises(RuntimeError, match="while the weights are perturbed"):
        call(opt)
    opt.restore()
    assert bits(params) == before
    copy.deepcopy(opt), pickle.dumps(opt)


# --- references that come after Python has counted ------------------------------------------------------------------
def saved_by_autograd(g: Tensor) -> Seen:
    x = torch.ones_like(g, requires_grad=True)
    product = (g * x).sum()
    return lambda: torch.autograd.grad(product, x, retain_graph=True)[0]


def alias_saved_by_autograd(g: Tensor) -> Seen:
    """A tensor of its own, with the same storage."""
    return saved_by_autograd(g.detach())


def list_of_scripts(g: Tensor) -> Seen:
    held = torch.jit.script([g])
    return lambda: held[0]


def attribute_of_scripts(g: Tensor) -> Seen:
    module = torch.jit.script(nn.Identity())
    module._c._register_attribute("held", torch._C.TensorType.get(), g)
    return lambda: module._c.getattr("held")


@needs_plans
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("hold", [saved_by_autograd, alias_saved_by_autograd, list_of_scripts, attribute_of_scripts])
def test_a_plan_refuses_gradients_that_python_has_accepted(
    hold: Callable[[Tensor], Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C++ takes a reference between the two. Weights go into backups, and what is held stays a gradient."""
    renew, seen = PlanCache.renew, []
    swaps: list[int] = []
    held: list[Seen] = []

    def holding(cache: PlanCache, opt: RST, for_update: bool) -> bool:
        """When a plan is there that relies on what Python has counted."""
        done = renew(cache, opt, for_update)
        swaps.append(len(opt._step_state.swaps))
        if len(swaps) == 1:
            held.append(hold(opt.param_groups[0]["params"][1].grad))
        return done

    for disturbed in (False, True):
        params, opt = made()
        for t in range(1, 4):
            give(params, t)
            expected = params[1].grad.clone()
            if disturbed and t == 2:
                opt._plans.drop()
                with monkeypatch.context() as patch:
                    patch.setattr(PlanCache, "renew", holding)
                    opt.perturb()
                assert swaps == [3, 0] and has_plan(opt) and len(held) == 1
                assert torch.equal(held[0](), expected)
            else:
                opt.perturb()
            assert len(opt._step_state.backups) == (3 if disturbed and t >= 2 else 0)
            give(params, t, 1)
            opt.step()
            if held and t == 2:
                assert torch.equal(held[0](), expected)
        seen.append(observed(params, opt))
    assert seen[0] == seen[1]


# --- threads --------------------------------------------------------------------------------------------------------
def drop_gradients(params: list[nn.Parameter], opt: RST) -> None:
    for p in params:
        p.grad = None


def ask(params: list[nn.Parameter], opt: RST) -> None:
    opt.restore()


def steps(params: list[nn.Parameter], opt: RST) -> None:
    if all(p.grad is not None for p in params):
        opt.step()


@needs_plans
@pytest.mark.parametrize("phase", ["perturb", "step"])
@pytest.mark.parametrize("other", [drop_gradients, ask, steps])
def test_another_thread_while_a_large_kernel_runs(other: Callable[..., None], phase: str) -> None:
    """It works without Python's lock, on gradients that the other thread may drop. What comes of two calls at once is
    anybody's guess, but no memory is freed under a kernel, and the next steps work."""
    n = 3 << 20  # 12 MB: above what runs with the lock
    params = [nn.Parameter(torch.ones(n))]
    opt = RST(params, lr=0.05, momentum=0.9, rho=0.5, schedule=1.0, backend="cpu")
    stop, errors = threading.Event(), []

    def meddle() -> None:
        while not stop.is_set():
            try:
                other(params, opt)
            except (RuntimeError, AttributeError, AssertionError) as error:  # a step that another one has ended
                errors.append(error)

    def phases(t: int) -> None:
        for p in params:
            p.grad = torch.ones(n)
        opt.perturb()
        for p in params:
            p.grad = torch.ones(n)
        opt.step()

    phases(0)
    thread = threading.Thread(target=meddle)
    for _ in range(6):
        if phase == "step":
            params[0].grad = torch.ones(n)
            opt.perturb()
        if not thread.is_alive():
            thread.start()
        try:
            params[0].grad = torch.ones(n)
            opt.perturb() if phase == "perturb" else opt.step()
        except (RuntimeError, AttributeError, AssertionError) as error:
            errors.append(error)
        stop.set()
        thread.join()
        stop.clear()
        thread = threading.Thread(target=meddle)
        opt.restore()
    opt.restore()
    phases(7)
    assert torch.isfinite(params[0]).all() and not opt._step_state.saved
