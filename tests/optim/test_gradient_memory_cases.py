"""Which parameters get a backup, and that nothing else is kept: for every kind of gradient, parameter and call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from held_gradients import value_for
from oracle_optimizer import bits
from paths import every_executor, has_plan, needs_plans, no_plans, observed
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

from rst_fused import RST
from rst_fused._step import norm

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[[Tensor], Tensor]
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = F32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def give(params: list[nn.Parameter], t: int, which: int = 0, make: Make = lambda g: g) -> None:
    for i, p in enumerate(params):
        p.grad = make(value_for(p, t, which, i))


def backed(params: list[nn.Parameter], opt: RST) -> list[int]:
    return [i for i, p in enumerate(params) if p in opt._step_state.backups]


# --- what is kept ---------------------------------------------------------------------------------------------------
@every_executor
@pytest.mark.parametrize("base", ["sgd", "adamw", "lion"])
@pytest.mark.parametrize("ends", ["step", "restore"])
def test_the_memory_of_first_gradients_is_freed(ends: str, base: str, served_by: str) -> None:
    params = parameters((5,), (3, 4), (0,), ())
    opt = RST(params, base, lr=0.05, schedule=1.0, backend=served_by)
    for t in range(4):
        give(params, t)
        opt.perturb()
        kept = [StorageWeakRef(w.untyped_storage()) for w in opt._step_state.saved_now().values()]
        assert len(kept) == len(params) and not any(ref.expired() for ref in kept)
        give(params, t, 1)
        opt.step() if ends == "step" else opt.restore()
        assert all(ref.expired() for ref in kept)
        assert not opt._step_state.backups and not opt._step_state.saved and not opt._step_state.first_grads


@every_executor
def test_a_sam_step_allocates_nothing_that_stays(served_by: str) -> None:
    """Counted by the allocator. A backup would take the bytes of all parameters, at the first step already."""
    n = 1 << 16
    params = parameters((n,), (n,))
    opt = RST(params, lr=0.05, momentum=0.9, schedule=1.0, backend=served_by)
    for t in range(3):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as counted:
            give(params, t)
            opt.perturb()
            give(params, t, 1)
            opt.step()
            opt.zero_grad()
        events = counted.profiler.kineto_results.events()  # type: ignore[union-attr]
        stays = sum(event.nbytes() for event in events if event.name() == "[memory]")
        assert abs(stays - (2 * 4 * n if t == 0 else 0)) < 1024  # the momentum


@every_executor
def test_backups_are_freed_once_gradients_serve(served_by: str) -> None:
    """When the next perturbation looks at the gradients anew: as other parameters have one."""
    params = parameters((5,), (3, 4))
    opt = RST(params, lr=0.05, schedule=1.0, backend=served_by)
    for t in range(6):
        give(params, t)
        if t == 3:
            params[0].grad = None
        held = [params[1].grad] if t < 2 else []
        opt.perturb()
        assert backed(params, opt) == ([1] if t < 2 else backed(params, opt) if t == 2 else [])
        held.clear()
        give(params, t, 1)
        opt.step()


# --- gamma ----------------------------------------------------------------------------------------------------------
@every_executor
@pytest.mark.parametrize("gamma", [2.0, lambda t: 1.0 + (t % 2), lambda t: 1.0, "match"])
def test_first_gradients_that_may_be_mixed_keep_no_weights(gamma: Any, served_by: str) -> None:
    params = parameters((5,), (3, 4))
    opt = RST(params, lr=0.05, schedule=1.0, gamma=gamma, backend=served_by)
    for t in range(3):
        give(params, t)
        opt.perturb()
        give(params, t, 1)
        opt.step()
        assert backed(params, opt) == [0, 1]


@every_executor
@pytest.mark.parametrize("when", ["between steps", "between the passes"])
def test_gamma_that_changes_in_the_middle_of_a_run(when: str, served_by: str) -> None:
    """The bits of a run in which all gradients are held."""
    seen = []
    for holds in (False, True):
        params = parameters((5,), (3, 4))
        opt = RST(params, lr=0.05, momentum=0.9, schedule=1.0, backend=served_by)
        for t in range(12):
            gamma = 1.0 if t // 3 % 2 == 0 else 2.0
            if when == "between steps":
                opt.gamma = gamma
            give(params, t)
            held = [p.grad for p in params if holds]
            opt.perturb()
            held.clear()
            if when != "between steps":
                opt.gamma = gamma
            give(params, t, 1)
            opt.step()
        seen.append(observed(params, opt))
    assert seen[0] == seen[1]


# --- gradients and parameters of every kind -------------------------------------------------------------------------
def in_inference_mode(g: Tensor) -> Tensor:
    with torch.inference_mode():
        return g.clone()


def noncontiguous(g: Tensor) -> Tensor:
    return torch.stack([g, g], -1)[..., 0]


def of_strides(*strides: int) -> Make:
    return lambda g: torch.empty(0).set_(g.untyped_storage(), 0, g.shape, strides)


def a_part_of_more(g: Tensor) -> Tensor:
    whole = torch.cat([g, g])
    return torch.empty(0).set_(whole.untyped_storage(), 5, g.shape, g.stride())


KINDS: dict[str, tuple[tuple[int, ...], Make, bool]] = {
    # shape, how the gradient is made of the values, whether it serves
    "dense": ((3, 4), lambda g: g, True), "transposed": ((4, 4), lambda g: g.t().contiguous().t(), False),
    "expanded": ((3, 4), lambda g: g[:, :1].expand(3, 4), False), "with gaps": ((3, 4), noncontiguous, False),
    "empty": ((0, 3), lambda g: g, True), "scalar": ((), lambda g: g, True),
    "strides of one element": ((1, 4), of_strides(7, 1), True),
    "a part of a storage": ((5,), a_part_of_more, True),
    "inference": ((3, 4), in_inference_mode, False), "channels last": ((2, 3, 2, 2),
     lambda g: g.contiguous(memory_format=torch.channels_last), False),
}  # fmt: skip


@every_executor
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_gradient(kind: str, served_by: str) -> None:
    """Beside one that serves always."""
    shape, made, serves = KINDS[kind]
    seen = []
    for holds in (False, True):
        params = parameters(shape, (3,))
        opt = RST(params, lr=0.05, momentum=0.9, schedule=1.0, backend=served_by)
        for t in range(4):
            before = bits(params)
            for which, phase in enumerate((opt.perturb, opt.step)):
                give(params[:1], t, which, made)
                give(params[1:], t, which)
                held = [p.grad for p in params if holds]
                phase()
                held.clear()
            assert bits(params)[1:] != before[1:]
        assert backed(params, opt) == ([0, 1] if holds else [] if serves else [0])
        seen.append(observed(params, opt))
    assert seen[0] == seen[1]


@every_executor
@pytest.mark.parametrize("holds", ["nothing", "the buffer", "a view", "a weak reference"])
def test_gradients_cut_from_one_buffer(holds: str, executor: str, served_by: str) -> None:
    """Which they alone refer to, or not. A plan in C++ does not look for a buffer that is a tensor of its own."""
    params = parameters((5,), (3, 4))
    opt = RST(params, lr=0.05, schedule=1.0, backend=served_by)
    for t in range(3):
        flat = torch.cat([value_for(p, t, 0, i).flatten() for i, p in enumerate(params)])
        before = flat.clone()
        params[0].grad, params[1].grad = flat[:5], flat[5:].view(3, 4)
        held: Any = {"the buffer": flat, "a view": flat[3:7], "a weak reference": weakref.ref(flat)}.get(holds)
        del flat
        opt.perturb()
        assert backed(params, opt) == ([] if holds == "nothing" and executor != "cpu plan" else [0, 1])
        if isinstance(held, Tensor):
            assert torch.equal(held, before if holds == "the buffer" else before[3:7])
        give(params, t, 1)
        opt.step()


PARAMS: dict[str, tuple[Callable[[], list[nn.Parameter]], dict[str, Any], list[int]]] = {
    # the parameters, options, and which of them need a backup
    "channels last": (lambda: [nn.Parameter(torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last))], {}, []),
    "with gaps": (lambda: [nn.Parameter(torch.ones(4, 2)[:, 0]), *parameters((3,))], {}, [0]),
    "complex": (lambda: parameters((3,), (2, 2), dtype=torch.complex64), {}, []),
    "mixed dtypes": (lambda: [*parameters((3,)), *parameters((3,), dtype=torch.float64), *parameters((3,), dtype=BF16)],
                     {}, []),
    "masters": (lambda: [*parameters((3,)), *parameters((3,), dtype=BF16)], {"master_weights": True}, []),
    "masters alone": (lambda: parameters((3,), (4,), dtype=BF16), {"master_weights": True, "base": "adamw"}, []),
}  # fmt: skip


@every_executor
@pytest.mark.parametrize("kind", PARAMS)
def test_every_kind_of_parameter(kind: str, served_by: str) -> None:
    make, options, expected = PARAMS[kind]
    seen = []
    for holds in (False, True):
        params = make()
        opt = RST(params, **{"lr": 0.05, "schedule": 1.0, "backend": served_by, **options})
        for t in range(4):
            for which, phase in enumerate((opt.perturb, opt.step)):
                give(params, t, which, lambda g: g.clone(memory_format=torch.preserve_format))
                held = [p.grad for p in params if holds]
                phase()
                held.clear()
            if not holds:
                assert backed(params, opt) == expected
        seen.append(observed(params, opt))
    assert seen[0] == seen[1]


@every_executor
def test_groups_and_parameters_without_gradients(served_by: str) -> None:
    """Other ones at every step, and some of which only one pass has."""
    seen = []
    for holds in (False, True):
        params = parameters((5,), (3, 4), (2,), (6,))
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "rho": 0.3}]
        opt = RST(groups, lr=0.05, base="adam", schedule=1.0, backend=served_by)
        for t in range(12):
            for which, phase in enumerate((opt.perturb, opt.step)):
                give(params, t, which)
                if t % 3:
                    params[t % 4].grad = None
                if t % 3 == 2 and which:
                    params[(t + 1) % 4].grad = None
                held = [p.grad for p in params if holds]
                phase()
                held.clear()
            assert holds or not opt._step_state.backups
        seen.append(observed(params, opt))
    assert seen[0] == seen[1]


@every_executor
def test_zeroed_and_accumulated_gradients(served_by: str) -> None:
    """zero_grad(set_to_none=False) leaves the second gradient where the next first one is accumulated."""
    seen = []
    for holds in (False, True):
        params = parameters((5,), (3, 4))
        opt = RST(params, lr=0.05, momentum=0.9, schedule=1.0, backend=served_by)
        for t in range(5):
            for which, phase in enumerate((opt.perturb, opt.step)):
                opt.zero_grad(set_to_none=False)
                for micro in range(2):
                    loss = sum((p * value_for(p, t, 2 * which + micro, i)).sum() for i, p in enumerate(params))
                    loss.backward()
                held = [p.grad for p in params if holds]
                phase()
                held.clear()
        assert backed(params, opt) == ([0, 1] if holds else [])
        seen.append(observed(params, opt))
    assert seen[0] == seen[1]


# --- torch.compile, and what failed before --------------------------------------------------------------------------
@needs_plans
@pytest.mark.parametrize("compiled", ["perturb", "step", "both"])
def test_compiled_calls(compiled: str) -> None:
    """A graph perturbs with backups; the bits are those of eager calls."""
    seen = []
    for how in ("neither", compiled):
        params = parameters((5,), (3, 4))
        opt = RST(params, lr=0.05, momentum=0.9, schedule=1.0, backend="cpu")
        perturb: Any = opt.perturb if how in ("neither", "step") else torch.compile(opt.perturb, backend="eager")
        step: Any = opt.step if how in ("neither", "perturb") else torch.compile(opt.step, backend="eager")
        for t in range(4):
            give(params, t)
            held = [(p.grad, bits([p.grad])) for p in params if p.grad is not None]
            if how in ("neither", "step"):
                held.clear()
            perturb(opt.draw())
            assert all(bits([g]) == before for g, before in held)
            assert len(opt._step_state.backups) == (0 if how in ("neither", "step") else 2)
            give(params, t, 1)
            step()
        opt.draw()
        seen.append(observed(params, opt))
    assert seen[0] == seen[1]


@needs_plans
def test_a_perturbation_that_failed_decides_nothing_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had found that the gradient serves; that of the next call, which is compiled, is held."""
    (p,) = params = parameters((5,))
    opt = RST(params, lr=0.05, schedule=1.0, backend="cpu")
    give(params, 0)

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, no_plans(), pytest.raises(KeyboardInterrupt):
        patch.setattr(norm, "grad_norm", fails)
        opt.perturb()
    opt.restore()
    give(params, 1)
    held = p.grad
    assert held is not None
    before = bits([held])
    torch.compile(opt.perturb, backend="eager")(opt.draw())
    assert bits([held]) == before and backed(params, opt) == [0]


@needs_plans
def test_a_graph_that_is_captured_keeps_weights_in_backups(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters((5,), (3, 4))
    opt = RST(params, lr=0.05, schedule=1.0, backend="cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    opt._on_gpu = True
    give(params, 0)
    opt.perturb()
    assert backed(params, opt) == [0, 1] and not has_plan(opt)


@needs_plans
def test_a_plan_goes_on_while_gradients_serve() -> None:
    """One plan, whose gradients are others at every step; no gradient is held by it after a step."""
    params = parameters((5,), (3, 4))
    opt = RST(params, lr=0.05, momentum=0.9, schedule=0.5, seed=3, backend="cpu")
    plans = set()
    for t in range(30):
        give(params, t)
        if opt.perturb():
            assert all(p.grad is None for p in params)
            give(params, t, 1)
        opt.step()
        plans.add(id(opt._plans._plan))
        assert [p.grad._use_count() for p in params if p.grad is not None] == [2, 2]
    assert len(plans) <= 3 and 0 < opt.sam_steps < 30
