"""Runs a script of the documentation on a rank, as torchrun would start it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_alive: list[Any] = []  # gloo may wait for a thread of its own where a model, and with it the group, is freed


def run(script: str, name: str) -> tuple[list[torch.Tensor], int]:
    """The weights that it ends with, of what it calls model, and the steps of its opt."""
    dist.destroy_process_group()
    names: dict[str, Any] = {"__name__": "__main__"}
    _alive.append(names)
    exec(compile(script, name, "exec"), names)
    weights = [p.detach().clone() for p in names["model"].parameters()]
    return [getattr(w, "full_tensor", lambda w=w: w)() for w in weights], names["opt"].steps
