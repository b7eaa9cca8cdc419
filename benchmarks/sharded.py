"""``python -m benchmarks.sharded``: host time of steps over DTensors, and their collectives, on several processes.

Tensors are too small to cost anything but calls. Optimizers take turns, each after a barrier, with the same gradients;
beside this package the foreach step of torch.optim (a fused one takes no DTensors). Collectives: those within the
calls of the optimizer, per step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rst_fused import RST
from rst_fused.train import processes

from .record import cpu_device, table

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
}
MESHES: dict[str, tuple[tuple[int, ...], list[Any]]] = {  # by number of processes and name: shape and placements
    "FSDP2": ((-1,), [Shard(0)]),
    "HSDP": ((2, -1), [Replicate(), Shard(0)]),
    "FSDP2 + TP": ((2, -1), [Shard(0), Shard(1)]),
}


class Collectives(TorchDispatchMode):
    """Counts calls of torch.distributed, and the bytes that this rank puts in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            given = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.calls += 1
            self.bytes += sum(t.numel() * t.element_size() for t in given if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds that a call took, and those in which its thread worked: in the others it waited for other ranks."""
    start, worked = time.perf_counter(), time.thread_time()
    call()
    return time.perf_counter() - start, time.thread_time() - worked


def measure(base: str, mesh_name: str, count: int, rounds: int) -> dict[str, Any]:
    """Medians over the rounds on this rank, in seconds; calls and bytes of one step of each kind."""
    shape, placements = MESHES[mesh_name]
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,) if len(shape) == 1 else (2, size // 2))

    def tensors() -> list[Any]:
        return [distribute_tensor(torch.randn(16, 16), mesh, placements) for _ in range(count)]

    params = [torch.nn.Parameter(t) for t in tensors()]
    grads = tensors()
    kind, hyper = BASES[base]
    base_step, sam_step = (RST(params, base, schedule=p, **hyper) for p in (0.0, 1.0))
    theirs = kind(params, foreach=True, **hyper)

    def attach() -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    def ours(opt: RST, run: Callable[[Callable[[], object]], Any]) -> list[Any]:
        """run(perturb) and run(step), each with gradients in place."""
        attach()

        done = [run(opt.perturb)]
        attach()
        return [*done, run(opt.step)]

    times: dict[str, list[tuple[float, float]]] = {"base step": [], "SAM step": [], "torch.optim, foreach": []}
    for _ in range(rounds):
        for name, opt in (("base step", base_step), ("SAM step", sam_step)):
            dist.barrier()
            (a, b), (c, d) = ours(opt, _timed)
            times[name].append((a + c, b + d))
        attach()
        dist.barrier()
        times["torch.optim, foreach"].append(_timed(theirs.step))

    def counted(opt: RST) -> tuple[int, int]:
        counter = Collectives()

        def run(call: Callable[[], object]) -> None:
            with counter:
                call()

        ours(opt, run)
        return counter.calls, counter.bytes

    return {
        "planned": base_step._plans._plan is not None and sam_step._plans._plan is not None,
        "seconds": {
            name: [statistics.median(column) for column in zip(*values[rounds // 4 :], strict=True)]
            for name, values in times.items()
        },
        "collectives": {"base step": counted(base_step), "SAM step": counted(sam_step)},
    }


def work(args: argparse.Namespace) -> None:
    """On one rank; the first one prints."""
    torch.set_num_threads(1)
    rows = []
    with processes.join("fsdp", "cpu"):
        for base in BASES:
            for name in MESHES:
                if name != "FSDP2" and dist.get_world_size() < 4:
                    continue
                found = measure(base, name, args.count, args.rounds)
                seconds = found["seconds"]
                torch_s, torch_work = seconds["torch.optim, foreach"]
                for step in ("base step", "SAM step"):
                    calls, size = found["collectives"][step]
                    took, worked = seconds[step]
                    rows.append([
                        base, name, step, f"{took * 1e6:.0f}", f"{worked * 1e6:.0f}",
                        f"{torch_s * 1e6:.0f}", f"{torch_work * 1e6:.0f}", f"{took / torch_s:.2f}",
                        f"{worked / torch_work:.2f}", str(calls), str(size), "yes" if found["planned"] else "no",
                    ])  # fmt: skip
        if dist.get_rank() == 0:
            print(
                f"{args.count} DTensors on {dist.get_world_size()} processes, {cpu_device()}, torch {torch.__version__}"
            )
            head = [
                "base",
                "mesh",
                "step",
                "us",
                "working",
                "torch, us",
                "working",
                "ratio",
                "working",
                "collectives",
                "bytes",
                "plan",
            ]
            print(table(head, rows))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=__doc__)
    parser.add_argument("--processes", type=int, default=2, help="default: 2; from 4 on, meshes of two dimensions too")
    parser.add_argument("--count", type=int, default=150, help="parameters; default: 150")
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    if "RANK" in os.environ:
        work(args)
        return 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    return subprocess.call(
        [*launch, "-m", "benchmarks.sharded", *sys.argv[1:]], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


if __name__ == "__main__":
    sys.exit(main())
