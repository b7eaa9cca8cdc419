"""Uneven data: torch.distributed.algorithms.Join over [model, optimizer] (its Joinable, without its base class).

A rank that has no data left follows the collectives of the model, and takes no steps. At the end it takes over step
count and state of a rank that took all steps: else it would draw other ones than that from then on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def group_of(opt: Any) -> Any:
    given = opt.process_group
    return dist.group.WORLD if given is None or isinstance(given, str) else given


class Hook:
    """Where a rank has no data, Join calls main_hook for every forward of the others; on all at the end post_hook."""

    def __init__(self, opt: Any) -> None:
        self.opt = opt

    def main_hook(self) -> None:
        if self.opt._step_state.agreement is None:
            self.opt._compare_without_data()

    def post_hook(self, is_last_joiner: bool) -> None:
        opt, group = self.opt, group_of(self.opt)
        seen = torch.tensor([opt.steps, -opt.steps], device=opt.join_device)
        dist.all_reduce(seen, dist.ReduceOp.MAX, group=group)
        most, least = int(seen[0]), -int(seen[1])
        if most == least:
            return
        me = dist.get_rank(group)
        source = torch.tensor(me if opt.steps == most else dist.get_world_size(group), device=opt.join_device)
        dist.all_reduce(source, dist.ReduceOp.MIN, group=group)
        box = [_on_cpu(opt.state_dict()) if me == int(source) else None]
        dist.broadcast_object_list(box, dist.get_global_rank(group, int(source)), group=group, device=opt.join_device)
        opt.load_state_dict(box[0])


def _on_cpu(state: Any) -> Any:
    """Tensors in dictionaries: they are unpickled where they were."""
    if isinstance(state, torch.Tensor):
        return state.cpu()
    return {key: _on_cpu(value) for key, value in state.items()} if isinstance(state, dict) else state
