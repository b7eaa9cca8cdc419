"""torch.compile around the methods themselves, as the tutorials of torch write it: graph breaks cost time, never bits.

Full graphs, and how often they are compiled: test_compile.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optimizer_cases import every_backend
from paths import observed
from torch import nn
from torch.optim import lr_scheduler

from rst_fused import RST
from rst_fused._step import release

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error:Detected call of .lr_scheduler.step:UserWarning"),
]
STEPS = 6
BASES: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}, "adamw": {"base": "adamw"}}
every_base = pytest.mark.parametrize("base", BASES)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    logging.getLogger("torch.__trace").propagate = False
    yield
    torch._dynamo.reset()


class Training:
    def __init__(self, base: str, backend: str, lr: Any = 0.1, **more: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        self.params = list(self.model.parameters())
        self.opt = RST(self.params, lr=lr, rho=0.5, seed=9, backend=backend, **BASES[base], **more)

    def backward(self, t: int) -> None:
        self.opt.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(t))
        self.model(x).square().mean().backward()

    def step(self, t: int, perturb: Callable[[], bool], update: Callable[[], Any]) -> None:
        self.backward(t)
        if perturb():
            self.backward(t)
        update()

    def seen(self) -> dict[str, Any]:
        found = observed(self.params, self.opt)
        assert 0 < self.opt.sam_steps < STEPS or self.opt.steps < STEPS
        return found


@every_backend
@pytest.mark.parametrize(("base", "step", "gamma"), [
    ("sgd", "eager", 2.0), ("adamw", "eager", 1.0), ("sgd", "compiled", 1.0), ("adamw", "compiled", 2.0),
])  # fmt: skip
def test_perturb_draws_by_itself(step: str, gamma: float, base: str, backend: str) -> None:
    """Without fire=, at which the graph breaks: the draw runs eagerly."""
    eager, ours = (Training(base, backend, gamma=gamma) for _ in range(2))
    perturb = torch.compile(ours.opt.perturb, backend="eager")
    update = torch.compile(ours.opt.step, backend="eager") if step == "compiled" else ours.opt.step
    for t in range(STEPS):
        eager.step(t, eager.opt.perturb, eager.opt.step)
        ours.step(t, perturb, update)
        assert ours.seen() == eager.seen()


@every_backend
def test_a_full_graph_of_perturb_asks_for_the_draw(backend: str) -> None:
    run, twin = (Training("sgd", backend) for _ in range(2))
    run.backward(0)
    before = run.seen()
    with pytest.raises(Exception, match=r"pass fire=opt\.draw\(\)"):
        torch.compile(run.opt.perturb, fullgraph=True, backend="eager")()
    assert run.seen() == before
    perturb = torch.compile(run.opt.perturb, fullgraph=True, backend="eager")
    for t in range(STEPS):
        run.step(t, lambda: perturb(fire=run.opt.draw()), run.opt.step)
        twin.step(t, twin.opt.perturb, twin.opt.step)
        assert run.seen() == twin.seen()


def halving(t: int) -> float:
    return 0.5**t


@every_backend
@pytest.mark.parametrize(("base", "form"), [("sgd", "opt.step"), ("adamw", "opt.step"), ("adamw", "both in one")])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_step_and_scheduler(form: str, lr: Any, base: str, backend: str) -> None:
    """As in torch's tutorial on compiled optimizers with a scheduler; perturb() stays eager."""
    eager, ours = (Training(base, backend, lr.clone() if isinstance(lr, torch.Tensor) else lr) for _ in range(2))
    schedulers = [lr_scheduler.LambdaLR(run.opt, halving) for run in (eager, ours)]

    def both() -> None:
        ours.opt.step()
        schedulers[1].step()

    if form == "opt.step":
        update = torch.compile(ours.opt.step, backend="eager")
    else:
        update = torch.compile(both, backend="aot_eager")
    for t in range(STEPS):
        eager.step(t, eager.opt.perturb, eager.opt.step)
        ours.step(t, ours.opt.perturb, update)
        schedulers[0].step()
        if form == "opt.step":
            schedulers[1].step()
        assert ours.seen() == eager.seen()
    assert float(ours.opt.param_groups[0]["lr"]) == pytest.approx(0.1 * halving(STEPS))


@every_backend
@every_base
def test_both_phases_compiled_under_a_scheduler(base: str, backend: str) -> None:
    eager, ours = (Training(base, backend) for _ in range(2))
    schedulers = [lr_scheduler.LambdaLR(run.opt, halving) for run in (eager, ours)]
    perturb, update = (torch.compile(call, backend="eager") for call in (ours.opt.perturb, ours.opt.step))
    for t in range(STEPS):
        eager.step(t, eager.opt.perturb, eager.opt.step)
        ours.step(t, lambda: perturb(ours.opt.draw()), update)
        for scheduler in schedulers:
            scheduler.step()
        assert ours.seen() == eager.seen()


@pytest.mark.parametrize("base", BASES)
def test_gradients_are_released_in_compiled_autograd(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph breaks at the hooks of release_gradients=True, which it must not trace; a model may be compiled too."""
    monkeypatch.setattr(release, "BUCKET", 30)
    eager, ours = Training(base, "auto", gamma=2.0), Training(base, "auto", gamma=2.0, release_gradients=True)
    ours.model = torch.compile(ours.model, backend="eager")
    for t in range(STEPS):
        eager.step(t, eager.opt.perturb, eager.opt.step)
        with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
            ours.backward(t)
            assert ours.opt._step_state.released or ours.opt.draw()
            if ours.opt.perturb():
                ours.backward(t)
        assert ours.opt._step_state.released
        ours.opt.step()
        assert ours.seen() == eager.seen()


@pytest.mark.parametrize("schedule", [0.5, 1.0])
@every_base
def test_a_whole_step_in_one_compiled_function(base: str, schedule: float) -> None:
    """Its backward breaks the graph, and so does perturb(); what runs eagerly then may be traced in pieces."""
    runs = [Training(base, "auto", schedule=schedule) for _ in range(2)]

    def whole(run: Training, x: torch.Tensor) -> None:
        run.opt.zero_grad()
        run.model(x).square().mean().backward()
        if run.opt.perturb():
            run.opt.zero_grad()
            run.model(x).square().mean().backward()
        run.opt.step()

    compiled = torch.compile(whole)
    for t in range(4):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(t))
        whole(runs[0], x)
        compiled(runs[1], x)
    assert runs[0].opt.sam_steps == runs[1].opt.sam_steps > 0
    for p, q in zip(runs[0].params, runs[1].params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
