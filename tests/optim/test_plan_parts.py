"""Launch plans of sharded training: norms of parts, perturbations whose norm is known, and the random bits of shards.

Plans are made and called directly, of all kinds of kernels: those of Triton where test_triton_plan runs this file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import gpu_simulator
import op_db
import oracle
import pytest
import torch
from torch import Tensor
from triton_processes import PURE_PYTHON

from rst_fused import _backends, ops
from rst_fused._step.state import StepState
from rst_fused.reference import join, split

if os.environ.get(PURE_PYTHON) == "1":
    _backends._matcher = lambda **facts: None

AVAILABLE = {backend.values[0] for backend in op_db.BACKENDS}
BACKEND = {"cpu": "cpu", "gpu": "simulated", "triton": "triton"}  # of a kind of plan: whose kernels it runs
KINDS = [
    pytest.param("cpu", marks=pytest.mark.skipif("cpu" not in AVAILABLE, reason="the C++ extension is not built")),
    pytest.param("gpu", marks=gpu_simulator.needed),
    pytest.param("triton", marks=pytest.mark.skipif("triton" not in AVAILABLE, reason="Triton does not run here")),
]
pytestmark = [pytest.mark.usefixtures("one_thread", "simulation"), pytest.mark.parametrize("kind", KINDS)]
SHAPES = ((7, 5), (300,), (0,), (90, 250), (3,))
PARTS = (0, 2, 1, 2, 0)  # part 1 has no elements, and part 3 no parameters
GROUP: dict[str, Any] = {"lr": 0.1}


@pytest.fixture
def simulation(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "gpu":
        request.getfixturevalue("simulator")


class Planned:
    """Parameters with gradients, and a plan of them."""

    def __init__(
        self, kind: str, shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32,
        masters: bool | str = False, idle: int = 0, **more: Any,
    ) -> None:  # fmt: skip
        self.kind, self.backend, self.dtype = kind, BACKEND[kind], dtype
        weights = [op_db.make("params", i, op_db.dense(shape), dtype, "cpu") for i, shape in enumerate(shapes)]
        every = [torch.nn.Parameter(w) for w in weights]
        self.params, self.idle = every[: len(every) - idle], every[len(every) - idle :]
        self.give("grads")
        self.masters = [p.detach().float() for p in self.params] if masters else []
        if masters == "remainder":
            halves = [split(1.001 * w) for w in self.masters]
            self.masters = [remainder for _, remainder in halves]
            for p, (upper, _) in zip(self.params, halves, strict=True):
                p.data.copy_(upper)
        self.backups = [] if masters is True else [torch.zeros_like(p.detach()) for p in self.params]
        self.stats = torch.zeros(6, dtype=torch.float64)
        self.state = StepState()
        held = {p: {"master": m} for p, m in zip(self.params, self.masters, strict=False)}
        missing: list[Any] = [None] * len(self.params)
        self.group = {**GROUP, "params": every}
        self.plan = _backends.new_plan(
            kind, groups=[self.group], everything=every, active=self.params, idle=self.idle, sizes=[len(self.params)],
            masters=self.masters or missing, states=[], backups=self.backups or missing, steps=[], row_groups=[1],
            rule=0, option=False, maximize=False, state=held, step_state=self.state, **more,
        )  # fmt: skip
        self.held = held

    def give(self, name: str) -> None:
        """Gradients of that name."""
        for i, p in enumerate(self.params):
            p.grad = op_db.make(name, i, op_db.dense(p.shape), self.dtype, "cpu")

    @property
    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.params]  # type: ignore[misc]

    @property
    def sources(self) -> list[Tensor]:
        """The weights, in the dtype that they are kept in."""
        weights = [p.detach() for p in self.params]
        if self.masters and self.masters[0].dtype == torch.int16:
            return list(map(join, weights, self.masters))
        return self.masters or weights

    def at(self, stats: Tensor) -> Any:
        return stats if self.kind == "triton" else stats.data_ptr()

    def grad_norm(self, part: int, adaptive: bool = False, stats: Tensor | None = None) -> Tensor | None:
        """The stats; None where the plan did not serve, in which case they are as they were."""
        stats = torch.zeros(6, dtype=torch.float64) if stats is None else stats
        before = stats.clone()
        served = self.plan.grad_norm(self.at(stats), part, adaptive, 0.01 if adaptive else 0.0)
        assert served or op_db.same_bits(stats, before)
        return stats if served else None

    def perturb(self, measured: bool = False, adaptive: bool = False) -> bool:
        return self.plan.perturb(
            self.at(self.stats), [0.7], adaptive, 0.01 if adaptive else 0.0, True, 3, 7, False, measured,
            {"perturbed": True},
        )  # fmt: skip

    def expected(self, part: int, adaptive: bool = False, parts: Sequence[int] = PARTS) -> Tensor:
        """That of the op over the parameters of a part, in the order of the parameters' elements."""
        members = [i for i, number in enumerate(parts[: len(self.params)]) if number == part]
        g, w = ([each[i].detach().contiguous() for i in members] for each in (self.grads, self.params))
        masters = [self.masters[i] for i in members] if self.masters and adaptive else []
        stats = torch.zeros(6, dtype=torch.float64)
        kernels = _backends.backend_named(self.backend).ops
        kernels.grad_norm(stats, g, w if adaptive else [], masters, adaptive, 0.01 if adaptive else 0.0)
        return stats


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("dtype", "masters"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.bfloat16, "remainder")],
)
def test_norms_of_parts(dtype: torch.dtype, masters: bool | str, adaptive: bool, kind: str) -> None:
    """Bit for bit those of the op over these parameters, of which there may be none; together, that over all."""
    run = Planned(kind, dtype=dtype, masters=masters, parts=list(PARTS))
    found = [run.grad_norm(part, adaptive) for part in range(5)]
    for part, stats in enumerate(found):
        assert stats is not None and op_db.same_bits(stats, run.expected(part, adaptive))
    assert [bool(stats[5]) for stats in found] == [True, False, True, False, False]  # type: ignore[index]
    squares = torch.stack([stats[5] for stats in found])  # type: ignore[index]
    norm = oracle.grad_norm(run.grads, run.sources, adaptive, 0.01 if adaptive else 0.0)
    assert float(ops.finish_norm(squares, backend=run.backend)[0]) == pytest.approx(norm, rel=gpu_simulator.NORM_ERROR)
    assert run.grads[0] is run.params[0].grad and all(p._version == 0 for p in run.params), "nothing else has changed"


@pytest.mark.parametrize("more", [{}, {"parts": [0] * len(SHAPES)}, {"parts": [3] * len(SHAPES)}])
def test_all_in_one_part(more: dict[str, Any], kind: str) -> None:
    """The norm that a perturbation of the same plan finds."""
    run = Planned(kind, **more)
    number = more.get("parts", [0])[0]
    found, other = run.grad_norm(number), run.grad_norm(number + 1)
    assert other is not None and other.tolist() == [0] * 6
    assert run.perturb() and found is not None and op_db.same_bits(found, run.stats)


def test_a_bad_norm_of_a_part_counts(kind: str) -> None:
    run = Planned(kind, parts=list(PARTS))
    run.grads[1][5] = torch.inf
    stats = torch.zeros(6, dtype=torch.float64)
    for count, part in ((1, 2), (1, 0), (2, 2)):
        assert run.grad_norm(part, stats=stats) is stats
        assert stats[2:5].tolist() == [float(part == 2), count, 0] and stats[5].isinf() == (part == 2)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("masters", [False, True, "remainder"])
def test_a_norm_that_is_known(masters: bool | str, adaptive: bool, kind: str) -> None:
    """The perturbation takes the stats as they are, and leaves them so."""
    run = Planned(kind, dtype=torch.bfloat16, masters=masters, parts=list(PARTS))
    run.stats.copy_(torch.tensor([3.0, 1 / 3, 0, 5, 0, 9.0]))
    before, moved = run.stats.clone(), [p.detach().clone() for p in run.params]
    ops.perturb_(
        moved, run.grads, None if masters is True else [torch.empty_like(p) for p in moved], before, rho=0.7, seed=3,
        step=7, masters=run.masters or None, adaptive=adaptive, eta=0.01 if adaptive else 0.0, backend=run.backend,
    )  # fmt: skip
    old = [p.detach().clone() for p in run.params]
    assert run.perturb(measured=True, adaptive=adaptive) and run.state.perturbed
    assert op_db.same_bits(run.stats, before) and all(p.grad is None for p in run.params)
    assert all(op_db.same_bits(p.detach(), m) for p, m in zip(run.params, moved, strict=True))
    assert all(op_db.same_bits(b, w) for b, w in zip(run.backups, old, strict=False))


def test_between_the_passes(kind: str) -> None:
    """Of the second gradients, to clip them; first with one part of the plan, then the step goes on."""
    run = Planned(kind, parts=list(PARTS))
    start = [p.detach().clone() for p in run.params]
    assert run.grad_norm(2) is not None and run.perturb()
    run.give("first_grads")
    versions = [p._version for p in run.params]
    for part in (2, 0, 1):
        found = run.grad_norm(part)
        assert found is not None and op_db.same_bits(found, run.expected(part))
    assert [p._version for p in run.params] == versions and run.state.perturbed
    wanted = [(w - 0.1 * g) for w, g in zip(start, run.grads, strict=True)]
    scale = (0, 0) if kind != "triton" else (torch.ones(1), torch.zeros(1))
    assert run.plan.update([0.1, 0.0, 0.0, 0.0, 1.0], True, False, 1.0, *scale, 3, 1, {"perturbed": False})
    for p, w in zip(run.params, wanted, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-6, atol=1e-7)


def no_gradient(run: Planned) -> None:
    run.params[3].grad = None


def idle_gradient(run: Planned) -> None:
    run.idle[0].grad = torch.ones_like(run.idle[0])


def other_memory(run: Planned) -> None:
    run.params[1].data = run.params[1].detach().clone()


def other_dtype(run: Planned) -> None:
    run.params[1].data = run.params[1].detach().double()


def other_master(run: Planned) -> None:
    run.held[run.params[0]]["master"] = run.masters[0].clone()


@pytest.mark.parametrize("parts", [[], list(PARTS[:4])], ids=["one part", "parts"])
@pytest.mark.parametrize(
    "spoil", [no_gradient, idle_gradient, other_memory, other_dtype, other_master], ids=lambda spoil: spoil.__name__
)
def test_what_is_not_as_it_was_is_not_served(spoil: Any, parts: list[int], kind: str) -> None:
    run = Planned(kind, dtype=torch.bfloat16, masters=True, idle=1, parts=parts)
    assert run.grad_norm(0) is not None
    spoil(run)
    for part in (0, 1, 2, 7):
        assert run.grad_norm(part, adaptive=spoil is other_master) is None
    assert not run.perturb(measured=True)


def test_an_update_writes_both_halves(kind: str) -> None:
    """Of backups beside remainders; what the parameters hold meanwhile does not matter."""
    run = Planned(kind, dtype=torch.bfloat16, masters="remainder")
    params, masters = [p.detach().clone() for p in run.params], [m.clone() for m in run.masters]
    assert run.perturb() and all(map(op_db.same_bits, run.backups, params))
    assert all(map(op_db.same_bits, run.masters, masters))
    run.give("first_grads")
    ops.sgd_step_(params, run.grads, lr=0.1, masters=masters, backend=run.backend)
    scale = (0, 0) if kind != "triton" else (torch.ones(1), torch.zeros(1))
    assert run.plan.update([0.1, 0.0, 0.0, 0.0, 1.0], True, False, 1.0, *scale, 3, 1, {"perturbed": False})
    assert all(op_db.same_bits(p.detach(), b) for p, b in zip(run.params, params, strict=True))
    assert all(map(op_db.same_bits, run.masters, masters))


def test_gradients_in_another_layout(kind: str) -> None:
    """The CPU kernels gather them, others leave them to the ops; and back."""
    run = Planned(kind, parts=list(PARTS))
    for turned in (False, True, False, True):
        g = run.grads[3]
        run.params[3].grad = g.t().contiguous().t() if turned else g.contiguous()
        found = run.grad_norm(2)
        assert (found is None) == (turned and kind != "cpu")
        if found is not None:
            assert op_db.same_bits(found, run.expected(2))


def test_wrong_parts_and_shards(kind: str) -> None:
    for wrong in ({"parts": [0] * 4}, {"parts": [-1] * 5}, {"shards": [0] * 14}, {"shards": [-1, 0, 0] * 5}):
        with pytest.raises((ValueError, IndexError), match="parts|shards"):
            Planned(kind, **wrong)
    with pytest.raises(IndexError, match="part"):
        Planned(kind).grad_norm(-1)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", op_db.HALVES, ids=["bfloat16", "float16"])
def test_shards_are_rounded_as_slices_of_the_whole(dtype: torch.dtype, masters: bool, kind: str) -> None:
    """Rows and columns, cut unevenly, beside a tensor that is not cut; with the norm of the whole."""
    whole = Planned(kind, SHAPES, dtype, masters)
    assert whole.perturb()
    for rows, columns in (((0, 3), (0, 90)), ((3, 3), (90, 91)), ((3, 7), (91, 250))):
        a, b, c, d = *rows, *columns
        shapes = ((b - a, 5), (300,), (0,), (90, d - c), (3,))
        shards = [5 * a, 0, 0, *[0] * 6, c, d - c, 250, 0, 3, 3]
        part = Planned(kind, shapes, dtype, masters, shards=shards)
        pieces = {0: (slice(a, b),), 3: (slice(None), slice(c, d))}
        full = Planned(kind, SHAPES, dtype, masters)
        for i, p in enumerate(part.params):
            index = pieces.get(i, (slice(None),))
            grad = p.grad
            assert grad is not None
            p.data.copy_(full.params[i].data[index])
            grad.copy_(full.grads[i][index])
            if masters:
                part.masters[i].copy_(full.masters[i][index])
        part.stats.copy_(whole.stats)
        assert part.perturb(measured=True)
        for i, p in enumerate(part.params):
            assert op_db.same_bits(p.detach(), whole.params[i].detach()[pieces.get(i, (slice(None),))])
