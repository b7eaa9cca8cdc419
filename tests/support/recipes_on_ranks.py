"""Runs a script of the documentation on a rank, as torchrun would start it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded import whole

_alive: list[Any] = []  # gloo may wait for a thread of its own where a model, and with it the group, is freed


def run(script: str, name: str) -> tuple[list[torch.Tensor], int]:
    """The weights that it ends with, of what it calls model, and the steps of its opt."""
    dist.destroy_process_group()
    names: dict[str, Any] = {"__name__": "__main__"}
    _alive.append(names)
    ended: list[tuple[list[torch.Tensor], int]] = []
    destroy = dist.destroy_process_group

    def end() -> None:
        """While shards can still be gathered."""
        ended.append(([whole(p) for p in names["model"].parameters()], names["opt"].steps))
        destroy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", end)
        exec(compile(script, name, "exec"), names)
    return ended[0]
