"""Running statistics belong to the first pass: those of a model whose second pass never was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from oracle_optimizer import BACKENDS, bits
from torch import nn

from rst_fused import RST, freeze_batch_norm

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)),
    "BatchNorm2d": lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)),
    "cumulative": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None)),
    "not affine": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False)),
    "InstanceNorm2d": lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.InstanceNorm2d(6, track_running_stats=True)),
    "no statistics": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False)),
    "nested": lambda: nn.Sequential(LAYERS["BatchNorm1d"](), nn.ModuleDict({"a": nn.BatchNorm1d(6)})["a"]),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)


def build(layer: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = LAYERS[layer]()
    return model, torch.randn(5, 2, 7, 7) if "2d" in layer else torch.randn(8, 4)


def statistics(model: nn.Module) -> Any:
    return [(name, b.dtype, bits([b])) for name, b in model.named_buffers()]


def backward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss = model(x).pow(3).mean()
    loss.backward()
    return loss.detach()


def first_pass_only(layer: str, steps: int) -> Any:
    """The statistics after ``steps`` steps of which every second pass runs on a copy of the model."""
    model, x = build(layer)
    opt = RST(model.parameters(), lr=0.1, rho=0.5, schedule=1.0, backend="reference")
    for _ in range(steps):
        backward(model, x)
        opt.perturb()
        kept = [b.clone() for b in model.buffers()]
        backward(model, x)
        for b, k in zip(model.buffers(), kept, strict=True):
            b.copy_(k)
        opt.step()
    return statistics(model), bits(list(model.parameters()))


@every_layer
@pytest.mark.parametrize("form", ["closure", "second_pass", "freeze_batch_norm", "no model"])
def test_statistics_are_those_of_the_first_pass(form: str, layer: str) -> None:
    model, x = build(layer)
    start = statistics(model)
    opt = RST(model.parameters(), lr=0.1, rho=0.5, schedule=1.0, backend="reference",
              model=model if form == "closure" else None)  # fmt: skip
    for _ in range(3):
        if form == "closure":
            opt.step(lambda: backward(model, x))
            continue
        backward(model, x)
        assert opt.perturb()
        if form == "second_pass":
            with opt.second_pass(model):
                backward(model, x)
        elif form == "freeze_batch_norm":
            with freeze_batch_norm(model):
                backward(model, x)
        else:
            backward(model, x)
        opt.step()
    wanted, weights = first_pass_only(layer, 3)
    assert bits(list(model.parameters())) == weights  # and normalization is as ever
    if layer == "no statistics":
        assert start == statistics(model) == []
        return
    assert (statistics(model) == wanted) == (form != "no model")
    assert statistics(model) != start
    tracked = [b for name, b in model.named_buffers() if "tracked" in name]
    if form != "no model" and not layer.startswith("Instance"):
        assert [int(b) for b in tracked] == [3] * len(tracked)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_base_step_updates_them_once(backend: str) -> None:
    model, x = build("BatchNorm1d")
    opt = RST(model.parameters(), lr=0.1, schedule=0.0, model=model, backend=backend)
    opt.step(lambda: backward(model, x))
    assert int(model[1].num_batches_tracked) == 1


@every_layer
def test_layers_in_eval_mode_stay_as_they_are(layer: str) -> None:
    """A frozen layer uses its running statistics in both passes, and they never change."""
    model, x = build(layer)
    backward(model, x)
    model[1].eval()
    before = statistics(model[1])
    modes = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    with torch.no_grad():
        wanted = model(x)
        with freeze_batch_norm(model):
            assert torch.equal(model(x), wanted)
    assert statistics(model[1]) == before
    assert modes == [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]


@every_layer
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exceptions_give_everything_back(error: type[BaseException], layer: str) -> None:
    model, x = build(layer)
    backward(model, x)
    opt = RST(model.parameters(), lr=0.1, schedule=1.0, model=model)

    def snapshot() -> Any:
        flags = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
        return flags, statistics(model), bits(list(model.parameters()))

    before = snapshot()
    with pytest.raises(error), freeze_batch_norm(model):
        backward(model, x)
        raise error
    assert snapshot() == before
    opt.perturb()
    with pytest.raises(error), opt.second_pass(model):
        backward(model, x)
        raise error
    assert snapshot() == before
    calls: list[int] = []

    def closure() -> None:
        calls.append(1)
        if len(calls) == 2:
            backward(model, x)
            raise error
        model.zero_grad()

    with pytest.raises(error):
        opt.step(closure)
    assert len(calls) == 2 and snapshot() == before


def test_nested_and_repeated_freezing() -> None:
    model, x = build("BatchNorm1d")
    before = statistics(model)
    with freeze_batch_norm(model):
        with freeze_batch_norm(model[1]), freeze_batch_norm(None):
            backward(model, x)
        backward(model, x)
        assert statistics(model) == before
    assert model[1].track_running_stats
    backward(model, x)
    assert statistics(model) != before


def test_second_pass_without_a_model_uses_the_one_given_to_the_optimizer() -> None:
    model, x = build("BatchNorm1d")
    opt = RST(model.parameters(), lr=0.1, schedule=1.0, model=model)
    backward(model, x)
    opt.perturb()
    with opt.second_pass():
        backward(model, x)
    opt.step()
    assert int(model[1].num_batches_tracked) == 1


def test_what_is_no_model() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = RST([p], lr=0.1, schedule=1.0)
    p.grad = torch.ones(3)
    opt.perturb()
    with pytest.raises(TypeError, match="model='net': expected a torch.nn.Module, or None"), opt.second_pass("net"):
        pass
    assert torch.equal(p.detach(), torch.ones(3))
    with pytest.raises(TypeError, match="model=3: expected"), freeze_batch_norm(3):
        pass


def test_compiled_model() -> None:
    """The flag reaches a compiled model: it recompiles once for each pass and no more."""
    torch._dynamo.reset()
    model, x = build("BatchNorm1d")
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    opt = RST(model.parameters(), lr=0.1, rho=0.5, schedule=1.0, model=model, backend="reference")
    for _ in range(3):
        opt.step(lambda: backward(compiled, x))
    assert int(model[1].num_batches_tracked) == 3
    assert counter.frame_count == 2
    assert statistics(model) == first_pass_only("BatchNorm1d", 3)[0]
