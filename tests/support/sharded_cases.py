"""Sharded training with what people add to it: AMP, 16-bit weights, offloading, accumulation; and with errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sharded
import torch
import torch.distributed as dist
from sharded import CLASSES, FEATURES, batches, fsdp, make_model, result, sharded_model, weights, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from rst_fused import RST


def _mine(whole_batch: torch.Tensor) -> torch.Tensor:
    return whole_batch.chunk(dist.get_world_size())[dist.get_rank()]


def _loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (model(x).float() - y).square().mean()


def _sharded_like(t: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return distribute_tensor(t, p.device_mesh, p.placements) if isinstance(p, DTensor) else t


def sixteen_bit(how: str, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    """Weights while they are perturbed and after each step, with gradients that are the same on any number of ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "make_model", lambda: make_model().to(dtype))
        model = sharded.make_model() if how == "alone" else sharded_model(how)[0]
    opt = RST(model.parameters(), lr=0.1, momentum=0.9, schedule=1.0, rho=0.5, **options)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(3):
        for phase in (opt.perturb, opt.step):
            for p in model.parameters():
                p.grad = _sharded_like(torch.randn(p.shape, generator=generator).to(dtype), p)
            phase()
            seen.append(weights(model))
    return {"seen": seen, "norm": opt.last_grad_norm}


def scaled(how: str, recipe: dict[str, Any], overflow: tuple[int, int, int] | None, steps: int) -> dict[str, Any]:
    """With a GradScaler. overflow: the step, the pass and the rank at which a gradient is infinite."""
    model, mine = sharded_model(how)
    opt = RST(model.parameters(), **recipe)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    taken, scales = [], []
    for t, (x, y) in enumerate(batches(steps)):
        before = weights(model)
        for number in (1, 2):
            if number == 1:
                opt.zero_grad()
            elif not opt.perturb():
                break
            scaler.scale(_loss(model, mine(x), mine(y))).backward()
            if overflow == (t, number, dist.get_rank()):
                p = next(p for p in model.parameters() if p.grad is not None and p.grad.to_local().numel())
                p.grad.to_local().fill_(math.inf)
        scaler.step(opt)
        taken.append(any(not a.equal(b) for a, b in zip(before, weights(model), strict=True)))
        scaler.update()
        scales.append(scaler.get_scale())
    return {**result(opt, model), "taken": taken, "scales": scales}


def mixed_precision(steps: int, offload: bool) -> dict[str, Any]:
    """bfloat16 in the passes, over float32 shards, which may be offloaded."""
    model = make_model()
    options: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    fsdp(model, **options)
    opt = RST(model.parameters(), lr=0.05, momentum=0.9, schedule=1.0, rho=0.5)
    losses = []
    for x, y in batches(steps):
        opt.zero_grad()
        first = _loss(model, _mine(x), _mine(y))
        first.backward()
        opt.perturb()
        with opt.second_pass():
            second = _loss(model, _mine(x), _mine(y))
            second.backward()
        opt.step()
        losses.append((float(first), float(second)))
    return {**result(opt, model), "losses": losses, "dtype": next(model.parameters()).dtype}


def accumulated(steps: int, micro: int, closure_form: bool) -> dict[str, Any]:
    """FSDP2 over micro-batches: gradients are reduced with the last one of each pass."""
    model, mine = sharded_model("fsdp")
    opt = RST(model.parameters(), lr=0.05, momentum=0.9, gamma=2.0)

    def passes(x: torch.Tensor, y: torch.Tensor) -> None:
        for i, (a, b) in enumerate(zip(mine(x).chunk(micro), mine(y).chunk(micro), strict=True)):
            model.set_requires_gradient_sync(i == micro - 1)
            (_loss(model, a, b) / micro).backward()

    for x, y in batches(steps):

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            opt.zero_grad()
            passes(x, y)
            return torch.zeros(())

        if closure_form:
            opt.step(closure)
            continue
        opt.zero_grad()
        passes(x, y)
        if opt.perturb():
            with opt.second_pass():
                passes(x, y)
        opt.step()
    return result(opt, model)


def fails_between_the_passes(how: str) -> dict[str, Any]:
    """In the second pass, on every rank: where one rank fails, the others hear of it in a collective."""
    model, mine = sharded_model(how)
    opt = RST(model.parameters(), lr=0.1, momentum=0.9, schedule=1.0)
    before = weights(model)
    x, y = batches(1)[0]
    _loss(model, mine(x), mine(y)).backward()
    opt.perturb()
    moved = weights(model)
    with pytest.raises(ZeroDivisionError), opt.second_pass():
        raise ZeroDivisionError
    return {"before": before, "moved": moved, "after": weights(model), "steps": opt.steps}


def one_rank_fails(at: str) -> None:
    """It ends with its own error; the others must not wait for it for ever."""
    model, mine = sharded_model("fsdp")
    opt = RST(model.parameters(), lr=0.1, momentum=0.9, schedule=1.0)
    for t, (x, y) in enumerate(batches(3)):
        opt.zero_grad()
        _loss(model, mine(x), mine(y)).backward()
        fails = t == 1 and dist.get_rank() == 1
        if at == "before the norm" and fails:
            raise ZeroDivisionError
        opt.perturb()
        if at == "between the passes" and fails:
            raise ZeroDivisionError
        with opt.second_pass():
            _loss(model, mine(x), mine(y)).backward()
        opt.step()


def unsharded_by_hand() -> dict[str, Any]:
    """Weights that the user gathered are gathered again after they moved."""
    model, mine = sharded_model("fsdp")
    opt = RST(model.parameters(), lr=0.1, schedule=1.0, rho=1.0)
    x, y = batches(1)[0]
    first = _loss(model, mine(x), mine(y))
    first.backward()
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.unshard()
    opt.perturb()
    second = float(_loss(model, mine(x), mine(y)).detach())
    opt.restore()
    third = float(_loss(model, mine(x), mine(y)).detach())
    return {"losses": (float(first), second, third)}


def misfits() -> list[str]:
    """What is refused, in words."""
    mesh = init_device_mesh("cpu", (2,))
    said = []

    def refused(error: type[Exception], function: Any) -> None:
        with pytest.raises(error) as caught:
            function()
        said.append(str(caught.value))

    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    refused(ValueError, lambda: RST([nn.Parameter(partial)]))
    flat = FullyShardedDataParallel(make_model(), use_orig_params=True, device_id=torch.device("cpu"))
    refused(ValueError, lambda: RST(flat.parameters()))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    opt = RST([p], lr=0.1, momentum=0.9)
    opt.state[p]["momentum_buffer"] = torch.zeros(4, 2)
    p.grad = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    opt.draw()
    refused(RuntimeError, lambda: opt.step())
    return said


def settled(placement: str) -> list[torch.Tensor]:
    """Gradients in another layout than their parameter."""
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.arange(12.0).reshape(6, 2), mesh, [Shard(0)]))
    opt = RST([p], lr=0.5, momentum=0.9, schedule=1.0)
    for step in range(3):
        for number in (1, 2):
            g = torch.full((6, 2), float(step + number))
            if placement == "partial":
                p.grad = DTensor.from_local(g * (dist.get_rank() + 1) / 3, mesh, [Partial()])
            else:
                p.grad = distribute_tensor(g, mesh, [Replicate() if placement == "replicate" else Shard(1)])
            if number == 1:
                opt.perturb()
        opt.step()
    return [whole(p)]


def unused_on(rank: int) -> dict[str, Any]:
    """A parameter that has no gradient on some ranks, and ranks that have none at all, meet the others all the same."""
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Linear(4, CLASSES))
    for layer in model:
        fully_shard(layer)
    opt = RST(model.parameters(), lr=0.1, schedule=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) + 1
    if dist.get_rank() == rank:
        opt.zero_grad()
    opt.perturb()
    norm = opt.last_grad_norm
    opt.restore()
    return {"norm": norm, "elements": sum(p.to_local().numel() for p in model.parameters())}
