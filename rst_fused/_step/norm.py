"""One gradient norm over all devices, and over all ranks that hold a part of a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rst_fused._schemas import STATS
from rst_fused._step.base import StepOptimizer
from rst_fused._step.devices import DeviceState
from rst_fused._step.sharding import locals_of


class Part(NamedTuple):
    """What one call of grad_norm takes: tensors on one device that are sharded over the same ranks."""

    device: DeviceState
    number: int  # see Sharding.part_of
    grads: list[Tensor]
    params: list[Tensor]  # for ASAM
    masters: list[Tensor]  # likewise, where there are any


@torch.no_grad()
def grad_norm(opt: StepOptimizer, parts: Sequence[Part], stats: Tensor, adaptive: bool) -> None:
    """||g|| over all parts, or ||T g||, in ``stats`` on the first device."""
    finishes = len(opt._devices) > 1 or opt._sharding.adds_up
    for part in parts:
        into = part.device.part_stats[part.number] if finishes else stats
        lists = map(locals_of, (part.grads, part.params, part.masters))
        part.device.backend.ops.grad_norm(into, *lists, adaptive, opt.eta)
    if finishes:
        finish(opt, stats)


@torch.no_grad()
def finish(opt: StepOptimizer, stats: Tensor) -> None:
    """From the norms of all parts to that of the whole: ||g|| = sqrt(sum of their squares), over devices and ranks. One
    that is not finite anywhere is so everywhere. Copies numbers between devices, and waits for none."""
    home, column = opt._devices[0], STATS.index("squared_norm")
    squares = opt._devices[0].part_stats[:, column]
    for device in opt._devices[1:]:
        squares = squares + device.part_stats[:, column].to(home.device)
    home.backend.ops.finish_norm(stats, opt._sharding.add_over_ranks(squares.contiguous()))
