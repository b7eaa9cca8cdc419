"""The stage ``kernels``: the ops and the optimizer against other implementations and against a plain copy."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..cases import DTYPES, Case, Hyper, gpt2, many
from ..peers import PEERS, WEIGHTS, Competitor, attach, make
from . import environment, race, stage
from .device import Device
from .models import ResNet, case_of
from .race import Entrant, Plan

HYPER = Hyper()
HOST_CASE = many(150, 64)
HOST_STEPS, HOST_WARMUP = 200, 20
GRAPH_WARMUP, GRAPH_REPLAYS = 3, 2


@dataclass(frozen=True)
class Measured:
    """A case, and how long to measure it."""

    case: Case
    plan: Plan
    bases: tuple[str, ...] = ("sgd",)
    compiled: bool = False
    graphs: bool = False


def full_size() -> list[Measured]:
    """The most important first: time may run out."""
    with torch.device("meta"):
        resnet = case_of("resnet50", "ResNet-50", ResNet())
    return [
        Measured(gpt2("gpt2", "GPT-2 small", 768, 12), Plan(15, 3, 12), ("sgd", "adamw"), compiled=True, graphs=True),
        Measured(gpt2("1e9", "GPT-2 XL, 30 of its 48 layers", 1600, 30), Plan(7, 2, 8)),
        Measured(resnet, Plan(15, 5, 20), graphs=True),
        Measured(many(1000, 1000), Plan(9, 3, 10), graphs=True),
    ]


def rehearsal_size() -> list[Measured]:
    """The same with next to no elements."""
    with torch.device("meta"):
        resnet = case_of("resnet50", "ResNet-50, shrunk", ResNet(4, (1, 1, 1, 1), 10))
    small, large = gpt2("gpt2", "GPT-2, shrunk", 16, 1, 101, 8), gpt2("1e9", "GPT-2 XL, shrunk", 24, 2, 101, 8)
    plan = Plan(3, 2, 2, warmup=1)
    return [
        Measured(small, plan, ("sgd", "adamw"), compiled=True, graphs=True),
        Measured(large, plan),
        Measured(resnet, plan, graphs=True),
        Measured(many(20, 50), plan, graphs=True),
    ]


def competitors(
    device: Device, case: Case, dtype: torch.dtype, base: str, backends: Sequence[str], peers: Sequence[str]
) -> dict[str, Competitor]:
    """Ours by the names of their backends, then the peers. The usual SAM and torch.compile have SGD alone."""
    made = {name: make("ours", case, dtype, HYPER, device.name, backend=name, base=base) for name in backends}
    for peer in peers:
        options = {"base": base} if peer == "foreach" else {}
        made[peer] = make(peer, case, dtype, HYPER, device.name, **options)
    return made


def gradients(device: Device, case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    return case.tensors(dtype, seed=1, scale=1e-3, device=device.name)


def labels(case: Case, dtype: str, base: str) -> dict[str, Any]:
    return {
        "case": case.name, "title": case.title, "dtype": dtype, "base": base, "tensors": len(case.shapes),
        "elements": case.elements,
    }  # fmt: skip


def measure_race(
    part: stage.Part, m: Measured, dtype: str, base: str, backends: Sequence[str], peers: Sequence[str]
) -> None:
    """One race of our backends, the peers and the copy, and whether all do the same."""
    device, case, kind = part.device, m.case, DTYPES[dtype]
    grads = gradients(device, case, kind)
    racers = competitors(device, case, kind, base, backends, peers)
    found = labels(case, dtype, base)
    found["agreement"] = race.agreement(racers, grads)
    for a in found["agreement"]:
        if not a["agree"]:
            part.error(f"{case.name}, {dtype}, {base}: the weights of {a['who']} are wrong: {a}")
    entrants = {name: race.entrant(racer, grads) for name, racer in racers.items()}
    entrants["copy"] = race.copy_entrant(case.elements, kind, device)
    times = race.race(device, entrants, m.plan)
    found["results"] = race.results(times)
    found["fractions"] = race.fractions(times, backends, base, case, kind.itemsize)
    found["ratios"] = race.ratios(times, backends)
    copied = race.COPY_WORDS * case.elements * kind.itemsize
    found["copy_bytes_per_s"] = copied / statistics.median(times["copy"]["copy"])
    found["clocks"] = environment.clocks() if device.name == "cuda" else {}
    part.add("races", found)


def host_seconds(device: Device, competitor: Competitor, grads: Sequence[torch.Tensor], steps: int) -> list[float]:
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
    grads = gradients(device, HOST_CASE, torch.float32)
    racers = competitors(device, HOST_CASE, torch.float32, "sgd", part.backends, ("foreach", "usual"))
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


def count_launches(part: stage.Part, case: Case, dtype: str, base: str, peers: Sequence[str]) -> None:
    """What one SAM step of each launches on the device."""
    device, kind = part.device, DTYPES[dtype]
    grads = gradients(device, case, kind)
    for name in (*part.backends, *peers):
        (racer,) = competitors(device, case, kind, base, *_one(name)).values()
        race.sam_step(racer, grads)  # the first step allocates and fills
        launches = device.launches(partial(race.sam_step, racer, grads))
        part.add("launches", {
            **labels(case, dtype, base), "who": name, "total": sum(launches.values()), "of": launches,
        })  # fmt: skip


def _one(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(backends, peers) with nothing but ``name``."""
    return ((), (name,)) if name in PEERS else ((name,), ())


def captured(device: Device, competitor: Competitor, grads: Sequence[torch.Tensor]) -> tuple[Entrant, int]:
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


def eager(competitor: Competitor, grads: Sequence[torch.Tensor]) -> Entrant:
    return Entrant(
        steps={"base": partial(race.base_step, competitor, grads), "step": partial(race.sam_step, competitor, grads)}
    )


def measure_graphs(part: stage.Part, m: Measured, dtype: str) -> None:
    """CUDA graphs of our backends and of the foreach peer, beside the same without graphs. A capture that raises is a
    result, too."""
    device, case, kind = part.device, m.case, DTYPES[dtype]
    grads = gradients(device, case, kind)
    before = case.tensors(kind, **WEIGHTS, device=device.name)
    found: dict[str, Any] = {**labels(case, dtype, "sgd"), "agreement": [], "failures": {}}
    entrants = {}
    for name, racer in competitors(device, case, kind, "sgd", part.backends, ("foreach",)).items():
        label = f"{name}, graph"
        try:
            entrants[label], updates = captured(device, racer, grads)
        except Exception as error:
            found["failures"][name] = stage.described(error)
            continue
        standard = make("foreach", case, kind, HYPER, device.name)
        for _ in range(updates):  # with gradients that stay, a SAM step and a base step do the same
            race.base_step(standard, grads)
        same = race.same_weights(label, racer, standard, before)
        found["agreement"].append(same)
        if not same["agree"]:
            part.error(f"{case.name}, {dtype}: the weights after replays of {name} are wrong: {same}")
    for name, racer in competitors(device, case, kind, "sgd", part.backends, ("foreach",)).items():
        entrants[name] = eager(racer, grads)
    found["results"] = race.results(race.race(device, entrants, m.plan))
    part.add("graphs", found)


def race_all(part: stage.Part, m: Measured, dtype: str, base: str, peers: Sequence[str]) -> None:
    """All backends in one race; if that fails, each in a race of its own, so that one cannot hide the others."""
    label = f"{m.case.name}, {dtype}, {base}, {', '.join(peers)}"
    done = part.attempt(label, partial(measure_race, part, m, dtype, base, part.backends, peers))
    if not done and len(part.backends) > 1:
        for name in part.backends:
            part.attempt(f"{label}, {name} alone", partial(measure_race, part, m, dtype, base, [name], peers))


def peers_of(base: str) -> tuple[str, ...]:
    """Those that are quick to start."""
    return ("foreach", "usual") if base == "sgd" else ("foreach",)


def measure_all(part: stage.Part, sizes: Sequence[Measured], host_steps: int, compiled: bool) -> None:
    """Everything, the quick and important first and torch.compile, which takes long, last.

    The profiler is not started before what depends on the host is measured: it slows launches down from then on.
    """
    if not part.backends:
        part.error(f"none of the backends {part.device.backends} is available, so only peers were measured")
    part.attempt("host time", partial(measure_host, part, host_steps))
    for m in sizes:
        for dtype in DTYPES:
            for base in m.bases:
                race_all(part, m, dtype, base, peers_of(base))
    for m in sizes:
        if m.graphs:
            part.attempt(f"{m.case.name}, graphs", partial(measure_graphs, part, m, "fp32"))
    device = part.device
    first = "a first profile, which starts the profiler and is dropped"
    part.attempt(first, lambda: device.launches(lambda: torch.ones(8, device=device.name).add_(1)))
    counted = [(m.case, dtype, base) for m in sizes for dtype in DTYPES for base in m.bases]
    for case, dtype, base in ((HOST_CASE, "fp32", "sgd"), *counted):
        words = f"{case.name}, {dtype}, {base}, launches"
        part.attempt(words, partial(count_launches, part, case, dtype, base, peers_of(base)))
    for m in sizes:
        if m.compiled and compiled:
            for dtype in DTYPES:
                race_all(part, m, dtype, "sgd", ("foreach", "compile"))


def main() -> int:
    parser = stage.parser(__doc__)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes long")
    args = parser.parse_args()
    part = stage.start(args)
    rehearses = args.device == "cpu"
    sizes = rehearsal_size() if rehearses else full_size()
    measure_all(part, sizes, 20 if rehearses else HOST_STEPS, not args.no_compile)
    return part.status()


if __name__ == "__main__":
    sys.exit(main())
