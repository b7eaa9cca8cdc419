"""Accelerate against plain loops of this package: same data, same draws, same bits."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import ranks
import torch
from oracle_optimizer import bits

pytest.importorskip("accelerate", reason="accelerate is not installed")
from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402

from rst_fused import RST  # noqa: E402
from rst_fused.integrations.accelerate import RSTLoop  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS: dict[str, Any] = {"base": "sgd", "lr": 0.1, "momentum": 0.9, "rho": 0.1, "schedule": 0.5, "seed": 1}
COUNT = 12


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate keeps its state in the classes."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def make(**options: Any) -> tuple[torch.nn.Module, RST]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return model, RST(model.parameters(), **{**OPTIONS, **options})


def batches() -> torch.Tensor:
    return torch.randn(4 * COUNT, 6, generator=torch.Generator().manual_seed(1))


def loader() -> Any:
    return torch.utils.data.DataLoader(batches(), batch_size=4)


def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    return (model(x[:, :5]) - x[:, 5:]).square().mean()


def prepared(per_step: int = 1, precision: str = "no", **options: Any) -> tuple[Accelerator, Any, Any, Any]:
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=per_step)
    return accelerator, *accelerator.prepare(*make(**options), loader())


def train(loop: RSTLoop, data: Any, epochs: int = 1) -> list[torch.Tensor]:
    return [loop.step(x) for _ in range(epochs) for x in data]


def plain(
    per_step: int = 1, epochs: int = 1, precision: str = "no", clip: float | None = None, scaler: Any = None,
    **options: Any,
) -> tuple[torch.nn.Module, RST]:  # fmt: skip
    """The same training, written out."""
    model, opt = make(**options)
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def one_pass(window: list[torch.Tensor]) -> None:
        for x in window:
            with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
                out = model(x[:, :5])
            loss = (out.float() - x[:, 5:]).square().mean() / per_step
            (loss if scaler is None else scaler.scale(loss)).backward()

    def clipped() -> None:
        if clip and scaler is not None:
            scaler.unscale_(opt)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)

    data = list(batches().split(4))
    for _ in range(epochs):
        for start in range(0, COUNT, per_step):
            window = data[start : start + per_step]
            opt.zero_grad()
            one_pass(window)
            if scaler is None or not opt.draw():
                clipped()
            if opt.perturb():
                with opt.second_pass(model):
                    one_pass(window)
                clipped()
            if scaler is None:
                opt.step()
            else:
                scaler.step(opt)
                scaler.update()
    return model, opt


def assert_same(model: Any, loop: RSTLoop, other: torch.nn.Module, opt: RST) -> None:
    assert (loop.rst.steps, loop.rst.sam_steps) == (opt.steps, opt.sam_steps) and 0 < opt.sam_steps < opt.steps
    assert bits([*model.parameters(), *model.buffers()]) == bits([*other.parameters(), *other.buffers()])


@pytest.mark.parametrize("per_step", [1, 4, 5])
@pytest.mark.parametrize(("gamma", "clip", "precision"), [(1.0, None, "no"), (2.0, 0.05, "no"), (2.0, None, "bf16")])
def test_a_run_is_that_of_a_plain_loop(per_step, gamma, clip, precision):
    accelerator, model, optimizer, data = prepared(per_step, precision, gamma=gamma)
    loop = RSTLoop(accelerator, model, optimizer, loss_of, max_grad_norm=clip)
    losses = train(loop, data, 2)
    assert_same(model, loop, *plain(per_step, 2, precision, clip, gamma=gamma))
    assert len(losses) == 24 and not any(loss.requires_grad for loss in losses)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_loss_scaler(monkeypatch, clip):
    """Accelerate makes one on a GPU only: here it is given one."""
    accelerator, model, optimizer, data = prepared(2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    monkeypatch.setitem(accelerator.state.__dict__, "_mixed_precision", "fp16")
    accelerator.scaler, accelerator.native_amp = scaler, True
    optimizer = AcceleratedOptimizer(optimizer.optimizer, scaler=scaler)
    accelerator._optimizers = [optimizer]
    loop = RSTLoop(accelerator, model, optimizer, loss_of, max_grad_norm=clip)
    train(loop, data)
    assert_same(model, loop, *plain(2, clip=clip, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12)))
    accelerator.backward(loss_of(model, batches()[:4]))
    with pytest.raises(RuntimeError, match=r"step\(closure\) by a GradScaler"):
        optimizer.step(lambda: None)
    loop.rst.gamma = 2.0
    if clip:
        with pytest.raises(ValueError, match=r"max_grad_norm=0.05 with a loss scaler \(fp16\) and gamma=2.0"):
            RSTLoop(accelerator, model, optimizer, loss_of, max_grad_norm=clip)


def test_the_usual_loop_takes_base_steps_and_says_so():
    accelerator, model, optimizer, data = prepared(4, schedule=1.0)
    with pytest.warns(RuntimeWarning, match="without a closure and without perturb"):
        for x in data:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, x))
                optimizer.step()
                optimizer.zero_grad()
    assert (optimizer.optimizer.steps, optimizer.optimizer.sam_steps) == (3, 0)


def test_a_closure_over_the_last_micro_batch_is_refused():
    accelerator, model, optimizer, data = prepared(4, schedule=1.0)
    with pytest.raises(RuntimeError, match="adds to gradients that were there before"):
        for x in data:
            with accelerator.accumulate(model):
                if not accelerator.sync_gradients:
                    accelerator.backward(loss_of(model, x))
                optimizer.step(lambda x=x: accelerator.backward(loss_of(model, x)))


def test_a_closure_without_accumulation_works_as_it_is():
    accelerator, (model, _), other, opt = Accelerator(cpu=True), make(), *plain()
    model, optimizer, data = accelerator.prepare(model, RST(model.parameters(), **OPTIONS, model=model), loader())
    for x in data:

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x)
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)
    assert optimizer.optimizer.sam_steps == opt.sam_steps
    assert bits(list(model.parameters())) == bits(list(other.parameters()))


def test_an_exception_in_the_second_pass_brings_the_weights_back():
    accelerator, model, optimizer, data = prepared(3, schedule=1.0)
    calls = []

    def failing(model: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if len(calls) == 5:
            raise KeyError("not today")
        return loss_of(model, x)

    before = bits(list(model.parameters()))
    loop = RSTLoop(accelerator, model, optimizer, failing)
    with pytest.raises(KeyError, match="not today"):
        train(loop, data)
    assert bits(list(model.parameters())) == before and loop.rst.steps == 0 and loop._window == []
    assert all(p.grad is None for p in model.parameters())


def test_a_scheduler_steps_once_a_window():
    accelerator, model, optimizer, data = prepared(4)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    loop = RSTLoop(accelerator, model, optimizer, loss_of)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in data:
            loop.step(x)
            scheduler.step()
    assert loop.rst.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


def test_saved_state_continues_the_draws(tmp_path):
    accelerator, model, optimizer, data = prepared(2)
    train(RSTLoop(accelerator, model, optimizer, loss_of), data)
    accelerator.save_state(str(tmp_path))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator, model, optimizer, data = prepared(2, seed=99)
    accelerator.load_state(str(tmp_path))
    loop = RSTLoop(accelerator, model, optimizer, loss_of)
    assert (loop.rst.steps, loop.rst.seed) == (6, 1)
    train(loop, data)
    assert_same(model, loop, *plain(2, 2))


def test_what_is_refused(monkeypatch):
    accelerator, model, optimizer, _ = prepared()
    with pytest.raises(TypeError, match="SGD without an RST"):
        RSTLoop(accelerator, model, torch.optim.SGD(model.parameters()), loss_of)
    with pytest.raises(ValueError, match="max_grad_norm=-1"):
        RSTLoop(accelerator, model, optimizer, loss_of, max_grad_norm=-1)
    monkeypatch.setattr(Accelerator, "distributed_type", "DEEPSPEED")
    with pytest.raises(RuntimeError, match="DEEPSPEED, whose engine takes the step"):
        RSTLoop(accelerator, model, optimizer, loss_of)


def _on_a_rank(per_step: int) -> Any:
    accelerator, model, optimizer, data = prepared(per_step, gamma=2.0)
    assert accelerator.num_processes == 2
    loop = RSTLoop(accelerator, model, optimizer, loss_of, max_grad_norm=0.5)
    train(loop, data)
    return bits(list(model.parameters())), loop.rst.steps, loop.rst.sam_steps, list(model.parameters())


def test_two_processes_are_one_with_the_mean_of_their_gradients():
    found = ranks.run(2, _on_a_rank, 3)
    assert found[0][:3] == found[1][:3]
    replicas = [make(gamma=2.0), make(gamma=2.0)]
    model, opt = replicas[0]
    data = list(batches().split(4))

    def one_pass(start: int) -> None:
        for rank, (replica, other) in enumerate(replicas):
            with torch.no_grad():
                for p, q in zip(replica.parameters(), model.parameters(), strict=True):
                    p.copy_(q)
            other.zero_grad()
            for i in range(start, start + 3):
                (loss_of(replica, data[2 * i + rank]) / 3).backward()
        for p, q in zip(model.parameters(), replicas[1][0].parameters(), strict=True):
            p.grad = (p.grad + q.grad) / 2
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)

    for start in (0, 3):
        one_pass(start)
        if opt.perturb():
            one_pass(start)
        opt.step()
    assert found[0][1:3] == (opt.steps, opt.sam_steps) == (2, 1)
    for p, q in zip(found[0][3], model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # sums over ranks in another order
