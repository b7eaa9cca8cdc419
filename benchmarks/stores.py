"""``python -m benchmarks stores``: SAM steps that write past the caches, and that do not, by the size of the data.

What is only written (a backup, the weights of an update) may bypass the caches by non-temporal stores. Each size is
measured with data that the caches have kept from the step before, as far as they can, and from empty caches; a training
loop lies between the two. ``ours`` decides by the size of the data, as it does by default.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from . import record
from .cases import DTYPES, Hyper, many
from .peers import WEIGHTS, Competitor, Ours
from .runner import OtherData, Plan, Race, entry

NEVER, ALWAYS, BY_SIZE = 2**63 - 1, 0, -1  # bytes of data beyond which stores are non-temporal
CHOICES = {"plain stores": NEVER, "non-temporal stores": ALWAYS, "ours": BY_SIZE}
MEGABYTES = (1, 2, 4, 16, 64)
TENSOR = 1 << 14  # elements


class WithStores(Ours):
    """rst_fused with another threshold for non-temporal stores."""

    def __init__(self, params: list[torch.nn.Parameter], hyper: Hyper, threshold: int) -> None:
        super().__init__(params, hyper)
        from rst_fused import _backends

        self.host, self.threshold = _backends.plan_extension(), threshold

    def _choose(self) -> None:
        self.host.set_non_temporal_threshold(self.threshold)

    def perturb(self) -> None:
        self._choose()
        super().perturb()

    def update(self) -> None:
        self._choose()
        super().update()

    def base(self) -> None:
        self._choose()
        super().base()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), metavar="DTYPE")
    sizes = f"of the weights, in 2^20 bytes; default: {' '.join(map(str, MEGABYTES))}"
    parser.add_argument("--megabytes", nargs="+", type=int, default=list(MEGABYTES), metavar="N", help=sizes)
    parser.add_argument("--rounds", type=int, default=7)


def measure(megabytes: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """The races of one size: what the caches have kept, and from empty caches."""
    case = many(max(1, (megabytes << 20) // TENSOR // DTYPES[dtype].itemsize), TENSOR)
    competitors: dict[str, Competitor] = {
        name: WithStores([torch.nn.Parameter(t) for t in case.tensors(DTYPES[dtype], **WEIGHTS)], Hyper(), threshold)
        for name, threshold in CHOICES.items()
    }
    grads = [case.tensors(DTYPES[dtype], seed=1, scale=1e-3)]
    races = []
    for label, before in (("kept in the caches", lambda: None), ("from empty caches", OtherData())):
        race = Race(competitors, grads, before=before, held=True)
        race.run(Plan(rounds, calls=20 if label.startswith("kept") else 3, reduce=statistics.median))
        races.append(entry(race, case, f"{dtype}, {megabytes} MiB of weights, {label}"))
    return races


def run(args: argparse.Namespace) -> int:
    out, data = record.begin("stores", args.out, args.force)
    for dtype in args.dtype:
        for megabytes in args.megabytes:
            data["races"] += measure(megabytes, dtype, args.rounds)
            record.write(out, data, force=True)
            print(f"{megabytes} MiB, {dtype}: done", flush=True)
    return record.show(out, data)
