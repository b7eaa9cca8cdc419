"""Whole runs: against the float64 oracle, against torch.optim at p = 0, and the forms and paths against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from optimizer_cases import GROUPS, METHODS, SHAPES, split
from oracle_optimizer import BACKENDS, Oracle, Problem, arrays, bits
from torch import nn

from rst_fused import RST, SAM

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 100
SGD: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    {"momentum": 0.8, "dampening": 0.4},
    {"momentum": 0.9, "maximize": True, "weight_decay": 0.1},
]
# float64: 100 steps of a dozen roundings of 1.1e-16 each, damped by the curvature. float32: as many of 6e-8, but for
# Adam, whose quotient amplifies where a gradient happens to be small. Measured: 4e-15, 2e-6 (SGD) and 2e-5 (Adam).
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def run(
    opt: RST, params: list[torch.Tensor], problem: Problem, steps: int = STEPS, closure: bool = True
) -> list[torch.Tensor]:
    """Trains and returns the losses."""
    losses = []
    for t in range(steps):
        if closure:
            losses.append(opt.step(lambda t=t: problem.backward(params, t)))
            continue
        losses.append(problem.backward(params, t))
        if opt.perturb():
            problem.backward(params, t)
        opt.step()
    return losses


def compare(base: str, numbers: tuple[dict[str, Any], ...], method: dict[str, Any], dtype: torch.dtype, backend: str,
            missing: bool = False, scale: float = 1.0) -> None:  # fmt: skip
    problem = Problem(SHAPES, STEPS)
    if missing:
        problem.missing = {(t, i) for t in range(STEPS) for i in range(len(SHAPES)) if (t + i) % 5 == 0}
    params = problem.parameters(dtype)
    opt = RST(split(params, numbers), base=base, seed=3, backend=backend, **method)
    oracle = Oracle(split(problem.start, numbers), base, seed=3, **method)
    for t in range(STEPS):
        opt.step(lambda t=t: problem.backward(params, t))
        oracle.step(problem)
    assert (opt.steps, opt.sam_steps) == (STEPS, oracle.sam_steps)
    worst = max(np.abs(p - w).max(initial=0) for p, w in zip(arrays(params), oracle.w, strict=True))
    assert worst < scale * TOLERANCE[dtype]
    assert opt.last_grad_norm == pytest.approx(oracle.norm, rel=100 * scale * TOLERANCE[dtype])


# --- against the oracle ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", GROUPS)
def test_100_steps_against_the_oracle(case: str, method: str, dtype: torch.dtype, backend: str) -> None:
    base = case.partition("-")[0]
    compare(base, GROUPS[case], METHODS[method], dtype, backend, scale=1 if base == "sgd" else 10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hyper", SGD, ids=lambda h: ",".join(h) or "plain")
@pytest.mark.parametrize("missing", [False, True], ids=["all", "missing"])
def test_sgd_hyperparameters_against_the_oracle(hyper: dict[str, Any], missing: bool, backend: str) -> None:
    """With and without gradients that are None in some steps: buffers then start late and Adam's counts drift apart."""
    numbers = {"lr": 0.02, "rho": 0.2, **hyper}
    if hyper.get("maximize"):  # of a convex loss: stays finite by the sign of the step
        numbers["lr"] = 1e-4
    compare("sgd", (numbers,), METHODS["grst"], torch.float64, backend, missing)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["adam", "adamw", "adam-amsgrad", "lion"])
def test_missing_gradients_against_the_oracle(case: str, backend: str) -> None:
    base = case.partition("-")[0]
    compare(base, GROUPS[case], METHODS["grst"], torch.float64, backend, missing=True, scale=10)


def complex_arrays(seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(n) + 1j * rng.standard_normal(n) for n in (3, 17)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_complex_parameters_against_the_oracle(adaptive: bool, backend: str) -> None:
    """The T of ASAM is the modulus, |w|^2 = re^2 + im^2, and never w^2."""
    start, aim = complex_arrays(0), complex_arrays(1)
    params = [nn.Parameter(torch.tensor(w)) for w in start]
    numbers = {"lr": 0.02, "rho": 0.3, "momentum": 0.9}
    opt = SAM(params, adaptive=adaptive, backend=backend, **numbers)
    oracle = Oracle([{"params": start, **numbers}], "sgd", 1.0, adaptive=adaptive)

    def closure() -> None:
        for p, a in zip(params, aim, strict=True):
            p.grad = 2 * p.detach() - torch.tensor(a)

    for _ in range(20):
        opt.step(closure)
        oracle.step(lambda w, t, which: [2 * x - a for x, a in zip(w, aim, strict=True)])
    for p, w in zip(params, oracle.w, strict=True):
        assert np.abs(p.detach().numpy() - w).max() < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_adam_is_adam_on_both_parts(backend: str) -> None:
    start, grads = complex_arrays(0), [complex_arrays(s) for s in range(1, 11)]
    params = [nn.Parameter(torch.tensor(w)) for w in start]
    parts = [nn.Parameter(torch.view_as_real(torch.tensor(w)).clone()) for w in start]
    for ps in (params, parts):
        opt = RST(ps, base="adam", schedule=1.0, rho=0.3, lr=0.05, backend=backend)
        for first, second in zip(grads[::2], grads[1::2], strict=True):
            for phase, given in ((opt.perturb, first), (opt.step, second)):
                for p, g in zip(ps, given, strict=True):
                    p.grad = torch.tensor(g) if p.is_complex() else torch.view_as_real(torch.tensor(g)).clone()
                phase()
    for p, q in zip(params, parts, strict=True):
        torch.testing.assert_close(torch.view_as_real(p.detach()), q.detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("method", ["sam", "asam", "grst"])
def test_master_weights_against_the_oracle(
    base: str, dtype: torch.dtype, stochastic: bool, method: str, backend: str
) -> None:
    """The masters follow the oracle, fed with the gradients of the run; parameters are masters rounded once.

    The perturbed weights lie within half a spacing of the oracle's (a whole one when rounded stochastically).
    """
    problem = Problem(SHAPES, 40)
    params = problem.parameters(dtype)
    start = arrays(params)
    opt = RST(split(params, GROUPS[base]), base=base, seed=3, backend=backend, master_weights=True,
              stochastic_rounding=stochastic, **METHODS[method])  # fmt: skip
    oracle = Oracle(split(start, GROUPS[base]), base, seed=3, **METHODS[method])
    spacing = torch.finfo(dtype).eps
    for t in range(40):
        seen: list[Any] = []

        def closure(t: int = t, seen: list[Any] = seen) -> torch.Tensor:
            weights = arrays(params)
            loss = problem.backward(params, t)
            seen.append((weights, [None if p.grad is None else arrays([p.grad])[0] for p in params]))
            return loss

        opt.step(closure)
        moved = oracle.step(lambda w, t, which, seen=seen: seen[which - 1][1])
        assert len(seen) == (1 if moved is None else 2)
        if moved is not None:
            for ours, exact in zip(seen[1][0], moved, strict=True):
                bound = spacing * (1.0 if stochastic else 0.5) * np.abs(exact) + 2.0**-24 + 2e-6
                assert (np.abs(ours - exact) <= bound).all()
    for p, w in zip(params, oracle.w, strict=True):
        master = opt.state[p]["master"]
        assert master.dtype == torch.float32
        assert np.abs(arrays([master])[0] - w).max(initial=0) < (1e-5 if base == "sgd" else 1e-4)
        assert torch.equal(p.detach(), master.to(dtype))
    assert not opt._step_state.backups  # masters take the place of backups


# --- p = 0 is the base optimizer ------------------------------------------------------------------------------------
TORCH: list[tuple[str, Any, dict[str, Any]]] = [
    *(("sgd", torch.optim.SGD, {"lr": 0.05, **h}) for h in SGD),
    ("adam", torch.optim.Adam, {"lr": 0.01}),
    ("adam", torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6}),
    ("adamw", torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    ("adamw", torch.optim.AdamW, {"lr": 0.01, "maximize": True}),
    ("adamw", torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", TORCH, ids=lambda c: f"{c[0]}-{','.join(c[2])}")
def test_p_zero_is_torch_optim(case: tuple[str, Any, dict[str, Any]], dtype: torch.dtype, backend: str) -> None:
    """cpu: SGD bit for bit; so are Adam's moments (unless decay brings the weights in), but torch takes square roots
    from a library that does not always round correctly (20% are an ulp off in float32): a last bit of w moves at times.

    reference: plain torch has no fused multiply-add, which the C++ kernels and torch's SGD use: an ulp per step.
    """
    base, cls, hyper = case
    ours, theirs = (Problem([(5,), (1000,), (3, 7)], 1).parameters(dtype) for _ in range(2))
    opt, torch_opt = RST(ours, base=base, schedule=0.0, backend=backend, **hyper), cls(theirs, **hyper)
    rng = np.random.default_rng(1)
    steps = 20
    for _ in range(steps):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.tensor(rng.standard_normal(tuple(p.shape)), dtype=dtype)
            q.grad = p.grad.clone()
        assert not opt.perturb()
        opt.step()
        torch_opt.step()
    assert opt.cost == 1.0
    pairs = [(p.detach(), q.detach()) for p, q in zip(ours, theirs, strict=True)]
    moments = [
        (opt.state[p][name], torch_opt.state[q][name])
        for p, q in zip(ours, theirs, strict=True)
        for name in ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
        if name in torch_opt.state[q]
    ]
    assert len(moments) == 3 * (3 + ("amsgrad" in hyper) if base != "sgd" else "momentum" in hyper)
    if backend == "cpu":
        exact = (moments if base != "adam" or "weight_decay" not in hyper else []) + (pairs if base == "sgd" else [])
        assert all(torch.equal(ours, theirs) for ours, theirs in exact)
    for ours_, theirs_ in pairs + moments:
        torch.testing.assert_close(ours_, theirs_, rtol=0, atol=steps * torch.finfo(dtype).eps)


# --- forms ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_closure_and_two_phases_are_the_same(base: str, backend: str) -> None:
    results = []
    for closure in (True, False):
        problem = Problem(SHAPES, 12)
        params = problem.parameters(torch.float32)
        opt = RST(split(params, GROUPS[base]), base=base, gamma="match", backend=backend)
        losses = run(opt, params, problem, 12, closure)
        results.append((bits(params), bits(losses), opt.steps, opt.sam_steps, opt.last_grad_norm))
    assert results[0] == results[1]
    assert 0 < results[0][3] < 12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("zero_grad", [False, True])
def test_first_and_second_step_are_rst_with_p_one(zero_grad: bool, backend: str) -> None:
    problem = Problem(SHAPES, 8)
    params, others = problem.parameters(torch.float32), problem.parameters(torch.float32)
    hyper = {"lr": 0.05, "momentum": 0.9, "rho": 0.2, "backend": backend}
    sam, rst = SAM(params, **hyper), RST(others, schedule=1, **hyper)
    for t in range(8):
        problem.backward(params, t)
        sam.first_step(zero_grad=zero_grad)
        assert bits(params) != bits(others)
        problem.backward(params, t)
        sam.second_step(zero_grad=zero_grad)
        assert all((p.grad is None) == zero_grad for p in params)
        rst.step(lambda t=t: problem.backward(others, t))
        assert bits(params) == bits(others)
    assert (sam.steps, sam.sam_steps, sam.cost) == (8, 8, 2.0)


BASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("sgd", torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    ("adamw", torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    ("adam", torch.optim.Adam, {"lr": 0.01, "maximize": True}),
    ("adam", torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [1.0, "match"])
@pytest.mark.parametrize("case", BASES, ids=lambda c: f"{c[0]}-{','.join(c[2])}")
def test_optimizer_instance_as_base_is_the_fused_base(case: Any, gamma: Any, backend: str) -> None:
    """Up to the rounding of float64: the fused update mixes and restores on the fly, the other one in between."""
    base, cls, hyper = case
    problem = Problem(SHAPES, 30)
    params, others = problem.parameters(torch.float64), problem.parameters(torch.float64)
    fused = RST(params, base=base, rho=0.2, gamma=gamma, backend=backend, **hyper)
    inner = cls(others, **hyper)
    wrapped = RST(base=inner, rho=0.2, gamma=gamma, backend=backend)
    assert wrapped.param_groups is inner.param_groups and wrapped.state is inner.state
    run(fused, params, problem, 30)
    run(wrapped, others, problem, 30, closure=False)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)
    assert (fused.steps, fused.sam_steps) == (wrapped.steps, wrapped.sam_steps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("build", ["instance", "instance with params", "class"])
def test_any_torch_optimizer_as_base(build: str, backend: str) -> None:
    """Adagrad, which is not fused: SAM by hand beside it, bit for bit on the reference of plain torch."""
    problem = Problem(SHAPES, 10)
    params, others = problem.parameters(torch.float64), problem.parameters(torch.float64)
    by_hand = torch.optim.Adagrad(others, lr=0.1)
    if build == "class":
        sam: RST = SAM(params, torch.optim.Adagrad, lr=0.1, rho=0.2, backend=backend)
    else:
        inner = torch.optim.Adagrad(params, lr=0.1)
        sam = SAM(params if "with" in build else None, inner, rho=0.2, backend=backend)
    run(sam, params, problem, 10)
    for t in range(10):
        problem.backward(others, t)
        norm = torch.stack([p.grad.norm() for p in others]).norm()
        saved = [p.detach().clone() for p in others]
        with torch.no_grad():
            for p in others:
                p += 0.2 * p.grad / norm
        problem.backward(others, t)
        with torch.no_grad():
            for p, w in zip(others, saved, strict=True):
                p.copy_(w)
        by_hand.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


# --- paths ----------------------------------------------------------------------------------------------------------
PATHS: list[tuple[str, dict[str, Any], torch.dtype]] = [
    ("sgd", {"momentum": 0.9, "weight_decay": 0.01}, torch.float32),
    ("sgd", {"gamma": "match", "nesterov": True, "momentum": 0.9}, torch.float64),
    ("sgd", {"gamma": lambda t: [1.0, 0.5, 2.0][t % 3]}, torch.bfloat16),
    ("adam", {"adaptive": True, "eta": 0.1}, torch.float32),
    ("adamw", {"gamma": 0.5, "maximize": True}, torch.float16),
    ("adamw", {"gamma": "match", "master_weights": True}, torch.bfloat16),
    ("sgd", {"master_weights": True, "momentum": 0.9, "stochastic_rounding": False}, torch.float16),
]


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("missing", [False, True], ids=["all", "missing"])
@pytest.mark.parametrize("case", PATHS, ids=lambda c: "-".join([c[0], *c[1], str(c[2])[6:]]))
def test_launch_plan_and_generic_path_are_bit_identical(case: Any, missing: bool, monkeypatch: Any) -> None:
    base, method, dtype = case
    results = []
    for planned in (True, False):
        problem = Problem([*SHAPES, (64, 300)], 16)
        if missing:  # in some steps, in either pass: a new plan is made, or the ops take over, between the passes
            problem.missing = {(t, i) for t in range(16) for i in range(6) if (3 * t + i) % 7 == 0}
        with monkeypatch.context() as m:
            if not planned:
                m.setattr("rst_fused._step.plan._serves", lambda opt: False)
            params = problem.parameters(dtype)
            params[-1].data = params[-1].data.view(300, 64).t()  # not contiguous
            opt = RST(split(params, ({"lr": 0.01, "rho": 0.3}, {"lr": 0.02})), base=base, backend="cpu", **method)
            for t in range(16):
                problem.backward(params, t)
                if opt.perturb():
                    problem.backward(params, t)
                    if missing and t % 2:
                        params[t % 4].grad = None
                opt.step()
            if not missing:  # the last step may have gone through the engine, which ends a plan
                assert (opt._plans._plan is not None) == planned
        state = [v for p in params for _, v in sorted(opt.state[p].items())]
        results.append((bits(params), bits(state), opt.last_grad_norm))
    assert results[0] == results[1]
