"""The processes that torchrun starts for one command: how they meet, which part of a batch each has, what they add."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; by default it is alone."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Which of ``count`` samples are those of this process. The numbers of two processes differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def add(self, value: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, on each of them, which waits until all have come here."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def check_launch(shard: str | None) -> None:
    """Raises ValueError where ``--shard`` is given and torchrun has started nothing, or the other way round.

    Nobody is waited for: where the environment is a left-over, there are no other processes.
    """
    missing = [name for name in SET_BY_TORCHRUN if name not in os.environ]
    if shard is None:
        size = 1 if missing else int(os.environ["WORLD_SIZE"])
        if size > 1:
            raise ValueError(
                f"no --shard, but WORLD_SIZE is {size}: each of {size} processes would train the same run; "
                "add --shard ddp or --shard fsdp, or start it without torchrun"
            )
    elif missing:
        raise ValueError(
            f"--shard {shard}: {', '.join(missing)} not set, expected processes that torchrun has started: "
            f"torchrun --nproc-per-node N -m rst_fused train --shard {shard} ...; for one process leave --shard out"
        )
    elif not dist.is_available():
        raise ValueError(f"--shard {shard}: this torch is built without torch.distributed; leave --shard out")


@contextmanager
def join(shard: str | None, device: str) -> Iterator[Processes]:
    """The processes that torchrun started, in a process group that ends with the block; without --shard this one alone.

    An exception leaves the group as it is: the others may wait for this process, which ends now, so that torchrun ends
    them.

    A thread of gloo frees the tensors of a collective some time after it, and aborts the process if the interpreter has
    ended by then. So the last collective has none, and nothing here holds the group, with which its threads end.
    """
    if shard is None:
        yield Processes()
        return
    import torch.distributed.nn  # noqa: F401  before there is a group: one of that moment is a default of its functions

    local = int(os.environ["LOCAL_RANK"])
    cuda = device.partition(":")[0] == "cuda" and torch.cuda.is_available()
    if cuda and local < torch.cuda.device_count():
        torch.cuda.set_device(local)  # the one that "cuda" names from now on
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    processes = Processes(dist.get_rank(), dist.get_world_size())
    yield processes
    dist.barrier()  # torchrun may end all once one has ended, so none does before the first has printed
    gc.collect()  # a model of DDP holds the group, and is part of a reference cycle
    dist.destroy_process_group()


def check_device(shard: str, device: str) -> None:
    """Raises ValueError unless ``device`` leaves a device to every process."""
    wanted = torch.device(device)
    if wanted.type != "cuda":
        return
    if wanted.index is not None:
        raise ValueError(
            f"--device {device} with --shard {shard}: expected cuda, of which each process takes the device of its "
            "LOCAL_RANK; CUDA_VISIBLE_DEVICES chooses among them"
        )
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise ValueError(
            f"--device {device} with --shard {shard}: the process of LOCAL_RANK {local} has no device of its own, "
            f"torch sees {count}; start no more with --nproc-per-node {count}"
        )
