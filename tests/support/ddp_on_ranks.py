"""What tests of DistributedDataParallel share: a small problem, trained on ranks and in one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
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


def optimizer(model: nn.Module, base: str, /, **options: Any) -> RST:
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
    steps: int = STEPS,
) -> tuple[list[Tensor], list[bool], float]:  # fmt: skip
    """On one rank: the weights, the draws, and how far the replicas are apart."""
    model = model_of(seed=dist.get_rank(), unused=unused)  # DDP takes those of rank 0
    wrapped = DistributedDataParallel(model, **ddp)
    opt = optimizer(model, base, **options)
    draws = []
    for t in range(steps):

        def backward(t: int = t) -> None:
            for micro in range(micros):
                with wrapped.no_sync() if micro < micros - 1 else nullcontext():
                    (loss_of(wrapped, batch(t, dist.get_rank(), micro)) / micros).backward()

        passes(opt, form, backward, wrapped)
        draws.append(opt._step_state.was_sam)
    return weights(model), draws, drift(model)


def train_all(cases: list[tuple[Any, ...]]) -> list[tuple[list[Tensor], list[bool], float]]:
    """One training after another, each with the arguments of ``train``."""
    return [train(*case[:4], **case[4]) for case in cases]


def first_gradients(base: str, views: bool, executor: str) -> tuple[int, int, int]:
    """Of a SAM step that mixes: the parameters, and the first gradients that were copied, with and without a plan."""
    wrapped = DistributedDataParallel(model_of(), gradient_as_bucket_view=views)
    opt = optimizer(wrapped, base, gamma=2.0, schedule=1.0, backend=executor)
    copied = []
    for t in range(3):  # from the second step on a plan has all state
        opt.zero_grad()
        loss_of(wrapped, batch(t, dist.get_rank())).backward()
        before = {p.grad.data_ptr() for p in wrapped.parameters() if p.grad is not None}
        opt.perturb()
        kept = opt._step_state.first_grads
        first = list(kept.values()) if isinstance(kept, dict) else kept.as_list()
        copied.append(sum(g.data_ptr() not in before for g in first))
        loss_of(wrapped, batch(t, dist.get_rank())).backward()
        opt.step()
    return len(first), copied[0], copied[-1]


def compiled_steps(views: bool, gamma: float, whole: bool) -> tuple[list[Tensor], float, int, int]:
    """A compiled model, with an eager optimizer or a compiled one; frames compiled in 20 steps, and in 60."""
    torch._dynamo.reset()
    model = model_of(dist.get_rank())
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=views)
    called = torch.compile(wrapped, backend="aot_eager")
    opt = optimizer(model, "sgd", gamma=gamma)
    perturb, update = opt.perturb, opt.step
    if whole:
        perturb = torch.compile(opt.perturb, backend="aot_eager", fullgraph=True)
        update = torch.compile(lambda: opt.step(), backend="aot_eager", fullgraph=True)
    seen = []
    for t in range(STEPS):
        opt.zero_grad()
        loss_of(called, batch(t, dist.get_rank())).backward()
        if perturb(opt.draw()):
            loss_of(called, batch(t, dist.get_rank())).backward()
        update()
        seen.append(torch._dynamo.utils.counters["frames"]["total"])
    return weights(model), drift(model), seen[19], seen[-1]


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
