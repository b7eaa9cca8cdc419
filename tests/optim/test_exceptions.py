"""Whatever happens between the passes, the weights come back bit for bit; misuse raises before anything is changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optimizer_cases import (
    PROBLEM,
    REFUSED_WITHIN_A_STEP,
    RefusedCall,
    every_backend,
    every_mode,
    everything,
    make,
    train,
    usable,
)
from oracle_optimizer import bits
from torch import nn

from rst_fused import RST, SAM

pytestmark = pytest.mark.usefixtures("one_thread")
class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("in the middle of backward")


def fail(how: str, params: list[nn.Parameter]) -> None:
    """A second pass that ends with an exception."""
    PROBLEM.backward(params, 0)
    if how == "exception":
        raise ArithmeticError
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "exit":
        raise SystemExit
    if how == "nan":
        loss = torch.tensor(math.nan)
        if not loss.isfinite():
            raise ArithmeticError("loss is NaN")
    if how == "backward":  # some gradients are there already, some are not
        (sum(p.sum() for p in params[:2]) + FailingBackward.apply(params[3]).sum()).backward()


# --- exceptions in the second pass ----------------------------------------------------------------------------------
@every_backend
@every_mode
@pytest.mark.parametrize("how", ["exception", "interrupt", "exit", "nan", "backward"])
@pytest.mark.parametrize("form", ["closure", "second_pass", "restore"])
def test_exception_in_the_second_pass(form: str, how: str, mode: str, backend: str) -> None:
    params, opt = make(mode, backend)
    train(params, opt, 2)
    before = everything(params, opt)
    PROBLEM.backward(params, 2)
    calls: list[int] = []

    def closure() -> None:
        calls.append(len(calls))
        PROBLEM.backward(params, 2)
        if len(calls) == 2:
            assert bits(params) != before[0]
            fail(how, params)

    with pytest.raises((ArithmeticError, KeyboardInterrupt, SystemExit)):
        if form == "closure":
            opt.step(closure)
        else:
            assert opt.perturb()
            if form == "second_pass":
                with opt.second_pass():
                    fail(how, params)
            else:
                try:
                    fail(how, params)
                finally:
                    opt.restore()
    assert everything(params, opt) == before
    usable(params, opt, mode, backend, 2)


@every_backend
@every_mode
def test_exception_in_the_first_pass(mode: str, backend: str) -> None:
    params, opt = make(mode, backend)
    before = everything(params, opt)
    with pytest.raises(ArithmeticError):
        opt.step(lambda: fail("exception", params))
    assert everything(params, opt) == before
    usable(params, opt, mode, backend, 0)


@every_backend
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_exception_in_the_step_of_the_base_optimizer(gamma: float, backend: str) -> None:
    class Failing(torch.optim.SGD):
        broken = True

        def step(self, closure: Any = None) -> Any:
            if self.broken:
                raise ArithmeticError
            return super().step(closure)

    params = PROBLEM.parameters(torch.float32)
    opt = RST(base=Failing(params, lr=0.05), schedule=1.0, gamma=gamma, backend=backend)
    before = everything(params, opt)
    with pytest.raises(ArithmeticError):
        train(params, opt)
    assert everything(params, opt) == before
    Failing.broken = False
    train(params, opt)
    assert opt.steps == 1 and bits(params) != before[0]


def spoil(p: nn.Parameter, how: str) -> None:
    """Gives p a gradient that does not fit it."""
    p.grad = None
    if how == "sparse":
        p.grad = torch.zeros_like(p).to_sparse()
    else:
        p.grad_dtype = None  # any
        p.grad = torch.zeros(p.shape, dtype=torch.float64)


@every_backend
@every_mode
@pytest.mark.parametrize("which", [1, 2], ids=["first", "second"])
@pytest.mark.parametrize("how", ["sparse", "dtype"])
def test_gradient_that_does_not_fit(how: str, which: int, mode: str, backend: str) -> None:
    """Refused by parameter, group and remedy, and the weights are back."""
    params, opt = make(mode, backend, **({"gamma": 2.0} if mode == "instance" else {}))
    others, twin = make(mode, backend, **({"gamma": 2.0} if mode == "instance" else {}))
    train(params, opt, 2)
    train(others, twin, 2)
    before = everything(params, opt)
    PROBLEM.backward(params, 0)
    if which == 2:
        opt.perturb()
        PROBLEM.backward(params, 0)
    spoil(params[1], how)
    with pytest.raises(RuntimeError, match=r"(?s)gradient of parameter 1 of group 0.*(sparse=False|must agree)"):
        (opt.perturb if which == 1 else opt.step)()
    assert everything(params, opt) == before
    params[1].grad = None
    train(params, opt, 2, 2)
    train(others, twin, 2, 2)
    assert everything(params, opt) == everything(others, twin)


@every_backend
@every_mode
def test_restore_without_a_perturbation_does_nothing(mode: str, backend: str) -> None:
    params, opt = make(mode, backend)
    for _ in range(2):
        before = everything(params, opt)
        opt.restore()
        assert everything(params, opt) == before
        train(params, opt)


# --- NaN and inf ----------------------------------------------------------------------------------------------------
@every_backend
@every_mode
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_gradients(bad: float, mode: str, backend: str) -> None:
    """Pass one: no perturbation, and it is counted. Pass two: the caller decides; restore() brings back every bit."""
    params, opt = make(mode, backend)
    before = bits(params)
    PROBLEM.backward(params, 0)
    params[3].grad[7] = bad
    assert opt.perturb() and bits(params) == before
    assert not math.isfinite(opt.last_grad_norm)
    assert opt.non_finite_norms == 1
    opt.restore()

    PROBLEM.backward(params, 0)
    opt.perturb()
    PROBLEM.backward(params, 0)
    params[3].grad[7] = bad
    opt.restore()
    assert bits(params) == before and opt.non_finite_norms == 1
    usable(params, opt, mode, backend, 0)


@every_backend
def test_step_after_a_non_finite_norm_obeys_the_caller(backend: str) -> None:
    """The update takes the gradients of the second pass as they are, at the unperturbed weights."""
    params, opt = make("sgd", backend)
    others, twin = make("sgd", backend)
    PROBLEM.backward(params, 0)
    params[0].grad[0] = math.nan
    opt.perturb()
    PROBLEM.backward(params, 0)
    opt.step()
    PROBLEM.backward(others, 0)
    assert not twin.perturb(fire=False)
    twin.step()
    assert bits(params) == bits(others)
    assert (opt.sam_steps, opt.non_finite_norms) == (1, 1)


@every_backend
@every_mode
def test_zero_gradient_is_no_perturbation(mode: str, backend: str) -> None:
    params, opt = make(mode, backend, adaptive=True)
    before = bits(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    assert opt.perturb() and bits(params) == before
    assert opt.last_grad_norm == 0.0 and opt.non_finite_norms == 0
    PROBLEM.backward(params, 0)
    opt.step()
    assert bits(params) != before and all(p.isfinite().all() for p in params)


@every_backend
@pytest.mark.parametrize("adaptive", [False, True])
def test_huge_and_tiny_gradients(adaptive: bool, backend: str) -> None:
    """Squares beyond float32 and below its range: the norm is computed in float64, so ||e|| = rho still."""
    for size in (1e30, 1e-30):
        p = nn.Parameter(torch.ones(64))
        opt = SAM([p], rho=0.5, adaptive=adaptive, backend=backend)
        p.grad = torch.full_like(p, size)
        opt.perturb()
        assert opt.last_grad_norm == pytest.approx(8 * size, rel=1e-6)
        wanted = 0.5 if size == 1e30 else 0.5 * 8e-30 / (8e-30 + 1e-12)  # the usual eps: below 1e-12 e fades out
        assert (p - 1).norm().item() == pytest.approx(wanted, rel=1e-5, abs=1e-7)


# --- wrong order ----------------------------------------------------------------------------------------------------
WRONG: dict[str, RefusedCall] = {"perturb": lambda opt, ps: opt.perturb(), **REFUSED_WITHIN_A_STEP}


@every_backend
@every_mode
@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused_while_perturbed(what: str, mode: str, backend: str) -> None:
    params, opt = make(mode, backend)
    start = bits(params)
    PROBLEM.backward(params, 0)
    opt.perturb()
    before = everything(params, opt)
    with pytest.raises(RuntimeError, match=rf"(?s){what.split('(')[0]}.*while the weights are perturbed.*restore\(\)"):
        WRONG[what](opt, params)
    assert everything(params, opt) == before
    opt.restore()
    assert bits(params) == start
    usable(params, opt, mode, backend, 0)


def test_second_step_before_first_step() -> None:
    params = PROBLEM.parameters(torch.float32)
    opt = SAM(params, lr=0.1)
    with pytest.raises(RuntimeError, match="second_step before first_step"):
        opt.second_step()


# --- gradients that are not there -----------------------------------------------------------------------------------
@every_backend
@every_mode
@pytest.mark.parametrize("first", [(), (0,), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("second", [(), (0,), (1, 3), (0, 1, 2, 3)])
def test_gradients_none_in_either_pass(first: Any, second: Any, mode: str, backend: str) -> None:
    """A parameter is perturbed if it has a gradient in pass one, updated if it has one in pass two, and never lost."""
    params, opt = make(mode, backend)
    train(params, opt, 1)
    before = [bits([p]) for p in params]
    for phase, absent in ((opt.perturb, first), (opt.step, second)):
        PROBLEM.backward(params, 1)
        for i in absent:
            params[i].grad = None
        phase()
        now = [bits([p]) for p in params]
        changed = {i for i in (0, 1, 3) if now[i] != before[i]}
        assert changed == {0, 1, 3} - set(absent)
    assert not opt._step_state.saved and not opt._step_state.first_grads
    assert opt.steps == opt.sam_steps == 2
    train(params, opt, 1, 2)


@every_backend
def test_one_parameter_in_a_thousand_without_gradient(backend: str) -> None:
    params = [nn.Parameter(torch.full((3,), float(i))) for i in range(1000)]
    opt = RST(params, base="adamw", schedule=1.0, lr=0.1, backend=backend)
    for step in range(4):
        for phase, left_out in ((opt.perturb, 500), (opt.step, 501 + step % 2)):
            for p in params:
                p.grad = torch.ones_like(p)
            params[left_out].grad = None
            before = [p.detach().clone() for p in params]
            phase()
        assert torch.equal(params[501 + step % 2], before[501 + step % 2]) == (501 + step % 2 == 500)
    counts = [float(opt.state[p]["step"]) for p in params]
    assert counts[501:503] == [2, 2] and set(counts[:501] + counts[503:]) == {4}
