"""state_dtype=torch.bfloat16: half the memory of a first moment, and a run that stays as good."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle_optimizer import BACKENDS, bits
from paths import every_executor, no_plans
from torch import nn

from rst_fused import RST, SAM

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
BF16 = torch.bfloat16
BASES: dict[str, dict[str, Any]] = {
    "sgd": {"base": "sgd", "momentum": 0.9}, "adam": {"base": "adam"}, "amsgrad": {"base": "adamw", "amsgrad": True},
    "lion": {"base": "lion"},
}  # fmt: skip
every_base = pytest.mark.parametrize("base", BASES)
FIRST = {"sgd": "momentum_buffer", "adam": "exp_avg", "amsgrad": "exp_avg", "lion": "exp_avg"}
SHAPES = [(33,), (5, 7), (), (300,)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(params: list[nn.Parameter], t: int, missing: tuple[int, ...] = ()) -> None:
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * t + i)
        p.grad = None if i in missing else torch.randn(p.shape, generator=generator).to(p.dtype)


def make(base: str, backend: str = "auto", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    params = parameters(dtype)
    options = {"lr": 0.01, "rho": 0.1, "schedule": 0.5, "seed": 3, "state_dtype": BF16, **BASES[base], **more}
    return params, RST(params, backend=backend, **options)


def train(params: list[nn.Parameter], opt: RST, steps: range) -> None:
    for t in steps:
        gradients(params, t)
        if opt.perturb():
            gradients(params, t + 50)
        opt.step()


# --- what it keeps ----------------------------------------------------------------------------------------------------
@every_base
@every_executor
@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16-masters", "fp16-masters"])
def test_the_first_moment_alone_is_bfloat16(kind: str, executor: str, base: str) -> None:
    name, _, masters = kind.partition("-")
    dtype = {"fp32": torch.float32, "bf16": BF16, "fp16": torch.float16}[name]
    params, opt = make(base, executor.split()[0], dtype, master_weights=bool(masters))
    if executor.endswith("ops"):
        with no_plans():
            train(params, opt, range(4))
    else:
        train(params, opt, range(4))
    wide = torch.float32 if masters else dtype
    for p in params:
        state = opt.state[p]
        assert state[FIRST[base]].dtype == BF16 and (state[FIRST[base]] != 0).all()
        others = {k: t.dtype for k, t in state.items() if k not in (FIRST[base], "step")}
        assert set(others.values()) <= {wide}
        assert ("master" in state) == bool(masters)


@every_base
def test_half_the_memory(base: str) -> None:
    def size(opt: RST) -> int:
        return sum(t.nbytes for state in opt.state.values() for k, t in state.items() if k == FIRST[base])

    narrow, wide = make(base), make(base, state_dtype=None)
    for params, opt in (narrow, wide):
        train(params, opt, range(1))
    assert 2 * size(narrow[1]) == size(wide[1])


# --- how well it trains -----------------------------------------------------------------------------------------------
def follow(backend: str, steps: int, nearest: bool, **options: Any) -> torch.Tensor:
    """Where a run with small gradients and a slow average ends."""
    generator = torch.Generator().manual_seed(1)
    p = nn.Parameter(torch.zeros(400))
    opt = RST([p], "adam", lr=1e-4, betas=(0.998, 0.999), rho=0.0, schedule=0.0, backend=backend, **options)
    target = torch.randn(400, generator=generator)
    for _ in range(steps):
        p.grad = p.detach() - target + 0.1 * torch.randn(400, generator=generator)
        opt.step()
        if nearest:
            opt.state[p]["exp_avg"].copy_(opt.state[p]["exp_avg"].to(BF16))
    return p.detach()


@every_backend
def test_a_long_run_stays_with_that_in_float32(backend: str) -> None:
    """Rounded to nearest, exp_avg stops short of what it averages: a step changes less than half a spacing."""
    exact = follow(backend, 2000, False)
    stochastic = follow(backend, 2000, False, state_dtype=BF16)
    nearest = follow(backend, 2000, True)
    off, off_nearest = ((x - exact).norm() / exact.norm() for x in (stochastic, nearest))
    assert off < 0.02 and off < off_nearest / 10, (off, off_nearest)


@every_base
@every_backend
def test_near_float32_after_some_steps(backend: str, base: str) -> None:
    runs = []
    for dtype in (BF16, None):
        params, opt = make(base, backend, lr=1e-3, state_dtype=dtype)
        train(params, opt, range(20))
        runs.append(torch.cat([p.detach().reshape(-1) for p in params]))
    moved = (runs[1] - torch.cat([p.detach().reshape(-1) for p in parameters()])).norm()
    assert (runs[0] - runs[1]).norm() < (0.2 if base == "lion" else 0.02) * moved  # the sign of Lion is all or nothing


# --- what its bits depend on ------------------------------------------------------------------------------------------
@every_executor
def test_groups_and_missing_gradients_change_no_bits(executor: str) -> None:
    """A parameter is rounded as its place among all says, whatever else takes part in a step."""
    results = []
    for split, missing in ((4, ()), (1, ()), (2, (0,)), (3, (1, 2))):
        params = parameters()
        groups = [{"params": params[:split]}, {"params": params[split:], "weight_decay": 0.0}]
        opt = RST([g for g in groups if g["params"]], "sgd", momentum=0.9, lr=0.1, schedule=0.0, state_dtype=BF16,
                  backend=executor.split()[0])  # fmt: skip
        opt.param_groups[-1]["nesterov"] = split < 4 and not missing  # then one call does not serve both
        for t in range(3):
            gradients(params, t, missing)
            if executor.endswith("ops"):
                with no_plans():
                    opt.step()
            else:
                opt.step()
        results.append([opt.state[p].get("momentum_buffer") for p in params])
    for found in results[1:]:
        pairs = [(a, b) for a, b in zip(results[0], found, strict=True) if b is not None]
        assert len(pairs) >= 2 and all(torch.equal(a, b) for a, b in pairs)


@every_backend
def test_steps_and_seeds_give_other_bits(backend: str) -> None:
    found = []
    for seed, first in ((0, 0), (1, 0), (0, 1)):
        p = nn.Parameter(torch.zeros(4000))
        opt = RST([p], momentum=0.9, lr=0.0, schedule=0.0, seed=seed, state_dtype=BF16, backend=backend)
        for _ in range(1 + first):
            opt.state.clear()
            p.grad = torch.full_like(p, 1 + 2.0**-8)
            opt.step()
        found.append(opt.state[p]["momentum_buffer"])
    assert all(0.4 < (a != b).double().mean() < 0.6 for a in found for b in found if a is not b)


@every_base
@every_backend
def test_compiled_steps_are_rounded_as_eager_ones(backend: str, base: str) -> None:
    def compiled(opt: RST) -> tuple[Callable[..., Any], Callable[..., Any]]:
        perturb = torch.compile(lambda fire: opt.perturb(fire), fullgraph=True, backend="eager")
        return perturb, torch.compile(lambda: RST.step(opt), fullgraph=True, backend="eager")

    torch._dynamo.reset()
    results = []
    for compiles in (False, True):
        params, opt = make(base, backend)
        perturb, update = compiled(opt) if compiles else (opt.perturb, opt.step)
        for t in range(5):
            gradients(params, t)
            if perturb(opt.draw()):
                gradients(params, t + 50)
            update()
        results.append((bits(params), [bits([opt.state[p][FIRST[base]]]) for p in params]))
    assert results[0] == results[1]
    torch._dynamo.reset()


# --- checkpoints ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("base", "cls"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("amsgrad", torch.optim.AdamW)]
)
def test_torch_optim_goes_on_from_its_checkpoint(base: str, cls: type[torch.optim.Optimizer]) -> None:
    params, opt = make(base, schedule=0.0)
    train(params, opt, range(3))
    others = [nn.Parameter(p.detach().clone()) for p in params]
    twin = cls(others, lr=1.0)
    saved = copy.deepcopy(opt.state_dict())
    twin.load_state_dict(copy.deepcopy(saved))
    for p, q in zip(params, others, strict=True):
        assert twin.state[q][FIRST[base]].dtype == torch.float32
        assert torch.equal(twin.state[q][FIRST[base]], opt.state[p][FIRST[base]].float())
    wide = RST(others := [nn.Parameter(q.detach().clone()) for q in others], **{**BASES[base], "lr": 1.0})
    wide.load_state_dict(copy.deepcopy(saved))
    gradients(params, 9)
    for p, q in zip(params, twin.param_groups[0]["params"], strict=True):
        q.grad = p.grad.clone()
    for p, q in zip(params, others, strict=True):
        q.grad = p.grad.clone()
    opt.step(), twin.step(), wide.step()
    for p, q, r in zip(params, twin.param_groups[0]["params"], others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(p, r, rtol=1e-5, atol=1e-6)


@every_base
@every_backend
def test_a_checkpoint_in_float32_is_rounded(backend: str, base: str) -> None:
    params, wide = make(base, backend, state_dtype=None)
    train(params, wide, range(3))
    others, opt = make(base, backend)
    opt.load_state_dict(copy.deepcopy(wide.state_dict()))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(opt.state[q][FIRST[base]], wide.state[p][FIRST[base]].to(BF16))
        with torch.no_grad():
            q.copy_(p)
    train(params, wide, range(3, 5)), train(others, opt, range(3, 5))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.02)


@every_backend
def test_a_checkpoint_in_bfloat16_is_widened(backend: str) -> None:
    params, opt = make("adam", backend)
    train(params, opt, range(3))
    others, wide = make("adam", backend, state_dtype=None)
    wide.load_state_dict(copy.deepcopy(opt.state_dict()))
    for p, q in zip(params, others, strict=True):
        assert wide.state[q]["exp_avg"].dtype == torch.float32
        assert torch.equal(wide.state[q]["exp_avg"], opt.state[p]["exp_avg"].float())


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("given", [torch.float16, torch.float32, "bfloat16", True])
def test_other_dtypes(given: Any) -> None:
    with pytest.raises(ValueError, match=r"state_dtype=.*: expected torch\.bfloat16 or None"):
        RST(parameters(), momentum=0.9, state_dtype=given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64, torch.complex128], ids=str)
def test_parameters_that_it_does_not_serve(dtype: torch.dtype) -> None:
    expected = rf"params\[0\] is {dtype}, whose state is not kept in state_dtype=torch\.bfloat16: expected float32 or"
    with pytest.raises(ValueError, match=expected):
        RST([nn.Parameter(torch.ones(3, dtype=dtype))], momentum=0.9, state_dtype=BF16)
    opt = RST(parameters(), momentum=0.9, state_dtype=BF16)
    with pytest.raises(ValueError, match=expected):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=dtype))]})
    assert len(opt.param_groups) == 1


def test_a_parameter_that_is_converted_later() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = RST([p], momentum=0.9, state_dtype=BF16, schedule=0.0)
    p.data = p.data.double()
    p.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 is torch.float64, whose state"):
        opt.step()


def test_an_optimizer_instance_keeps_its_own_state() -> None:
    with pytest.raises(ValueError, match="state_dtype=torch.bfloat16 with an optimizer as base"):
        RST(base=torch.optim.SGD(parameters(), lr=0.1), state_dtype=BF16)


def test_a_group_cannot_set_it() -> None:
    with pytest.raises(TypeError, match="state_dtype"):
        RST([{"params": parameters(), "state_dtype": BF16}], momentum=0.9)


@every_backend
def test_state_of_another_dtype(backend: str) -> None:
    params, opt = make("sgd", backend)
    train(params, opt, range(1))
    opt.state[params[0]]["momentum_buffer"] = torch.zeros(33)
    gradients(params, 1)
    with pytest.raises(RuntimeError, match="'momentum_buffer' of parameter 0 .* needs .* torch.bfloat16"):
        opt.step()


def test_sam_and_classes_of_torch() -> None:
    params = parameters()
    opt = SAM(params, torch.optim.AdamW, lr=0.01, state_dtype=BF16)
    gradients(params, 0)
    opt.perturb()
    gradients(params, 1)
    opt.step()
    assert {opt.state[p]["exp_avg"].dtype for p in params} == {BF16}
    assert {opt.state[p]["exp_avg_sq"].dtype for p in params} == {torch.float32}


@every_backend
def test_sgd_without_momentum_has_nothing_to_round(backend: str) -> None:
    results = []
    for dtype in (None, BF16):
        params = parameters()
        opt = RST(params, lr=0.1, schedule=0.0, state_dtype=dtype, backend=backend)
        train(params, opt, range(2))
        results.append(bits(params))
    assert results[0] == results[1]
