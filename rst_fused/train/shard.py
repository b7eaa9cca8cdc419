"""A model on several processes: as replicas (DistributedDataParallel) or in shards (FSDP2), and whole again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rst_fused.train.batch_norm import share_statistics


def sharded(model: nn.Module, how: str, processes: int, device: torch.device) -> nn.Module:
    """The model for ``--shard how``, ddp or fsdp. Its gradients are means over the processes.

    BatchNorm takes the statistics of the whole batch.
    """
    share_statistics(model)
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (processes,))
    for layer in model.get_submodule("features").children():
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh)  # gathered when it is its turn
    fully_shard(model, mesh=mesh)
    return model


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the model before it was sharded. Every process has to ask, and is given all of it."""
    module = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in module.state_dict().items()}
