"""How a step is measured: the number formats, the form of SAM, and what its gradients are like in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..cases import Case
from .device import Device

ALIGNMENT = 16  # bytes: the widest access of a kernel
ETA = 0.01  # of ASAM


@dataclass(frozen=True)
class Mode:
    """``offset``: bytes from a multiple of 16 to each gradient, as in the views of a bucket of DDP.
    ``zero_rows``: every other row of a gradient is zero, as rows of an embedding are whose words did not occur."""

    name: str
    dtype: torch.dtype
    masters: bool | str = False
    adaptive: bool = False
    gamma: float = 1.0
    offset: int = 0
    zero_rows: bool = False

    @property
    def mixing(self) -> bool:
        return self.gamma != 1.0

    @property
    def is_plain_sam(self) -> bool:
        """Whether SAM of other packages does the same."""
        return not (self.masters or self.adaptive or self.mixing)

    def options(self) -> dict[str, Any]:
        """Those of RST."""
        found: dict[str, Any] = {"master_weights": self.masters} if self.masters else {}
        found |= {"adaptive": True, "eta": ETA} if self.adaptive else {}
        return found | ({"gamma": self.gamma} if self.mixing else {})

    def gradients(self, device: Device, case: Case, seed: int = 1) -> list[torch.Tensor]:
        made = case.tensors(self.dtype, seed=seed, scale=1e-3, device=device.name)
        if self.zero_rows:
            for g in made:
                g[1::2] = 0
        return [moved(g, self.offset) for g in made] if self.offset else made

    def both_gradients(self, device: Device, case: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """For the two halves of a step. They are the same tensors, except where the second half reads both: from one
        place in memory that would cost less than it does in training."""
        first = self.gradients(device, case)
        return first, self.gradients(device, case, seed=2) if self.mixing else first


def moved(t: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that starts ``offset`` bytes after a multiple of 16."""
    flat = torch.empty(t.numel() + 2 * ALIGNMENT // t.itemsize, dtype=t.dtype, device=t.device)
    skip = (offset - flat.data_ptr()) % ALIGNMENT // t.itemsize
    return flat[skip : skip + t.numel()].view_as(t).copy_(t)


FP32, BF16 = Mode("fp32", torch.float32), Mode("bf16", torch.bfloat16)
MASTERS = Mode("bf16, fp32 masters", torch.bfloat16, masters=True)
MAIN = (FP32, BF16, MASTERS)  # those with goals
REMAINDERS = Mode("bf16, remainders", torch.bfloat16, masters="remainder")
ASAM = Mode("fp32, ASAM", torch.float32, adaptive=True)
GRST = Mode("fp32, G-RST", torch.float32, gamma=2.0)
OFF_BY_4 = Mode("fp32, gradients off by 4 bytes", torch.float32, offset=4)
OFF_BY_8 = Mode("bf16, gradients off by 8 bytes", torch.bfloat16, offset=8)
ZERO_ROWS = Mode("bf16, half of the gradient rows zero", torch.bfloat16, zero_rows=True)
# Those that are measured with one base optimizer only: which kernels differ from the main modes.
SPECIAL = (
    (OFF_BY_4, "sgd"), (OFF_BY_8, "sgd"), (ZERO_ROWS, "adamw"), (ASAM, "sgd"), (GRST, "sgd"), (REMAINDERS, "adamw"),
)  # fmt: skip
