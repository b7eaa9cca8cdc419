"""What tests of DistributedDataParallel share: a small problem, trained on ranks and in one process."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from oracle_optimizer import bits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rst_fused import RST

STEPS = 60
BASES: dict[str, dict[str, Any]] = {
    "sgd": {"base": "sgd", "lr": 0.05, "momentum": 0.9},
    "adamw": {"base": "adamw", "lr": 2e-3, "eps": 1e-3},  # no root of what rounding alone left
    "instance": {"lr": 0.05, "momentum": 0.9},
}


def model_of(seed: int = 0, unused: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 1))
    if unused:
        model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return model


def batch(t: int, rank: int, micro: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * t + 10 * rank + micro)
    x = torch.randn(4, 6, generator=generator)
    return x, x.sin().sum(1, keepdim=True) / 3


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    x, y = data
    return (model(x) - y).square().mean()


def optimizer(model: nn.Module, base: str, **options: Any) -> RST:
    options = {"schedule": 0.5, "rho": 0.05, "seed": 3, **options}
    if base == "instance":
        return RST(base=torch.optim.SGD(model.parameters(), **BASES[base]), **options)
    return RST(model.parameters(), **BASES[base], **options)


def passes(opt: RST, form: str, backward: Callable[[], Any], ddp: Any = None) -> None:
    """One step in the form of a closure, or in two phases."""
    if form == "closure":

        def closure() -> None:
            opt.zero_grad()
            backward()

        opt.step(closure)
        return
    opt.zero_grad()
    with opt.first_pass(ddp):
        backward()
    if opt.perturb():
        with opt.second_pass(ddp):
            backward()
    opt.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def drift(model: nn.Module) -> float:
    """The largest difference between the replicas."""
    worst = 0.0
    for p in model.parameters():
        low, high = p.detach().clone(), p.detach().clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        worst = max(worst, float((high - low).max()))
    return worst


def alone(world: int, base: str, form: str, options: dict[str, Any], micros: int = 1, unused: bool = False,
          steps: int = STEPS) -> tuple[list[Tensor], list[bool]]:  # fmt: skip
    """The same training in one process: the mean of what the ranks minimize."""
    model = model_of(unused=unused)
    opt = optimizer(model, base, **options)
    draws = []
    for t in range(steps):

        def backward(t: int = t) -> None:
            for rank in range(world):
                for micro in range(micros):
                    (loss_of(model, batch(t, rank, micro)) / (world * micros)).backward()

        passes(opt, form, backward)
        draws.append(opt._step_state.was_sam)
    return weights(model), draws


def train(
    base: str, form: str, options: dict[str, Any], ddp: dict[str, Any], micros: int = 1, unused: bool = False,
    steps: int = STEPS, compiled: bool = False,
) -> tuple[list[Tensor], list[bool], float]:  # fmt: skip
    """On one rank: the weights, the draws, and how far the replicas are apart."""
    model = model_of(seed=dist.get_rank(), unused=unused)  # DDP takes those of rank 0
    wrapped = DistributedDataParallel(model, **ddp)
    called: Any = torch.compile(wrapped, backend="aot_eager") if compiled else wrapped
    opt = optimizer(model, base, **options)
    draws = []
    for t in range(steps):

        def backward(t: int = t) -> None:
            for micro in range(micros):
                with wrapped.no_sync() if micro < micros - 1 else nullcontext():
                    (loss_of(called, batch(t, dist.get_rank(), micro)) / micros).backward()

        passes(opt, form, backward, wrapped)
        draws.append(opt._step_state.was_sam)
    return weights(model), draws, drift(model)


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


__all__ = ["STEPS", "alone", "batch", "bits", "copy", "difference", "drift", "loss_of", "model_of", "optimizer",
           "passes", "train", "warnings", "weights"]  # fmt: skip
