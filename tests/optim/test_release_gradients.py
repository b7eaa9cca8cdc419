"""release_gradients=True: the bits of a run without it, and gradients that are freed within the backward."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optimizer_cases import GROUPS, METHODS, split
from oracle_optimizer import BACKENDS, Problem, bits
from torch import nn
from torch.utils.checkpoint import checkpoint

from rst_fused import RST, SAM
from rst_fused._step import release

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES: list[tuple[int, ...]] = [(5,), (3, 4), (0,), (33,), (), (7, 2)]
PROBLEM = Problem(SHAPES, 12)


@pytest.fixture(autouse=True, params=[1, 100], ids=["alone", "buckets"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """So many bytes: with 1 every parameter is updated at once, with 100 some are left for step()."""
    monkeypatch.setattr(release, "BUCKET", request.param)
    yield request.param


def state_of(opt: RST, params: list[nn.Parameter]) -> list[Any]:
    return [{k: (v.dtype, bits([v])) for k, v in sorted(opt.state.get(p, {}).items())} for p in params]


def all_of(opt: RST, params: list[nn.Parameter]) -> Any:
    return bits(params), state_of(opt, params), opt.steps, opt.sam_steps, opt.last_grad_norm


def two_phases(opt: RST, params: list[nn.Parameter], t: int) -> None:
    PROBLEM.backward(params, t)
    if opt.perturb():
        with opt.second_pass():
            PROBLEM.backward(params, t)
    opt.step()


def train(opt: RST, params: list[nn.Parameter], steps: int, start: int = 0) -> None:
    for t in range(start, start + steps):
        if t % 2:
            opt.step(lambda t=t: PROBLEM.backward(params, t))
        else:
            two_phases(opt, params, t)


def pair(dtype: torch.dtype = torch.float32, **options: Any) -> Iterator[tuple[list[nn.Parameter], RST]]:
    """The same optimizer without and with the option."""
    for released in (False, True):
        params = PROBLEM.parameters(dtype)
        yield params, RST(params, release_gradients=released, **{"rho": 0.3, "schedule": 0.5, **options})


def assert_equal_runs(dtype: torch.dtype = torch.float32, **options: Any) -> None:
    (params, opt), (others, twin) = pair(dtype, **options)
    for start in range(0, 8, 2):
        for ps, o in ((params, opt), (others, twin)):
            train(o, ps, 2, start)
        assert repr(all_of(opt, params)) == repr(all_of(twin, others)), start
        assert all(p.grad is None for p in others)
        assert not twin._step_state.saved and not twin._step_state.waiting and not twin._step_state.released


# --- the same bits ----------------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("numbers", GROUPS)
def test_same_bits(numbers: str, method: str, backend: str) -> None:
    base = numbers.split("-")[0]
    results = []
    for released in (False, True):
        params = PROBLEM.parameters(torch.float32)
        opt = RST(split(params, GROUPS[numbers]), base, backend=backend, release_gradients=released, **METHODS[method])
        train(opt, params, 8)
        results.append(repr(all_of(opt, params)))
    assert results[0] == results[1]


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [
    {}, {"master_weights": True, "base": "adamw"}, {"master_weights": True, "momentum": 0.9, "gamma": 2.0},
    {"base": "lion", "stochastic_rounding": False}, {"adaptive": True, "momentum": 0.9, "dampening": 0.5},
])  # fmt: skip
def test_same_bits_in_sixteen_bits(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    assert_equal_runs(dtype, backend=backend, **options)


@every_backend
def test_same_bits_with_bfloat16_moments(backend: str) -> None:
    for options in ({"momentum": 0.9}, {"base": "adamw"}, {"base": "lion", "gamma": 2.0}):
        assert_equal_runs(backend=backend, state_dtype=torch.bfloat16, **options)


def test_updates_run_within_the_backward(bucket: int) -> None:
    params = PROBLEM.parameters(torch.float32)
    opt = SAM(params, lr=0.1, release_gradients=True)
    PROBLEM.backward(params, 0)
    opt.perturb()
    PROBLEM.backward(params, 0)
    left = [p for p in params if p.grad is not None]
    assert len(left) == 0 if bucket == 1 else 0 < len(left) < len(params)
    assert set(opt._step_state.saved) == set(left)
    opt.step()
    assert all(p.grad is None for p in params) and (opt.steps, opt.sam_steps) == (1, 1)


def test_calls_of_an_op_are_few(monkeypatch: pytest.MonkeyPatch, bucket: int) -> None:
    calls: list[int] = []
    before = release._flush
    monkeypatch.setattr(release, "_flush", lambda opt, ps: (calls.append(len(ps)), before(opt, ps)))
    monkeypatch.setattr(release, "BUCKET", 40 * bucket)
    params = [nn.Parameter(torch.ones(10)) for _ in range(100)]
    opt = RST(params, lr=0.1, schedule=0.0, release_gradients=True)
    sum(p.sum() for p in params).backward()
    assert calls == [bucket] * (100 // bucket)
    opt.step()


def test_step_counters_stay_shared() -> None:
    """One tensor for all at the same count, however many launches; parameters that were left out have their own."""
    params = PROBLEM.parameters(torch.float32)
    opt = SAM(params, base="adam", release_gradients=True)
    problem = Problem(SHAPES, 4)
    problem.missing = {(2, 3)}
    for t in range(4):
        opt.step(lambda t=t: problem.backward(params, t))
        counters = {id(opt.state[p]["step"]): float(opt.state[p]["step"]) for p in params}
        assert sorted(counters.values()) == ([t + 1] if t < 2 else [t, t + 1])
    assert float(opt.state[params[3]]["step"]) == 3


# --- memory -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("released", [False, True])
def test_peak_of_a_sam_step_is_that_of_a_base_step_and_a_bucket(released: bool, bucket: int) -> None:
    """Gradients and kept weights that are alive, whenever a gradient is complete."""
    params = [nn.Parameter(torch.ones(16 + i % 3)) for i in range(20)]
    opt = RST(params, lr=0.1, schedule=lambda t: t % 2, release_gradients=released)
    size = sum(p.nbytes for p in params)
    kept: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def look(_: Any) -> None:
        live = [t for t in (ref() for ref in kept) if t is not None]
        alive.append(sum(p.grad.nbytes for p in params if p.grad is not None) + sum(t.nbytes for t in live))

    for p in params:
        p.register_post_accumulate_grad_hook(look)
    for sam in (False, True, False, True):
        alive.clear()
        sum((p**2).sum() for p in params).backward()
        assert opt.perturb() == sam
        if sam:
            assert max(alive) == size
            alive.clear()
            kept[:] = [weakref.ref(w) for w in opt._step_state.saved_now().values()]
            assert len(kept) == len(params)
            sum((p**2).sum() for p in params).backward()
        opt.step()
        opt.zero_grad()
        largest = max(p.nbytes for p in params)
        if not released:
            assert max(alive) == (2 if sam else 1) * size
        else:
            assert max(alive) <= (size if sam else 0) + bucket + largest
            if sam:
                assert min(alive) <= bucket + largest  # the last one finds nothing else


def test_first_gradients_of_grst_are_freed_too() -> None:
    params = PROBLEM.parameters(torch.float32)
    opt = RST(params, schedule=1.0, gamma=2.0, release_gradients=True)
    PROBLEM.backward(params, 0)
    opt.perturb()
    opt._step_state.take_first_grads()
    kept = [weakref.ref(g) for g in opt._step_state.first_grads.values()]
    PROBLEM.backward(params, 0)
    gc.collect()
    waiting = len(opt._step_state.waiting)
    assert sum(ref() is not None for ref in kept) == waiting < len(params)
    opt.step()


# --- parameters -------------------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.parametrize("missing", [{(1, 0)}, {(1, 1), (1, 3)}, {(0, 3), (2, 4)}])
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_parameters_without_gradient(gamma: float, missing: set[tuple[int, int]], backend: str) -> None:
    """In neither pass, or in one of them."""
    results = []
    for released in (False, True):
        params = PROBLEM.parameters(torch.float32)
        opt = SAM(params, base="adamw", backend=backend, release_gradients=released)
        opt.gamma = gamma
        problem = copy.deepcopy(PROBLEM)
        for t in range(3):
            problem.missing = {(t, 3)} if t == 1 else missing
            problem.backward(params, t)
            opt.perturb()
            problem.missing = missing
            problem.backward(params, t)
            opt.step()
        results.append(repr(all_of(opt, params)))
    assert results[0] == results[1]


def test_frozen_parameters_and_groups_that_are_added() -> None:
    results = []
    for released in (False, True):
        params = PROBLEM.parameters(torch.float32)
        params[1].requires_grad_(False)
        opt = RST(params[:3], momentum=0.9, rho=0.3, release_gradients=released)
        opt.add_param_group({"params": params[3:], "lr": 0.1})
        for t in range(6):
            if t == 3:
                params[1].requires_grad_(True)  # in step 3 its gradient waits for step(), later it is released
            moving = [p for p in params if p.requires_grad]
            opt.step(lambda moving=moving: sum((p**3 - p).sum() for p in moving).backward())
            if released and t == 4:
                assert opt._releases.handles.keys() == set(params)
            opt.zero_grad()
        results.append(bits(params))
    assert results[0] == results[1]


class Tied(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.c.weight = self.a.weight
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None:
            return self.c(self.b(self.a(x).tanh()).tanh())
        x = checkpoint(lambda x: self.a(x).tanh(), x, use_reentrant=self.reentrant)
        return self.c(checkpoint(lambda x: self.b(x).tanh(), x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("how", ["plain", "checkpoint", "compiled"])
def test_shared_parameters_and_models(how: str) -> None:
    results = []
    for released in (False, True):
        model: Any = Tied(False if how == "checkpoint" else None)
        opt = RST(model.parameters(), base="adam", lr=0.01, release_gradients=released)
        run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
        generator = torch.Generator().manual_seed(1)
        for _ in range(6):
            x = torch.randn(4, 6, generator=generator)
            opt.zero_grad()
            run(x).square().mean().backward()
            if opt.perturb():
                run(x).square().mean().backward()
            opt.step()
        results.append(bits(list(model.parameters())))
    assert results[0] == results[1]


def test_reentrant_checkpoints(bucket: int) -> None:
    """Segments with parameters of their own train; a parameter of two segments has two gradients, and is refused."""
    results = []
    for released in (False, True):
        model = Tied(True)
        model.c.weight = nn.Parameter(torch.ones(6, 6))
        opt = SAM(model.parameters(), momentum=0.9, release_gradients=released)
        for t in range(3):
            x = torch.full((2, 6), 0.1 * t, requires_grad=True)
            opt.step(lambda x=x, model=model: model(x).square().mean().backward())
            opt.zero_grad()
        results.append(bits(list(model.parameters())))
    assert results[0] == results[1]
    model = Tied(True)
    opt = SAM(model.parameters(), release_gradients=True)
    model(x).sum().backward()
    opt.perturb()
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 has another gradient.*use_reentrant=False"):
        model(x).sum().backward()
    opt.restore()


# --- life of an optimizer ---------------------------------------------------------------------------------------------
def hooks_of(params: list[nn.Parameter]) -> list[int]:
    return [len(p._post_accumulate_grad_hooks or ()) for p in params]


def test_hooks_go_with_the_optimizer() -> None:
    params = PROBLEM.parameters(torch.float32)
    opt = RST(params, release_gradients=True)
    train(opt, params, 2)
    assert hooks_of(params) == [1] * len(params)
    gone = weakref.ref(opt)
    gc.disable()
    try:
        del opt
        assert gone() is None and hooks_of(params) == [0] * len(params)
    finally:
        gc.enable()
    PROBLEM.backward(params, 0)
    assert all(p.grad is not None for p in params)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_go_on(how: str) -> None:
    (params, opt), (others, twin) = pair(base="adamw", schedule=0.7)
    for ps, o in ((params, opt), (others, twin)):
        train(o, ps, 3)
    if how == "state_dict":
        fresh = PROBLEM.parameters(torch.float32)
        with torch.no_grad():
            for p, q in zip(fresh, others, strict=True):
                p.copy_(q)
        loaded = RST(fresh, base="adamw", rho=0.3, schedule=0.7, release_gradients=True)
        loaded.load_state_dict(twin.state_dict())
    elif how == "deepcopy":
        fresh, loaded = copy.deepcopy((others, twin))
    else:
        fresh, loaded = pickle.loads(pickle.dumps((others, twin)))
    assert loaded.release_gradients and hooks_of(fresh) == hooks_of(others) == [1] * len(params)
    before = bits(others)
    for ps, o in ((params, opt), (fresh, loaded)):
        train(o, ps, 4, 3)
    assert repr(all_of(opt, params)[:4]) == repr(all_of(loaded, fresh)[:4])
    assert bits(others) == before


def test_micro_batches() -> None:
    results = []
    for released in (False, True):
        params = PROBLEM.parameters(torch.float32)
        opt = RST(params, base="adam", release_gradients=released)

        def micro_batches(opt: RST = opt, params: list[nn.Parameter] = params, t: int = 0) -> None:
            with opt.accumulate_gradients():
                sum(((p - t) ** 2).sum() for p in params[1:]).backward()
                sum((p**3).sum() for p in params).backward()
            sum(p.cos().sum() for p in params[2:]).backward()

        for t in range(6):
            opt.zero_grad()
            micro_batches(t=t)
            if opt.perturb():
                micro_batches(t=t)
            opt.step()
        results.append(repr(all_of(opt, params)))
    assert results[0] == results[1]


def test_a_silent_loop_is_still_warned() -> None:
    """The draw of a backward is nobody's question: step() says that nobody asked."""
    for schedule in (1.0, 0.5):
        params = PROBLEM.parameters(torch.float32)
        opt = RST(params, schedule=schedule, release_gradients=True)
        with pytest.warns(RuntimeWarning, match="without a closure and without perturb"):
            for t in range(4):
                PROBLEM.backward(params, t)
                opt.step()
        assert (opt.steps, opt.sam_steps) == (4, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = PROBLEM.parameters(torch.float32)
        train(RST(params, schedule=0.5, release_gradients=True), params, 8)


def test_the_callers_own_decision() -> None:
    """perturb(fire=...) against the draw: False always works; True needs a first pass that keeps its gradients."""
    (params, opt), (others, twin) = pair(schedule=lambda t: t % 2)
    for t in range(4):
        for ps, o in ((params, opt), (others, twin)):
            with o.accumulate_gradients():
                PROBLEM.backward(ps, t)
            if o.perturb(fire=t % 2 == 0):
                PROBLEM.backward(ps, t)
            o.step()
    assert repr(all_of(opt, params)) == repr(all_of(twin, others))


def test_sam_takes_the_option() -> None:
    params = PROBLEM.parameters(torch.float32)
    opt = SAM(params, torch.optim.AdamW, lr=0.1, release_gradients=True)
    assert opt.release_gradients and opt.rule is not None
    PROBLEM.backward(params, 0)
    opt.first_step(zero_grad=True)
    PROBLEM.backward(params, 0)
    opt.second_step(zero_grad=True)
    assert opt.sam_steps == 1
