"""The stage ``races``: the optimizer against other implementations and against a plain copy."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..cases import Case, gpt2, many
from ..peers import PEERS, WEIGHTS, Competitor, attach, make
from . import environment, modes, predictions, race, stage, traffic
from .device import Device
from .kernels import BASES, HYPER, billion, gpt2_small, labels
from .models import ResNet, case_of
from .modes import Mode
from .race import Entrant, Grads, Plan

HOST_CASE = many(150, 64)
HOST_STEPS, HOST_WARMUP = 200, 20
GRAPH_WARMUP, GRAPH_REPLAYS = 3, 2
Contest = tuple[Mode, str]  # with which base optimizer
PLAIN: tuple[Contest, ...] = tuple((mode, base) for mode in (modes.FP32, modes.BF16) for base in BASES)
WITH_SGD: tuple[Contest, ...] = ((modes.FP32, "sgd"), (modes.BF16, "sgd"))
ALL: tuple[Contest, ...] = (*PLAIN, *((modes.MASTERS, base) for base in BASES), *modes.SPECIAL)


@dataclass(frozen=True)
class Measured:
    """A case, and how long to measure it."""

    case: Case
    plan: Plan
    contests: tuple[Contest, ...] = WITH_SGD
    compiled: bool = False
    graphs: bool = False


def full_size() -> list[Measured]:
    return [Measured(gpt2_small(), Plan(15, 3, 12), ALL, graphs=True)]


def more_sizes() -> list[Measured]:
    """The most important first: time may run out."""
    with torch.device("meta"):
        resnet = case_of("resnet50", "ResNet-50", ResNet())
    return [
        Measured(gpt2_small(), Plan(15, 3, 12), PLAIN, compiled=True),
        Measured(billion(), Plan(7, 2, 8)),
        Measured(resnet, Plan(15, 5, 20), graphs=True),
        Measured(many(1000, 1000), Plan(9, 3, 10), graphs=True),
    ]


def rehearsal_size(more: bool = False) -> list[Measured]:
    """The same with next to no elements."""
    plan = Plan(3, 2, 2, warmup=1)
    small = gpt2("gpt2", "GPT-2, shrunk", 16, 1, 101, 8)
    if not more:
        return [Measured(small, plan, (*WITH_SGD, (modes.MASTERS, "adamw"), (modes.GRST, "sgd")), graphs=True)]
    with torch.device("meta"):
        resnet = case_of("resnet50", "ResNet-50, shrunk", ResNet(4, (1, 1, 1, 1), 10))
    return [
        Measured(small, plan, PLAIN, compiled=True),
        Measured(gpt2("1e9", "GPT-2 XL, shrunk", 24, 2, 101, 8), plan),
        Measured(resnet, plan, graphs=True),
        Measured(many(20, 50), plan, graphs=True),
    ]


def competitors(
    device: Device, case: Case, mode: Mode, base: str, backends: Sequence[str], peers: Sequence[str]
) -> dict[str, Competitor]:
    """Ours by the names of their backends, then the peers, of which "reference" is ours in plain torch. The usual SAM
    and torch.compile have SGD alone."""
    made = {}
    for name in (*backends, *peers):
        if name in PEERS:
            options: dict[str, Any] = {"base": base} if name == "foreach" else {}
            made[name] = make(name, case, mode.dtype, HYPER, device.name, **options)
        else:
            options = {"backend": name, "base": base, **mode.options()}
            made[name] = make("ours", case, mode.dtype, HYPER, device.name, **options)
    return made


def measure_race(
    part: stage.Part, m: Measured, mode: Mode, base: str, backends: Sequence[str], peers: Sequence[str]
) -> None:
    """One race of our backends, the peers and the copy, and whether all do the same as the first peer."""
    device, case = part.device, m.case
    grads, second = mode.both_gradients(device, case)
    racers = competitors(device, case, mode, base, backends, peers)
    found = labels(case, mode, base)
    found["agreement"] = race.agreement(racers, grads, peers[0], second)
    for a in found["agreement"]:
        if not a["agree"]:
            part.error(f"{case.name}, {mode.name}, {base}: the weights of {a['who']} are wrong: {a}")
    entrants = {name: race.entrant(racer, grads, second) for name, racer in racers.items()}
    size = mode.dtype.itemsize * case.elements
    entrants["copy"] = race.copy_entrant(size, device)
    times = race.race(device, entrants, m.plan)
    must_move = {what: traffic.part_bytes(what, base, mode) * case.elements for what in traffic.PARTS}
    found["standard"] = peers[0]
    found["results"] = race.results(times)
    found["fractions"] = [
        {**f, "predicted": predictions.predicted_part(f["what"], base, mode.name, part.data["device"])}
        for f in race.fractions(times, backends, must_move, size)
    ]
    found["ratios"] = race.ratios(times, backends)
    found["copy_bytes_per_s"] = race.COPIES * size / statistics.median(times["copy"]["copy"])
    found["clocks"] = environment.clocks() if device.name == "cuda" else {}
    part.add("races", found)


def host_seconds(device: Device, competitor: Competitor, grads: Grads, steps: int) -> list[float]:
    """Seconds of the two Python calls of every SAM step. Each step starts with the device idle, and waits for nothing
    in the timed part."""
    seconds = []
    for _ in range(steps):
        total = 0.0
        for call in (competitor.perturb, competitor.update):
            attach(competitor.params, grads)
            start = time.perf_counter()
            call()
            total += time.perf_counter() - start
        device.synchronize()
        seconds.append(total)
    return seconds


def measure_host(part: stage.Part, steps: int) -> None:
    """Host time per SAM step with tensors too small to cost anything else; rounds of all competitors take turns."""
    device = part.device
    grads = modes.FP32.gradients(device, HOST_CASE)
    racers = competitors(device, HOST_CASE, modes.FP32, "sgd", part.backends, ("foreach", "usual"))
    seconds: dict[str, list[float]] = {name: [] for name in racers}
    with race.quiet():
        for racer in racers.values():
            host_seconds(device, racer, grads, HOST_WARMUP)
        for _ in range(10):
            for name, racer in racers.items():
                seconds[name] += host_seconds(device, racer, grads, max(1, steps // 10))
    for name in racers:
        part.add("host", {
            "who": name, "tensors": len(HOST_CASE.shapes), "median_s": statistics.median(seconds[name]),
            "best_s": min(seconds[name]),
        })  # fmt: skip


def count_launches(part: stage.Part, case: Case, mode: Mode, base: str, peers: Sequence[str]) -> None:
    """What one SAM step of each launches on the device."""
    device = part.device
    both = mode.both_gradients(device, case)
    for name in (*part.backends, *peers):
        (racer,) = competitors(device, case, mode, base, (name,), ()).values()
        race.sam_step(racer, *both)  # the first step allocates and fills
        launches = {of: len(times) for of, times in device.launches(partial(race.sam_step, racer, *both)).items()}
        part.add("launches", {
            **labels(case, mode, base), "who": name, "total": sum(launches.values()), "of": launches,
        })  # fmt: skip


def captured(device: Device, competitor: Competitor, grads: Grads) -> tuple[Entrant, int]:
    """Replays of a base step and of a SAM step, and how many updates the warm-up and some first replays did."""
    for _ in range(GRAPH_WARMUP):  # what is allocated once, compiled once or initialized once
        race.base_step(competitor, grads)
        race.sam_step(competitor, grads)
    device.synchronize()
    replays = {
        "base": device.capture(partial(race.base_step, competitor, grads)),
        "step": device.capture(partial(race.sam_step, competitor, grads)),
    }
    for _ in range(GRAPH_REPLAYS):
        for replay in replays.values():
            replay()
    return Entrant(steps=replays), 2 * (GRAPH_WARMUP + GRAPH_REPLAYS)


def eager(competitor: Competitor, grads: Grads) -> Entrant:
    return Entrant(
        steps={"base": partial(race.base_step, competitor, grads), "step": partial(race.sam_step, competitor, grads)}
    )


def measure_graphs(part: stage.Part, m: Measured, mode: Mode) -> None:
    """CUDA graphs of our backends and of the foreach peer, beside the same without graphs. A capture that raises is a
    result, too."""
    device, case = part.device, m.case
    grads = mode.gradients(device, case)
    before = case.tensors(mode.dtype, **WEIGHTS, device=device.name)
    found: dict[str, Any] = {**labels(case, mode, "sgd"), "standard": "foreach", "agreement": [], "failures": {}}
    entrants = {}
    for name, racer in competitors(device, case, mode, "sgd", part.backends, ("foreach",)).items():
        label = f"{name}, graph"
        try:
            entrants[label], updates = captured(device, racer, grads)
        except Exception as error:
            found["failures"][name] = stage.described(error)
            continue
        standard = make("foreach", case, mode.dtype, HYPER, device.name)
        for _ in range(updates):  # with gradients that stay, a SAM step and a base step do the same
            race.base_step(standard, grads)
        same = race.same_weights(label, racer, standard, before)
        found["agreement"].append(same)
        if not same["agree"]:
            part.error(f"{case.name}, {mode.name}: the weights after replays of {name} are wrong: {same}")
    for name, racer in competitors(device, case, mode, "sgd", part.backends, ("foreach",)).items():
        entrants[name] = eager(racer, grads)
    found["results"] = race.results(race.race(device, entrants, m.plan))
    part.add("graphs", found)


def race_all(part: stage.Part, m: Measured, mode: Mode, base: str, peers: Sequence[str]) -> None:
    """All backends in one race; if that fails, each in a race of its own, so that one cannot hide the others."""
    label = f"{m.case.name}, {mode.name}, {base}, {', '.join(peers)}"
    done = part.attempt(label, partial(measure_race, part, m, mode, base, part.backends, peers))
    if not done and len(part.backends) > 1:
        for name in part.backends:
            part.attempt(f"{label}, {name} alone", partial(measure_race, part, m, mode, base, [name], peers))


def peers_of(mode: Mode, base: str) -> tuple[str, ...]:
    """Those that do the same and are quick to start; in the special modes one is enough."""
    if not mode.is_plain_sam:
        return ("reference",)
    return ("foreach", "usual") if base == "sgd" and mode in modes.MAIN else ("foreach",)


def measure_all(part: stage.Part, sizes: Sequence[Measured], host_steps: int, compiled: bool) -> None:
    """Everything, the quick and important first and torch.compile, which takes long, last.

    The profiler is not started before what depends on the host is measured: it slows launches down from then on.
    """
    if not part.backends:
        part.error(f"none of the backends {part.device.backends} is available, so only peers were measured")
    part.attempt("host time", partial(measure_host, part, host_steps))
    for m in sizes:
        for mode, base in m.contests:
            race_all(part, m, mode, base, peers_of(mode, base))
    for m in sizes:
        if m.graphs:
            part.attempt(f"{m.case.name}, graphs", partial(measure_graphs, part, m, modes.FP32))
    stage.start_profiler(part)
    counted = [(m.case, mode, base) for m in sizes for mode, base in m.contests]
    for case, mode, base in ((HOST_CASE, modes.FP32, "sgd"), *counted):
        words = f"{case.name}, {mode.name}, {base}, launches"
        peers = peers_of(mode, base) if mode in modes.MAIN and mode.is_plain_sam else ()
        part.attempt(words, partial(count_launches, part, case, mode, base, peers))
    for m in sizes:
        if m.compiled and compiled:
            for mode in (modes.FP32, modes.BF16):
                race_all(part, m, mode, "sgd", ("foreach", "compile"))


def main() -> int:
    parser = stage.parser(__doc__)
    parser.add_argument("--more", action="store_true", help="instead: other sizes, and torch.compile")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes long")
    args = parser.parse_args()
    part = stage.start(args)
    if args.device == "cpu":
        measure_all(part, rehearsal_size(args.more), 20, not args.no_compile)
    else:
        measure_all(part, more_sizes() if args.more else full_size(), HOST_STEPS, not args.no_compile)
    return part.status()


if __name__ == "__main__":
    sys.exit(main())
