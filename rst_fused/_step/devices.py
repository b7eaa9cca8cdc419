"""What the optimizer keeps on each device that holds parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rst_fused._backends import Backend, backend_for
from rst_fused._schemas import STATS


@dataclass
class DeviceState:
    """The backend that serves one device, and the two tensors that its ops share (see rst_fused._schemas)."""

    device: torch.device
    backend: Backend
    stats: Tensor  # float64
    rng: Tensor  # int64 [seed, step]
    update_stats: Tensor  # as stats, of the gradient that an update applies, where it is clipped
    part_stats: Tensor = field(init=False)  # a row of stats for each part of a norm that no single call of an op finds

    def make_part_stats(self, parts: int) -> None:
        self.part_stats = _stats(self.device, parts)

    @classmethod
    def on(cls, device: torch.device, requested: str, seed: int) -> DeviceState:
        backend = backend_for(requested, device)
        stats, update_stats = _stats(device), _stats(device)
        stats[0] = update_stats[0] = math.nan
        state = cls(device, backend, stats, torch.tensor([seed, 0], dtype=torch.int64, device=device), update_stats)
        state.make_part_stats(1)
        return state


def _stats(device: torch.device, *rows: int) -> Tensor:
    stats = torch.zeros(*rows, len(STATS), dtype=torch.float64, device=device)
    # To torch.compile parameters and state of an optimizer stay where they are; the stats must be named, or
    # mode="reduce-overhead" makes no CUDA graph of a perturbation, which writes them.
    torch._dynamo.mark_static_address(stats)
    return stats


def device_of(p: Tensor) -> torch.device:
    return p.device


def device_states_for(
    known: Sequence[DeviceState], param_groups: Sequence[dict[str, Any]], requested: str, seed: int
) -> list[DeviceState]:
    """One for every device that holds parameters, in their order: those that are known, and new ones."""
    taken = {state.device: state for state in known}
    devices = dict.fromkeys(device_of(p) for group in param_groups for p in group["params"]) or [torch.device("cpu")]
    return [taken.get(device) or DeviceState.on(device, requested, seed) for device in devices]
