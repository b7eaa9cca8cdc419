"""Plain copies and reads of memory: what the traffic of a kernel is compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from .device import Device

COPIES = 2  # a copy reads and writes
FLOAT_BYTES = 4
Call = Callable[[], object]


class Streams:
    """``size`` bytes of random numbers, to be copied or only read."""

    def __init__(self, size: int, device: Device) -> None:
        self.source = torch.randn(-(-size // FLOAT_BYTES), device=device.name)
        self.target: torch.Tensor | None = None
        self.size = FLOAT_BYTES * self.source.numel()

    def copy(self) -> None:
        if self.target is None:
            self.target = torch.empty_like(self.source)
        self.target.copy_(self.source)

    def reads(self) -> dict[str, Call]:
        """Several ways, of which the fastest is the ceiling: none is known to be best on every device."""
        return {
            "sum": partial(torch.sum, self.source),
            "max": partial(torch.amax, self.source),
            "norm": partial(torch.linalg.vector_norm, self.source),
        }
