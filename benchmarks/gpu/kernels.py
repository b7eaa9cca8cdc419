"""The stage ``kernels``: the time of every kernel of a SAM step, beside that of a copy and of a read."""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..cases import Case, Hyper, gpt2
from ..peers import Competitor, make
from . import environment, modes, predictions, race, stage
from .ceilings import fastest_read
from .device import Device
from .modes import Mode
from .streams import COPIES, Call, Streams
from .traffic import kernel_bytes

HYPER = Hyper()
# What is in the name of a kernel, whichever backend it is of (Triton's norm may be two), and in those of torch's copies
# and reductions.
NAMES = {"norm": "grad_norm|finish", "perturb": "perturb", "sgd": "sgd_step", "adamw": "adam_step"}
COPY, READ = "Memcpy|copy|Copy", "reduce"
HOLD = 0.02  # seconds of other work before the first call of a trace, in which an idle device raises its clocks
# Rounds in which step, copy and read take turns, and the calls of each in a round, which are in one trace.
PLAN, REHEARSAL_PLAN = (3, 5), (1, 1)
WARMUP = 2  # the first step allocates and fills, the second may prepare what later ones reuse
BASES = ("sgd", "adamw")
Both = tuple[race.Grads, race.Grads]  # gradients of the two halves of a step
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Timed:
    """A SAM step whose kernels are timed."""

    case: Case
    mode: Mode
    base: str


def gpt2_small() -> Case:
    return gpt2("gpt2", "GPT-2 small", 768, 12)


def billion() -> Case:
    return gpt2("1e9", "GPT-2 XL, 30 of its 48 layers", 1600, 30)


def full_size() -> list[Timed]:
    """The most important first: time may run out."""
    main = [Timed(case, mode, base) for case in (gpt2_small(), billion()) for mode in modes.MAIN for base in BASES]
    return [*main, *(Timed(gpt2_small(), mode, base) for mode, base in modes.SPECIAL)]


def brief_size() -> list[Timed]:
    """What tells builds apart."""
    return [Timed(gpt2_small(), mode, "adamw") for mode in modes.MAIN]


def rehearsal_size() -> list[Timed]:
    case = gpt2("gpt2", "GPT-2, shrunk", 16, 1, 101, 8)
    return [Timed(case, mode, base) for mode, base in ((modes.FP32, "sgd"), (modes.MASTERS, "adamw"))]


def labels(case: Case, mode: Mode, base: str) -> dict[str, Any]:
    return {
        "case": case.name, "title": case.title, "mode": mode.name, "base": base, "tensors": len(case.shapes),
        "elements": case.elements,
    }  # fmt: skip


def repeat(device: Device, call: Call, times: int) -> None:
    device.hold(HOLD)
    for _ in range(times):
        call()


def per_call(seconds: Sequence[float], calls: int) -> list[float]:
    """Sums over the launches of each call, which all launch alike."""
    each, rest = divmod(len(seconds), calls)
    if rest:
        raise RuntimeError(f"{len(seconds)} launches in {calls} calls: a trace is incomplete, or calls differ")
    return [sum(seconds[i * each : (i + 1) * each]) for i in range(calls)]


def matching(launches: Mapping[str, Sequence[float]], pattern: str, calls: int) -> list[float]:
    """Of each call the seconds in all launches whose name has the pattern; empty if there is none."""
    found = [per_call(seconds, calls) for name, seconds in launches.items() if re.search(pattern, name)]
    return [sum(of_call) for of_call in zip(*found, strict=True)]


def rows(times: Mapping[str, Sequence[float]], size: int, timed: Timed, device: str) -> list[dict[str, Any]]:
    """Of every kernel its time, and its bandwidth as a fraction of the copy's and, where it only reads, of the read's.

    ``times``: seconds of the kernels, and of "copy" and "read", which moved ``size`` bytes.
    """
    copied, was_read = COPIES * size / statistics.median(times["copy"]), size / statistics.median(times["read"])
    found = []
    for kernel in ("norm", "perturb", timed.base):
        moved = kernel_bytes(kernel, timed.mode) * timed.case.elements
        bandwidth = moved / statistics.median(times[kernel])
        found.append({
            "kernel": kernel, "bytes": moved, "median_s": statistics.median(times[kernel]),
            "best_s": min(times[kernel]), "of_copy": bandwidth / copied,
            "of_read": bandwidth / was_read if kernel == "norm" else None,
            "predicted": predictions.predicted(kernel, timed.mode.name, device),
        })  # fmt: skip
    return found


def seconds_of(
    device: Device, racer: Competitor, both: Both, streams: Streams, base: str, plan: tuple[int, int]
) -> Times:
    """Seconds of every call: of the kernels of a SAM step by their names here, of "copy" and of "read". Empty where
    nothing is launched at all."""
    rounds, calls = plan
    step = partial(race.sam_step, racer, *both)
    turns: dict[str, tuple[Call, dict[str, str]]] = {
        "step": (step, {kernel: NAMES[kernel] for kernel in ("norm", "perturb", base)}),
        "copy": (streams.copy, {"copy": COPY}),
        "read": (fastest_read(device, streams), {"read": READ}),
    }
    times: Times = {}
    for _ in range(rounds):
        for call, patterns in turns.values():
            launches = device.launches(partial(repeat, device, call, calls))
            for what, pattern in patterns.items():
                times.setdefault(what, []).extend(matching(launches, pattern, calls))
    missing = [what for what, seconds in times.items() if not seconds]
    if missing and missing != list(times):
        raise RuntimeError(f"{missing} launched no kernel of that name")
    return {} if missing else times


def measure(part: stage.Part, timed: Timed, backend: str, plan: tuple[int, int]) -> None:
    device, case, mode = part.device, timed.case, timed.mode
    both = mode.both_gradients(device, case)
    racer = make("ours", case, mode.dtype, HYPER, device.name, backend=backend, base=timed.base, **mode.options())
    streams = Streams(mode.dtype.itemsize * case.elements, device)
    streams.copy()
    for _ in range(WARMUP):
        race.sam_step(racer, *both)
    found: dict[str, Any] = {**labels(case, mode, timed.base), "who": backend, "kernels": []}
    times = seconds_of(device, racer, both, streams, timed.base, plan)
    if times:
        found |= {
            "kernels": rows(times, streams.size, timed, part.data["device"]),
            "copy_bytes_per_s": COPIES * streams.size / statistics.median(times["copy"]),
            "read_bytes_per_s": streams.size / statistics.median(times["read"]),
        }
    found["clocks"] = environment.clocks() if device.name == "cuda" else {}
    part.add("kernels", found)


def measure_all(part: stage.Part, sizes: Sequence[Timed], plan: tuple[int, int]) -> None:
    if not part.backends:
        part.error(f"none of the backends {part.device.backends} is available")
    for timed in sizes:
        for backend in part.backends:
            words = f"{timed.case.name}, {timed.mode.name}, {timed.base}, {backend}"
            part.attempt(words, partial(measure, part, timed, backend, plan))


def main() -> int:
    parser = stage.parser(__doc__)
    parser.add_argument("--brief", action="store_true", help="GPT-2 small with AdamW alone")
    args = parser.parse_args()
    part = stage.start(args)
    if args.device == "cpu":
        measure_all(part, rehearsal_size(), REHEARSAL_PLAN)
    else:
        stage.start_profiler(part)
        measure_all(part, brief_size() if args.brief else full_size(), PLAN)
    return part.status()


if __name__ == "__main__":
    sys.exit(main())
