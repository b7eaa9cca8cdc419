"""One gradient norm over all devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rst_fused import reference
from rst_fused._step.devices import DeviceState


@torch.no_grad()
def combine_norms(devices: Sequence[DeviceState]) -> None:
    """After a grad_norm on every device: each gets the norm over all of them. Copies a number between devices.

    ||g|| = sqrt(sum of ||g_d||^2 over the devices d); a norm that is not finite anywhere is so everywhere.
    """
    home = devices[0].stats
    norms = torch.stack([device.stats[0].to(home.device) for device in devices])
    home[3] -= home[2]  # this norm counts once, below, and not as that of one device
    reference.finish_norm(home, torch.linalg.vector_norm(norms))
    for device in devices[1:]:
        device.stats.copy_(home)
