"""What the optimizer keeps on each device that holds parameters, and what ties the devices together: one norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rst_fused import reference
from rst_fused._backends import Backend, backend_for
from rst_fused._schemas import STATS


@dataclass
class Place:
    """One device: the backend that serves it, and the two tensors that its ops share (see rst_fused._schemas)."""

    device: torch.device
    backend: Backend
    stats: Tensor  # float64
    rng: Tensor  # int64 [seed, step]
    on_gpu: bool = field(init=False)  # asked at every step

    def __post_init__(self) -> None:
        self.on_gpu = self.device.type == "cuda"

    @classmethod
    def on(cls, device: torch.device, requested: str, seed: int) -> Place:
        backend = backend_for(requested, device)
        stats = torch.zeros(len(STATS), dtype=torch.float64, device=device)
        stats[0] = math.nan
        # To torch.compile parameters and state of an optimizer stay where they are; the stats must be named, or
        # mode="reduce-overhead" makes no CUDA graph of a perturbation, which writes them.
        torch._dynamo.mark_static_address(stats)
        return cls(device, backend, stats, torch.tensor([seed, 0], dtype=torch.int64, device=device))


def device_of(p: Tensor) -> torch.device:
    return p.device


def settle(
    places: Sequence[Place], param_groups: Sequence[dict[str, Any]], requested: str, seed: int
) -> list[Place]:
    """A place on every device that holds parameters, in their order: those there are, and new ones."""
    taken = {place.device: place for place in places}
    devices = dict.fromkeys(device_of(p) for group in param_groups for p in group["params"]) or [torch.device("cpu")]
    return [taken.get(device) or Place.on(device, requested, seed) for device in devices]


@torch.no_grad()
def share_norm(places: Sequence[Place]) -> None:
    """After a grad_norm on every place: each gets the norm over all of them. Copies a number between devices.

    ||g|| = sqrt(sum of ||g_d||^2 over the devices d); a norm that is not finite anywhere is so everywhere.
    """
    home = places[0].stats
    norms = torch.stack([place.stats[0].to(home.device) for place in places])
    home[3] -= home[2]  # this norm counts once, below, and not as that of one device
    reference.leave_norm(home, torch.linalg.vector_norm(norms))
    for place in places[1:]:
        place.stats.copy_(home)
