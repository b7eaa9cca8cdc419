"""One gradient norm over all devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rst_fused._schemas import STATS
from rst_fused._step.devices import DeviceState


def stats_for(devices: Sequence[DeviceState], device: DeviceState) -> Tensor:
    """Where the norm over one of the devices goes: of several, into stats of its own, for combine_norms."""
    return device.stats if len(devices) == 1 else torch.zeros_like(device.stats)


@torch.no_grad()
def combine_norms(devices: Sequence[DeviceState], parts: Sequence[Tensor]) -> None:
    """Each device gets the norm over all of them, from the stats of each. Copies a number between devices.

    ||g|| = sqrt(sum of ||g_d||^2 over the devices d); a norm that is not finite anywhere is so everywhere.
    """
    home, squared_norm = devices[0], STATS.index("squared_norm")
    squares = torch.stack([part[squared_norm].to(home.device) for part in parts])
    home.backend.ops.finish_norm(home.stats, squares)
    for device in devices[1:]:
        device.stats.copy_(home.stats)
