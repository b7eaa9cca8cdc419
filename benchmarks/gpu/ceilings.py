"""The stage ``ceilings``: how fast this device copies and reads memory, which is what kernels are measured by."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from . import environment, race, stage
from .device import Device
from .streams import COPIES, Call, Streams

FULL_BYTES, REHEARSAL_BYTES = 4 << 30, 4 << 12
FULL_PLAN, REHEARSAL_PLAN = race.Plan(9, 3, 1), race.Plan(2, 1, 1, warmup=1)


def fastest_read(device: Device, streams: Streams, plan: race.Plan = REHEARSAL_PLAN) -> Call:
    reads = streams.reads()
    times = race.race(device, {"read": race.Entrant(reads)}, plan)["read"]
    return reads[min(reads, key=lambda name: statistics.median(times[name]))]


def bandwidths(times: Mapping[str, list[float]], size: int) -> list[dict[str, Any]]:
    """Of the copy and of each way to read: bytes per second, by the median and by the best time."""
    found = []
    for what, seconds in times.items():
        moved = size * (COPIES if what == "copy" else 1)
        found.append({
            "what": what, "bytes": moved, "median": moved / statistics.median(seconds), "best": moved / min(seconds),
        })  # fmt: skip
    return found


def measure(part: stage.Part, size: int, plan: race.Plan) -> None:
    device = part.device
    streams = Streams(size, device)
    calls = {"copy": streams.copy, **{f"read: {name}": call for name, call in streams.reads().items()}}
    times = race.race(device, {"all": race.Entrant(calls)}, plan)["all"]
    part.data["bandwidths"] = bandwidths(times, streams.size)
    part.data["clocks"] = environment.clocks() if device.name == "cuda" else {}


def main() -> int:
    args = stage.parser(__doc__).parse_args()
    part = stage.start(args, backends=False)  # nothing is built yet
    size, plan = (REHEARSAL_BYTES, REHEARSAL_PLAN) if args.device == "cpu" else (FULL_BYTES, FULL_PLAN)
    part.attempt("bandwidths", partial(measure, part, size, plan))
    return part.status()


if __name__ == "__main__":
    sys.exit(main())
