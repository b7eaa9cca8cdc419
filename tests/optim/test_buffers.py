"""Buffers that a forward pass writes are those of the first pass, if the optimizer knows the model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from optimizer_cases import every_backend
from oracle_optimizer import bits
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from rst_fused import RST

pytestmark = pytest.mark.usefixtures("one_thread")


class Statistics(nn.Module):
    """Buffers that are written in place, replaced, and not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("last", torch.zeros(8, 3), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        with torch.no_grad():
            self.passes += 1
            self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
            self.last.copy_(y)
        return y * (1 + self.passes)


class Codebook(nn.Module):
    """Writes only in training, as vector quantization by moving averages does, and reads what it has written."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("codes", torch.eye(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if self.training:
            with torch.no_grad():
                self.codes.lerp_(y.T @ y, 0.1)
        return y @ self.codes


MODELS: dict[str, Callable[[], nn.Module]] = {
    "spectral_norm": lambda: nn.Sequential(spectral_norm(nn.Linear(4, 6), n_power_iterations=2), nn.Linear(6, 1)),
    "statistics": Statistics,
    "codebook": Codebook,
    "BatchNorm": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)),
    "all": lambda: nn.Sequential(Statistics(), nn.BatchNorm1d(3), spectral_norm(nn.Linear(3, 4)), Codebook()),
}
every_model = pytest.mark.parametrize("name", MODELS)
STEPS = 4


def build(name: str, backend: str, with_model: bool, **options: Any) -> tuple[nn.Module, RST]:
    torch.manual_seed(0)
    model = MODELS[name]()
    given = {"model": model} if with_model else {}
    return model, RST(model.parameters(), lr=0.05, rho=0.5, schedule=0.7, seed=9, backend=backend, **given, **options)


def backward(model: nn.Module, t: int) -> torch.Tensor:
    model.zero_grad()
    loss = model(torch.randn(8, 4, generator=torch.Generator().manual_seed(t))).pow(2).mean()
    loss.backward()
    return loss.detach()


def buffers(model: nn.Module) -> list[tuple[str, torch.dtype, bytes]]:
    return [(name, b.dtype, bits([b])[0]) for name, b in model.named_buffers()]


def by_hand(name: str, backend: str) -> list[Any]:
    """Buffers and weights after every step, where the caller puts the buffers back."""
    model, opt = build(name, backend, with_model=False)
    seen = []
    for t in range(STEPS):
        backward(model, t)
        if opt.perturb():
            kept = {key: b.clone() for key, b in model.named_buffers()}
            backward(model, t)
            for key, b in model.named_buffers():
                b.copy_(kept[key])
        opt.step()
        seen.append((buffers(model), bits(list(model.parameters()))))
    assert 0 < opt.sam_steps < STEPS
    return seen


@every_backend
@every_model
@pytest.mark.parametrize("form", ["closure", "second_pass", "second_pass of a model"])
def test_buffers_are_those_of_the_first_pass(form: str, name: str, backend: str) -> None:
    wanted = by_hand(name, backend)
    model, opt = build(name, backend, with_model=form != "second_pass of a model")
    for t in range(STEPS):
        if form == "closure":
            opt.step(lambda t=t: backward(model, t))
        else:
            backward(model, t)
            if opt.perturb():
                with opt.second_pass(*([model] if form == "second_pass of a model" else [])):
                    backward(model, t)
            opt.step()
        assert (buffers(model), bits(list(model.parameters()))) == wanted[t]


@every_model
@pytest.mark.parametrize("form", ["closure", "second_pass"])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_also_if_the_second_pass_fails(error: type[BaseException], form: str, name: str) -> None:
    model, opt = build(name, "auto", with_model=True)
    calls: list[Any] = []

    def closure() -> torch.Tensor:
        loss = backward(model, 0)
        calls.append(buffers(model))
        if len(calls) == 2:
            raise error
        return loss

    with pytest.raises(error), nullcontext():
        opt.schedule = 1.0
        if form == "closure":
            opt.step(closure)
        else:
            closure()
            opt.perturb()
            with opt.second_pass():
                closure()
    assert len(calls) == 2 and buffers(model) == calls[0]


@every_model
def test_the_tensors_stay_where_they_are(name: str) -> None:
    """Others may hold them: a buffer that is written in place is the same tensor afterwards."""
    model, opt = build(name, "auto", with_model=True, gamma=2.0)
    opt.schedule = 1.0
    before = dict(model.named_buffers())
    opt.step(lambda: backward(model, 0))
    assert all(b is before[key] for key, b in model.named_buffers() if not key.endswith("mean") or "running" in key)


def test_without_a_model_both_passes_write() -> None:
    model, opt = build("statistics", "auto", with_model=False)
    opt.schedule = 1.0
    opt.step(lambda: backward(model, 0))
    assert int(model.passes) == 2
