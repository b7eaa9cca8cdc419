"""A small model, sharded in every way that is supported, and the same training on one process and on several."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from rst_fused import RST

FEATURES, HIDDEN, CLASSES, BATCH = 9, 16, 3, 8
STEPS = 60
# Gradients are sums over ranks in another order than on one process: an error of some 2^-24 in each, which 60 steps of
# momentum 0.9 do not amplify here.
TOLERANCE = 2e-7
# eps: with the usual one AdamW makes a step of size lr of the rounding of a gradient near 0.
RECIPES: dict[str, dict[str, Any]] = {
    "sgd": {"base": "sgd", "lr": 0.02, "momentum": 0.9},
    "g-rst": {"base": "sgd", "lr": 0.03, "momentum": 0.9, "gamma": "match"},
    "adamw": {"base": "adamw", "lr": 1e-3, "eps": 1e-3},
    "asam": {"base": "sgd", "lr": 0.03, "momentum": 0.9, "adaptive": True, "rho": 0.5, "eta": 0.01},
}


def make_model() -> nn.Sequential:
    """Its last bias has fewer elements than there may be ranks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 5), nn.Tanh(), nn.Linear(5, CLASSES)
    )


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(steps, BATCH, n, generator=generator) for n in (FEATURES, CLASSES))
    return list(zip(x, y, strict=True))


def fsdp(model: nn.Sequential, mesh: Any = None, **options: Any) -> nn.Sequential:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _halves(*names: str) -> Any:
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=names)


def _tensor_parallel(model: nn.Sequential, mesh: Any) -> None:
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def _wrap(how: str, model: nn.Sequential) -> tuple[int, int]:
    """Shards the model; returns which of how many parts of a batch this rank is given."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if how == "fsdp":
        fsdp(model)
    elif how == "fsdp, mixed":
        fsdp(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    elif how == "fsdp, kept after forward":
        fsdp(model, reshard_after_forward=False)
    elif how == "fsdp, kept after backward":
        fsdp(model).set_reshard_after_backward(False)
    elif how == "fsdp, some plain":  # the last layer is replicated by hand
        fsdp(model[:3])
        for p in model[4].parameters():
            p.register_hook(_averaged)
    elif how == "hsdp":
        fsdp(model, _halves("replicate", "shard"))
    elif how == "tp":
        _tensor_parallel(model, init_device_mesh("cpu", (size,), mesh_dim_names=("tp",)))
        return 0, 1
    elif how == "tp, all replicated":
        distribute_module(
            model,
            init_device_mesh("cpu", (size,)),
            input_fn=lambda _, inputs, mesh: DTensor.from_local(inputs[0], mesh),
            output_fn=lambda _, output, mesh: output.to_local(),
        )
        return 0, 1
    elif how == "fsdp + tp":
        mesh = _halves("dp", "tp")
        _tensor_parallel(model, mesh["tp"])
        fsdp(model, mesh["dp"])
        return mesh.get_local_rank("dp"), 2
    else:
        raise ValueError(how)
    return rank, size


def _averaged(grad: Tensor) -> Tensor:
    grad = grad / dist.get_world_size()
    dist.all_reduce(grad)
    return grad


SETUPS = {
    "fsdp": (2, 4), "fsdp, kept after forward": (2,), "fsdp, kept after backward": (2,), "fsdp, some plain": (2, 4),
    "hsdp": (4,), "tp": (2, 4), "tp, all replicated": (2,), "fsdp + tp": (4,),
}  # fmt: skip
CASES = [(how, size) for how, sizes in SETUPS.items() for size in sizes]


def sharded_model(how: str) -> tuple[nn.Sequential, Callable[[Tensor], Tensor]]:
    """The model, and what this rank is given of a batch."""
    model = make_model()
    part, parts = _wrap(how, model)
    return model, lambda whole: whole.chunk(parts)[part]


def steps_of(opt: RST, model: nn.Module, data: list[tuple[Tensor, Tensor]], mine: Any = lambda whole: whole) -> None:
    """One two-phase step for each batch."""
    for x, y in data:
        opt.zero_grad()
        (model(mine(x)) - mine(y)).square().mean().backward()
        if opt.perturb():
            with opt.second_pass():
                (model(mine(x)) - mine(y)).square().mean().backward()
        opt.step()


def whole(t: Tensor) -> Tensor:
    """All elements, on every rank."""
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t.clone()


def weights(model: nn.Module) -> list[Tensor]:
    return [whole(p) for p in model.parameters()]


def result(opt: RST, model: nn.Module) -> dict[str, Any]:
    return {"weights": weights(model), "sam_steps": opt.sam_steps, "steps": opt.steps, "norm": opt.last_grad_norm}


def alone(recipe: dict[str, Any], steps: int) -> dict[str, Any]:
    """The training on one process."""
    model = make_model()
    opt = RST(model.parameters(), **recipe)
    steps_of(opt, model, batches(steps))
    return result(opt, model)


def on_ranks(how: str, recipe: dict[str, Any], steps: int, plans: bool = True) -> dict[str, Any]:
    """The same on this rank."""
    import paths

    model, mine = sharded_model(how)
    opt = RST(model.parameters(), **recipe)
    with nullcontext() if plans else paths.no_plans():
        steps_of(opt, model, batches(steps), mine)
    return {**result(opt, model), "planned": opt._plans._plan is not None}


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True) if x.numel())
