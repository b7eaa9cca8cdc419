"""``python -m benchmarks memory``: peak extra memory of a training step, in bytes per parameter.

Each mode runs in a child process. Weights and one set of gradients are the baseline; the peak of the resident
set over three whole steps (gradients, perturbation, new gradients, update) is measured against it: state,
backups, gradients that are kept, and temporaries count. Linux only (/proc/self).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import record
from .cases import DTYPES, Case, Hyper, many
from .peers import PEERS, Unavailable

TENSORS, SIZE = 32, 1 << 20
STEPS = 3
# Every tensor gets pages of its own, which go back to the system when it is freed.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@dataclass(frozen=True)
class Mode:
    """A way to train. ``predicted``: element size -> bytes per parameter; None for the peers."""

    title: str
    options: dict[str, Any]
    predicted: Callable[[int], int] | None
    peer: str | None = None
    dtypes: tuple[str, ...] = ("fp32", "bf16")


SGD, ADAMW = {"base": "sgd", "momentum": 0.9}, {"base": "adamw"}
MODES = {
    "sgd": Mode("base SGD (p = 0)", {**SGD, "schedule": 0.0}, lambda e: e),
    "sam": Mode("SAM, SGD", {**SGD, "schedule": 1.0}, lambda e: 2 * e),
    "rst": Mode("RST(0.5), SGD", {**SGD, "schedule": 0.5}, lambda e: 2 * e),
    "grst": Mode("G-RST(0.5, match), SGD", {**SGD, "schedule": 0.5, "gamma": "match"}, lambda e: 3 * e),
    "adamw": Mode("base AdamW (p = 0)", {**ADAMW, "schedule": 0.0}, lambda e: 2 * e),
    "sam-adamw": Mode("SAM, AdamW", {**ADAMW, "schedule": 1.0}, lambda e: 3 * e),
    "sgd-master": Mode("base SGD (p = 0), fp32 masters", {**SGD, "schedule": 0.0, "master_weights": True},
                       lambda e: 8, dtypes=("bf16",)),
    "sam-master": Mode("SAM, SGD, fp32 masters", {**SGD, "schedule": 1.0, "master_weights": True},
                       lambda e: 8, dtypes=("bf16",)),
    "sam-adamw-master": Mode("SAM, AdamW, fp32 masters", {**ADAMW, "schedule": 1.0, "master_weights": True},
                             lambda e: 12, dtypes=("bf16",)),
    **{name: Mode(PEERS[name].title, {}, None, peer=name)  # type: ignore[attr-defined]
       for name in ("usual", "foreach", "pytorch_optimizer")},
}  # fmt: skip


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}: this measurement needs Linux")
    return int(found[1]) * 1024


def _set_grads(params: list[torch.nn.Parameter]) -> None:
    for p in params:
        p.grad = None
    for p in params:
        p.grad = torch.full_like(p, 1e-3)


def _steps(mode: Mode, params: list[torch.nn.Parameter], steps: int) -> None:
    """Whole training steps without a model: gradients appear where a backward pass would make them."""
    if mode.peer is not None:
        peer = PEERS[mode.peer](params, Hyper())
        perturb: Callable[[], object] = peer.perturb
        update: Callable[[], object] = peer.update
    else:
        from rst_fused import RST

        optimizer = RST(params, lr=1e-3, weight_decay=5e-4, seed=0, **mode.options)
        perturb, update = optimizer.perturb, optimizer.step
    for _ in range(steps):
        _set_grads(params)
        if perturb() is not False:
            _set_grads(params)
        update()


def measure_here(mode: Mode, dtype: torch.dtype, case: Case) -> float:
    """Peak extra bytes per parameter of ``mode`` in this process."""
    tiny = [torch.nn.Parameter(torch.ones(64, dtype=dtype)) for _ in range(4)]
    _steps(mode, tiny, STEPS)  # loads the code and its thread pool before the baseline
    params = [torch.nn.Parameter(torch.full(shape, 0.5, dtype=dtype)) for shape in case.shapes]
    _set_grads(params)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    baseline = _status("VmRSS")
    _steps(mode, params, STEPS)
    return (_status("VmHWM") - baseline) / case.elements


def measure(name: str, dtype: str, tensors: int = TENSORS, size: int = SIZE) -> float | None:
    """The same in a child process; None where the mode cannot run here."""
    command = [sys.executable, "-m", "benchmarks.memory", name, dtype, str(tensors), str(size)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **ALLOCATOR},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring {name} in {dtype} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", nargs="+", choices=list(MODES), default=list(MODES), metavar="MODE")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), metavar="DTYPE")


def run(args: argparse.Namespace) -> int:
    env = record.environment(record.cpu_device())
    out = Path(args.out) if args.out else record.path_for(env, "memory")
    record.refuse_overwrite(out, args.force)
    data: dict[str, Any] = {**env, "command": "memory", "memory": [], "notes": []}
    for name in args.mode:
        mode = MODES[name]
        for dtype in (d for d in args.dtype if d in mode.dtypes):
            measured = measure(name, dtype)
            if measured is None:
                data["notes"].append(f"{name}, {dtype}: not available here")
                continue
            predicted = None if mode.predicted is None else mode.predicted(DTYPES[dtype].itemsize)
            data["memory"].append({"mode": mode.title, "dtype": dtype, "measured": measured, "predicted": predicted})
    data["notes"].append(f"{TENSORS} tensors of {SIZE:,} elements; {STEPS} steps; weights and gradients not counted")
    record.write(out, data, args.force)
    print(record.markdown(data))
    print(f"written to {out}")
    return 0


def _child(arguments: list[str]) -> None:
    name, dtype, tensors, size = arguments
    try:
        print(json.dumps(measure_here(MODES[name], DTYPES[dtype], many(int(tensors), int(size)))))
    except (Unavailable, ImportError):
        print(json.dumps(None))


if __name__ == "__main__":
    _child(sys.argv[1:])
