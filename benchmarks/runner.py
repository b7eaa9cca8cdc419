"""Interleaved timing: each round times every competitor, so that noise of the machine hits them all."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .cases import GOALS, Case
from .peers import Competitor, attach, attach_copies
from .probe import Probe
from .record import cache_bytes

OURS = ("ours", "ours-master")
WHATS = ("perturb", "update", "step", "base")  # step = perturb + update, of the same call
Clock = Callable[[Callable[[], object]], float]
Times = dict[str, list[float]]  # what -> one number of seconds per round


def _busy_seconds() -> float:
    """CPU seconds for which the machine was busy or held up by its host; 0 without /proc/stat."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def wall_clock(call: Callable[[], object]) -> float:
    """Seconds that ``call`` takes; a device whose calls return early needs another clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class OtherData:
    """Data that takes the place of the optimizer's in all caches when called, as a forward and backward do.

    Its threads are then awake and looking for work, as they are after a backward.
    """

    def __init__(self) -> None:
        self._values = torch.zeros(2 * (cache_bytes() or 64 << 20) // 4)

    def __call__(self) -> None:
        self._values.sum()


@dataclass(frozen=True)
class Plan:
    """How long to measure: ``rounds`` rounds, where a competitor's time is ``reduce`` of ``calls`` calls."""

    rounds: int
    calls: int
    warmup: int = 2
    settle: float = 0.005  # seconds of rest before a competitor, in which the previous one's threads stop spinning
    reduce: Callable[[Sequence[float]], float] = min


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection inside."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass
class Race:
    """The competitors over one case, and the gradients that all of them get.

    ``grads`` holds one or more sets of gradients, which take turns. Every call has copies of its own, made before its
    time begins, that nobody else refers to, as a backward leaves them. ``held``: it has the sets themselves, which
    the race holds on to, so that no memory of theirs can keep weights; with two sets, every call meets other addresses
    than the same call before it.
    """

    competitors: Mapping[str, Competitor]
    grads: Sequence[Sequence[torch.Tensor]]
    probe: Probe | None = None
    before: Callable[[], object] = lambda: None  # before each call that is timed
    clock: Clock = wall_clock
    held: bool = False
    times: dict[str, Times] = field(default_factory=dict)
    others: float = 0.0  # how many cores other processes kept busy during the rounds, on average

    def one_step(self, competitor: Competitor, sets: Iterator[Sequence[torch.Tensor]]) -> dict[str, float]:
        seconds = {}
        give = attach if self.held else attach_copies
        for what in ("perturb", "update", "base"):
            give(competitor.params, next(sets))
            self.before()
            seconds[what] = self.clock(getattr(competitor, what))
        seconds["step"] = seconds["perturb"] + seconds["update"]
        return seconds

    def run(self, plan: Plan) -> dict[str, Times]:
        """Warms up, measures, and returns seconds per round for each competitor and the probe."""
        entries: dict[str, Callable[[], dict[str, float]]] = {
            name: functools.partial(self.one_step, competitor, itertools.cycle(self.grads))
            for name, competitor in self.competitors.items()
        }
        with quiet():
            for entry in entries.values():
                for _ in range(plan.warmup):
                    entry()
            if self.probe is not None:

                def alone() -> None:  # the probe has threads of its own, beside which no others may spin
                    self.before()
                    time.sleep(plan.settle)

                self.probe.calibrate(alone)
                entries["probe"] = functools.partial(self.probe.seconds, alone)
            self.times = {name: {what: [] for what in WHATS} for name in entries}
            begun, busy, own = time.perf_counter(), _busy_seconds(), time.process_time()
            for _ in range(plan.rounds):
                for name, entry in entries.items():
                    time.sleep(plan.settle)
                    calls = [entry() for _ in range(plan.calls)]
                    for what in WHATS:
                        self.times[name][what].append(plan.reduce([call[what] for call in calls]))
            own, busy = time.process_time() - own, _busy_seconds() - busy
            self.others = max(0.0, (busy - own) / (time.perf_counter() - begun))
        return self.times

    def disagreement(self) -> dict[str, float]:
        """Largest distance of each competitor's weights from the first one's, relative to the largest weight.

        All competitors took the same steps from the same weights, so this shows that they do the same work.
        """
        names = list(self.competitors)
        first = [p.detach() for p in self.competitors[names[0]].params]
        largest = max((float(p.abs().max()) for p in first if p.numel()), default=1.0)
        distances = {}
        for name in names:
            pairs = zip(self.competitors[name].params, first, strict=True)
            worst = max((float((p.detach() - q).abs().max()) for p, q in pairs if q.numel()), default=0.0)
            distances[name] = worst / largest
        return distances


def records(times: Mapping[str, Times]) -> list[dict[str, Any]]:
    """One record per competitor and part, with every round's seconds."""
    return [
        {
            "who": who, "what": what, "median_s": statistics.median(rounds), "best_s": min(rounds),
            "rounds_s": rounds,
        }
        for who, parts in times.items() for what, rounds in parts.items()
    ]  # fmt: skip


def _goal(case: str, what: str, against: str) -> float | None:
    for goal in GOALS:
        if case in goal.cases and (goal.what, goal.against) == (what, against):
            return goal.value
    return None


def ratios(times: Mapping[str, Times], case: str, ours: str = "ours") -> list[dict[str, Any]]:
    """How many times longer than ``ours`` each competitor takes; for the probe, the fraction of the ceiling.

    ``median`` is over the ratios of single rounds, ``best`` is the ratio of the two best times. Against
    ``torch base`` stands torch's own base step without SAM, compared with our restore + base step.
    """
    mine = times[ours]
    others = {who: parts for who, parts in times.items() if who not in OURS}
    if ours != "ours":
        others.pop("probe", None)  # which moves the bytes of a step without masters
    pairs = [(who, what, parts[what], mine[what]) for who, parts in others.items() for what in WHATS]
    if "foreach" in times:
        pairs.append(("torch base", "update", times["foreach"]["base"], mine["update"]))
    found = []
    for who, what, theirs, own in pairs:
        median = statistics.median(t / o for t, o in zip(theirs, own, strict=True))
        goal = _goal(case, what, who) if ours == "ours" else None  # fp32 masters are other bytes to move
        found.append({
            "ours": ours, "what": what, "against": who, "median": median, "best": min(theirs) / min(own),
            "goal": goal, "met": None if goal is None else median >= goal,
        })  # fmt: skip
    return found


def entry(race: Race, case: Case, label: str) -> dict[str, Any]:
    """What a result file keeps of a race that was run."""
    return {
        "case": case.name, "label": label, "elements": case.elements, "tensors": len(case.shapes),
        "other_processes_cores": round(race.others, 2), "results": records(race.times),
        "ratios": [
            r for ours in OURS if ours in race.times for r in ratios(race.times, case.name, ours)
        ],
    }  # fmt: skip
