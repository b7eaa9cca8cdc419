"""A mixture of experts: the experts on a mesh of their own, the layers around them on one of all ranks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from sharded import BATCH, CLASSES, FEATURES, HIDDEN, batches, result, steps_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from rst_fused import RST

EXPERTS = 4


class Experts(nn.Module):
    """Each sample goes through all experts, weighted. Of those the ranks of a mesh have a part each, for the samples of
    all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) / HIDDEN**0.5)
        self.mesh: DeviceMesh | None = None

    def shard(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.weight = nn.Parameter(distribute_tensor(self.weight.detach(), mesh, [Shard(0)]))

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        if self.mesh is None:
            return _mixed(x, gates, self.weight)
        x, gates = (
            DTensor.from_local(t, self.mesh, [Shard(0)])
            .redistribute(placements=[Replicate()])
            .to_local(grad_placements=[Partial()])
            for t in (x, gates)
        )
        mine = gates.chunk(self.mesh.size(), 1)[self.mesh.get_local_rank()]
        weight = self.weight.to_local()
        # A sum over the samples of these ranks, of which FSDP2 takes the mean with those of other ranks.
        weight.register_hook(lambda grad: grad / self.mesh.size())
        mixed = _mixed(x, mine, weight)
        return DTensor.from_local(mixed, self.mesh, [Partial()]).redistribute(placements=[Shard(0)]).to_local()


def _mixed(x: Tensor, gates: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("be,beh->bh", gates, torch.einsum("bi,eih->beh", x, weight).tanh())


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.gate, self.head = (
            nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, EXPERTS), nn.Linear(HIDDEN, CLASSES)
        )  # fmt: skip
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).tanh()
        return self.head(h + self.experts(h, self.gate(h).softmax(1)))


def alone(recipe: dict[str, Any], steps: int) -> dict[str, Any]:
    model = Mixture()
    opt = RST(model.parameters(), **recipe)
    steps_of(opt, model, batches(steps))
    return result(opt, model)


def on_ranks(recipe: dict[str, Any], steps: int, plans: bool = True) -> dict[str, Any]:
    """On four ranks, each with a quarter of every batch: half of the experts each, and FSDP2 for each half."""
    import paths

    model, everyone = Mixture(), init_device_mesh("cpu", (4,))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    model.experts.shard(mesh["ep"])
    fully_shard(model.experts, mesh=mesh["dp"])
    for layer in (model.embed, model.gate, model.head):
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
    opt = RST(model.parameters(), **recipe)
    mine = slice(everyone.get_local_rank() * BATCH // 4, (everyone.get_local_rank() + 1) * BATCH // 4)
    with nullcontext() if plans else paths.no_plans():
        steps_of(opt, model, batches(steps), lambda whole: whole[mine])
    return {**result(opt, model), "planned": opt._plans._plan is not None}
