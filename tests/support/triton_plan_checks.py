"""Launch plans of the Triton backend: the same bits as its ops, whatever changes.

Collected by test_triton_plan only, in processes where a plugin runs the kernels on CPU tensors.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from oracle_optimizer import bits
from paths import has_plan, no_plans, observed
from torch import Tensor, nn
from triton_processes import PURE_PYTHON

from rst_fused import RST, _backends
from rst_fused.kernels import launch_groups, plan

if os.environ.get(PURE_PYTHON) == "1":
    _backends._matcher = lambda **facts: None

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = ((5,), (4, 4), (0,), (3, 700), ())
BASES: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "lr": 0.05},
    "plain-mixed": {"lr": 0.05, "gamma": 2.0},
    "nesterov-asam": {"momentum": 0.9, "nesterov": True, "adaptive": True, "eta": 0.01},
    "adamw": {"base": "adamw"},
    "amsgrad-mixed": {"base": "adam", "amsgrad": True, "gamma": 0.5},
    "lion": {"base": "lion", "maximize": True},
    "masters-mixed": {"base": "adamw", "master_weights": True, "gamma": 2.0, "dtype": torch.bfloat16},
    "remainders-asam": {
        "base": "adamw", "adaptive": True, "master_weights": "remainder", "state_dtype": torch.bfloat16,
        "dtype": torch.bfloat16,
    },
    "bfloat16": {"momentum": 0.9, "dtype": torch.bfloat16},
}


class Run:
    """An optimizer with its parameters, and the gradients of its steps: held by the run, so that weights go to backups,
    or ``own`` ones, where weights take the place of a gradient."""

    def __init__(self, base: str = "sgd", groups: bool = False, own: bool = False, **more: Any) -> None:
        self.own = own
        options = {"rho": 0.5, "schedule": 0.0, **BASES[base], **more}
        dtype = options.pop("dtype", torch.float32)
        generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
        given: Any = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(self.params)]
        self.opt = RST(given if groups else self.params, backend="triton", **options)
        self.planned: list[bool] = []
        self.memory: dict[Any, Tensor] = {}

    def gradients(self, seed: int) -> None:
        """At the same addresses in every step, as an allocator often gives them: a plan has tables for these."""
        generator = torch.Generator().manual_seed(seed)
        for i, p in enumerate(self.params):
            memory = self.memory.setdefault((seed % 2, i, p.shape, p.dtype), torch.empty(p.shape, dtype=p.dtype))
            values = torch.randn(p.shape, generator=generator)
            p.grad = values.to(p.dtype) if self.own else memory.copy_(values)

    def step(self, t: int, sam: bool = True, between: Callable[[Run], Any] = lambda run: None) -> None:
        self.gradients(2 * t)
        if self.opt.perturb(sam):
            between(self)
            self.gradients(2 * t + 1)
        self.opt.step()
        self.planned.append(has_plan(self.opt))


def both(make: Callable[[], Run], play: Callable[[Run], Any]) -> Run:
    """Plays the same with plans and without; all that a user can see is the same. Returns the run with plans."""
    with_plans, without = make(), make()
    play(with_plans)
    with no_plans():
        play(without)
    assert observed(with_plans.params, with_plans.opt) == observed(without.params, without.opt)
    assert not any(without.planned)
    return with_plans


# --- the same bits --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("groups", [False, True], ids=["one group", "groups"])
@pytest.mark.parametrize("base", BASES)
def test_same_bits_as_the_ops(base: str, groups: bool) -> None:
    def play(run: Run) -> None:
        for t, sam in enumerate((True, False, True, True)):
            run.step(t, sam)

    run = both(lambda: Run(base, groups), play)
    assert all(run.planned)


@pytest.mark.parametrize("plans", [True, False], ids=["plan", "ops"])
@pytest.mark.parametrize("base", [name for name in BASES if "mixed" not in name])
def test_weights_in_gradients_have_the_bits_of_those_in_backups(base: str, plans: bool) -> None:
    runs = Run(base, own=True), Run(base)
    with nullcontext() if plans else no_plans():
        for run in runs:
            for t, sam in enumerate((True, False, True, True)):
                run.step(t, sam)
                assert not run.opt._step_state.saved
            assert all(run.planned) == plans
    own, held = (observed(run.params, run.opt) for run in runs)
    assert own == held
    assert [len(run.opt._step_state.backups) for run in runs] == [0, len(SHAPES)]


def test_some_gradients_are_held() -> None:
    """Those keep their bits, and their parameters have backups; in another step others are held."""
    run, twin = Run(own=True), Run()
    for t in range(4):
        run.gradients(2 * t)
        held = {i: run.params[i].grad.clone() for i in (t % 2, 3)}  # type: ignore[union-attr]
        kept = {i: run.params[i].grad for i in held}
        run.opt.perturb(True)
        run.gradients(2 * t + 1)
        run.opt.step()
        assert all(torch.equal(kept[i], held[i]) for i in held)  # type: ignore[arg-type]
        assert {i for i, p in enumerate(run.params) if p in run.opt._step_state.backups} >= set(held)
        twin.step(t)
        assert bits(run.params) == bits(twin.params)
    assert run.params[4] not in run.opt._step_state.backups


@pytest.mark.parametrize("own", [False, True], ids=["held gradients", "own gradients"])
@pytest.mark.parametrize("base", ["sgd", "masters-mixed"])
def test_a_perturbation_that_is_abandoned(base: str, own: bool) -> None:
    def play(run: Run) -> None:
        run.step(0)
        before = bits(run.params)
        run.gradients(2)
        assert run.opt.perturb(True) and bits(run.params) != before
        run.opt.restore()
        assert bits(run.params) == before
        run.step(2)

    assert all(both(lambda: Run(base, own=own), play).planned)


@pytest.mark.parametrize(("scale", "overflow"), [(8.0, 0.0), (8.0, 1.0)])
def test_the_scale_of_amp(scale: float, overflow: float) -> None:
    def play(run: Run) -> None:
        run.step(0)
        run.gradients(2)
        run.opt.perturb(True)
        run.gradients(3)
        run.opt.grad_scale, run.opt.found_inf = torch.tensor([scale]), torch.tensor([overflow])  # type: ignore[attr-defined]
        run.opt.step()
        del run.opt.grad_scale, run.opt.found_inf  # type: ignore[attr-defined]
        run.step(2)

    assert all(both(Run, play).planned)


def test_the_scale_of_amp_on_the_device() -> None:
    """What a GPU has of a scaler goes to the kernel as it is."""
    results = []
    for scale in (1.0, 1024.0):  # a power of two changes no bit
        run = Run()
        run.step(0)
        run.gradients(2)
        for p in run.params:
            p.grad.mul_(scale)  # type: ignore[union-attr]
        rows = [0.05, 0.9, 0.0, 0.0, 1.0]
        numbers = torch.tensor([scale]), torch.tensor([0.0])
        assert run.opt._plans._plan.update(rows, False, False, 1.0, *numbers, 3, 1, run.opt._step_state.after_step())
        results.append(bits(run.params))
    assert results[0] == results[1]


# --- what changes ---------------------------------------------------------------------------------------------------
def _transpose(run: Run) -> None:
    run.params[1].data = run.params[1].data.t()


def _swap(run: Run) -> None:
    for p in run.params:
        p.grad = None
    torch.utils.swap_tensors(run.params[0], nn.Parameter(torch.full((5,), 3.0)))


def _add_group(run: Run) -> None:
    run.params.append(nn.Parameter(torch.ones(6)))
    run.opt.add_param_group({"params": [run.params[-1]]})


def _state(run: Run, change: Callable[[dict[str, Any]], Any]) -> None:
    change(run.opt.state[run.params[1]])


def _group(name: str, value: Any) -> Callable[[Run], None]:
    return lambda run: run.opt.param_groups[0].__setitem__(name, value)


CHANGES: dict[str, Callable[[Run], Any]] = {
    "data elsewhere": lambda run: setattr(run.params[0], "data", torch.full((5,), 2.0)),
    "data transposed in place": _transpose,
    "swapped": _swap,
    "state elsewhere": lambda run: _state(run, lambda s: s.update({k: v.clone() for k, v in s.items()})),
    "state moved in place": lambda run: _state(run, lambda s: s["momentum_buffer"].set_(torch.ones(4, 4))),
    "state transposed in place": lambda run: _state(run, lambda s: s["momentum_buffer"].t_()),
    "state gone": lambda run: run.opt.state.clear(),
    "state of one gone": lambda run: run.opt.state.pop(run.params[1]),
    "state loaded": lambda run: run.opt.load_state_dict(copy.deepcopy(run.opt.state_dict())),
    "state of one in another dict": lambda run: run.opt.state.update({run.params[1]: {}}),
    "a group more": _add_group,
    "frozen": lambda run: run.params[1].requires_grad_(False),
    "another lr": _group("lr", 0.3),
    "a tensor as lr": _group("lr", torch.tensor(0.3)),
    "another rho": _group("rho", 0.01),
    "no momentum": _group("momentum", 0.0),
    "nesterov": _group("nesterov", True),
    "maximize": _group("maximize", True),
    "dampening": _group("dampening", 0.5),
    "adaptive": lambda run: setattr(run.opt, "adaptive", True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_is_noticed(change: str) -> None:
    def play(run: Run) -> None:
        run.step(0)
        run.step(1)
        CHANGES[change](run)
        for t in (2, 3):
            run.step(t)

    run = both(Run, play)
    assert all(run.planned[:2])


@pytest.mark.parametrize(
    "change",
    ["data elsewhere", "state elsewhere", "state moved in place", "state transposed in place", "state gone",
     "state of one gone", "another lr", "another rho", "nesterov", "frozen"],
)  # fmt: skip
@pytest.mark.parametrize("own", [False, True], ids=["held gradients", "own gradients"])
def test_a_change_between_the_passes_is_noticed(own: bool, change: str) -> None:
    def play(run: Run) -> None:
        run.step(0)
        run.step(1, between=CHANGES[change])
        run.step(2)

    both(lambda: Run(own=own), play)


def test_parameters_that_change_their_groups_in_place() -> None:
    """Each has a learning rate of its own."""

    def play(run: Run) -> None:
        run.step(0)
        run.step(1)
        one, other = (group["params"] for group in run.opt.param_groups[:2])
        one[0], other[0] = other[0], one[0]
        run.step(2)

    both(lambda: Run(groups=True), play)


def test_the_tensor_in_a_hyperparameter_changes_in_place() -> None:
    def play(run: Run) -> None:
        lr = run.opt.param_groups[0]["lr"] = torch.tensor(0.1)
        for t in range(3):
            run.step(t)
            lr.mul_(0.5)

    both(Run, play)


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "of other strides": lambda g: g.t().contiguous().t(),
    "with gaps": lambda g: torch.stack([g, g], -1)[..., 0],
    "expanded": lambda g: g[:1].expand(4, 4),
    "negated": torch._neg_view,
    "elsewhere": torch.clone,
    "misaligned": lambda g: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(4, 4),
}


@pytest.mark.parametrize("base", ["sgd", "plain-mixed"])
@pytest.mark.parametrize("change", GRADIENTS)
def test_gradients_that_change(change: str, base: str) -> None:
    class Changing(Run):
        def gradients(self, seed: int) -> None:
            super().gradients(seed)
            if seed in (3, 4, 9):
                self.params[1].grad = GRADIENTS[change](self.params[1].grad)  # type: ignore[arg-type]
            if seed in (10, 11):
                self.params[0].grad = None

    def play(run: Run) -> None:
        for t in range(7):
            run.step(t)

    run = both(lambda: Changing(base), play)
    assert run.planned[0] and run.planned[-1]


def test_gradients_that_come_to_the_same_addresses_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are made for those of both passes, and for no more as long as they take turns."""
    run, made, counts = Run(), [], []
    table_of, grads = plan.table_of, [[torch.randn(p.shape) for p in run.params] for _ in range(2)]
    monkeypatch.setattr(plan, "table_of", lambda *args: made.append(args) or table_of(*args))
    for _ in range(4):
        for given, call in zip(grads, (lambda: run.opt.perturb(True), run.opt.step), strict=True):
            for p, g in zip(run.params, given, strict=True):
                p.grad = g
            call()
        counts.append(len(made))
    assert 0 < counts[1] == counts[3], "at the second step a plan meets these gradients in both passes"


def test_a_second_gradient_over_the_first_one_is_refused() -> None:
    run = Run("plain-mixed")
    run.step(0)
    before = bits(run.params)
    run.gradients(2)
    first = run.params[1].grad
    run.opt.perturb(True)
    run.gradients(3)
    run.params[1].grad = first
    with pytest.raises(RuntimeError, match="second gradient of parameter 1 of group 0 was written over the first one"):
        run.opt.step()
    assert bits(run.params) == before


# --- what runs ------------------------------------------------------------------------------------------------------
def test_a_sam_step_is_three_launches_and_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for plans in (True, False):
        run = Run()
        with nullcontext() if plans else no_plans():
            run.step(0)
            started: list[str] = []
            starter = launch_groups.starter

            def noted(function: Any, *args: Any, starter: Any = starter, started: Any = started) -> Any:
                start = starter(function, *args)
                return lambda *given: started.append(function.__name__) or start(*given)

            with monkeypatch.context() as patch:
                patch.setattr(launch_groups, "starter", noted)
                run.opt._plans.drop()  # it has its kernels
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                    run.step(1)
            names = [event.key for event in profile.key_averages()]
        assert started == ["grad_norm_kernel", "perturb_kernel", "update_kernel"]
        assert "aten::_foreach_copy_" not in names


def test_parameters_are_seen_to_change() -> None:
    """By autograd, which refuses a backward through what was saved before."""
    run = Run()
    for t in range(2):
        versions = [p._version for p in run.params]
        run.gradients(0)
        run.opt.perturb(True)
        between = [p._version for p in run.params]
        run.gradients(1)
        run.opt.step()
        after = [p._version for p in run.params]
        assert all(a < b < c for a, b, c in zip(versions, between, after, strict=True)), t
