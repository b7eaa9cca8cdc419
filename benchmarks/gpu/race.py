"""Interleaved timing on a device, and whether competitors agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..peers import Competitor, attach
from ..runner import quiet
from .device import Device
from .streams import COPIES, Call, Streams
from .traffic import PARTS

# Largest distance between weights that should be equal, relative to what `same_weights` says.
AGREEMENT = {torch.float32: 1e-2, torch.bfloat16: 2e-2}

Times = dict[str, dict[str, list[float]]]  # who -> what -> seconds per round
Grads = Sequence[torch.Tensor]


def nothing(what: str) -> None:
    pass


@dataclass(frozen=True)
class Entrant:
    """What one competitor does in a round.

    ``parts`` are timed one by one, queued behind a busy device, so that their times are the device's alone.
    ``steps`` are timed back to back with nothing held, as a training loop sees them: the slower of host and device.
    ``prepare`` runs before each part, whose name it is given, out of its time.
    """

    parts: Mapping[str, Call] = field(default_factory=dict)
    steps: Mapping[str, Call] = field(default_factory=dict)
    prepare: Callable[[str], object] = nothing


def sam_step(competitor: Competitor, grads: Grads, second: Grads | None = None) -> None:
    """One SAM step; the gradients are set for both halves, as two backward passes would, to the same unless there are
    ``second`` ones."""
    attach(competitor.params, grads)
    competitor.perturb()
    attach(competitor.params, grads if second is None else second)
    competitor.update()


def base_step(competitor: Competitor, grads: Grads) -> None:
    attach(competitor.params, grads)
    competitor.base()


def entrant(competitor: Competitor, grads: Grads, second: Grads) -> Entrant:
    return Entrant(
        {part: getattr(competitor, part) for part in PARTS},
        {"step": partial(sam_step, competitor, grads, second)},
        lambda part: attach(competitor.params, second if part == "update" else grads),
    )


def copy_entrant(size: int, device: Device) -> Entrant:
    """A plain copy of ``size`` bytes: its bandwidth is the measure of all others."""
    return Entrant({"copy": Streams(size, device).copy})


@dataclass(frozen=True)
class Plan:
    """``rounds`` rounds; in each, every entrant runs its parts ``calls`` times (the median counts) and each of its
    steps ``in_a_row`` times (the mean counts)."""

    rounds: int
    calls: int
    in_a_row: int
    warmup: int = 3


def _queued(device: Device, e: Entrant, hold: float) -> dict[str, float]:
    device.synchronize()
    device.hold(hold)
    marks = []
    for what, call in e.parts.items():
        e.prepare(what)
        start = device.mark()
        call()
        marks.append((start, device.mark()))
    device.synchronize()
    return {what: device.elapsed(*pair) for what, pair in zip(e.parts, marks, strict=True)}


def _back_to_back(device: Device, call: Call, calls: int) -> float:
    device.synchronize()
    start = device.mark()
    for _ in range(calls):
        call()
    end = device.mark()
    device.synchronize()
    return device.elapsed(start, end) / calls


def _warm_up(device: Device, e: Entrant, times: int) -> float:
    """Returns how long the host takes to launch all parts."""
    host = 0.0
    for _ in range(times):
        for step in e.steps.values():
            step()
        device.synchronize()
        start = time.perf_counter()
        for what, call in e.parts.items():
            e.prepare(what)
            call()
        host = time.perf_counter() - start
    return host


def race(device: Device, entrants: Mapping[str, Entrant], plan: Plan) -> Times:
    """Warms up, then runs all entrants round by round, so that what disturbs the machine disturbs them all."""
    times: Times = {name: {what: [] for what in (*e.parts, *e.steps)} for name, e in entrants.items()}
    with quiet():
        holds = {name: 1.5 * _warm_up(device, e, plan.warmup) + 1e-4 for name, e in entrants.items()}
        for _ in range(plan.rounds):
            for name, e in entrants.items():
                queued = [_queued(device, e, holds[name]) for _ in range(plan.calls)] if e.parts else []
                for what in e.parts:
                    times[name][what].append(statistics.median(seconds[what] for seconds in queued))
                for what, step in e.steps.items():
                    times[name][what].append(_back_to_back(device, step, plan.in_a_row))
    return times


def results(times: Times) -> list[dict[str, Any]]:
    return [
        {"who": who, "what": what, "median_s": statistics.median(rounds), "best_s": min(rounds), "rounds_s": rounds}
        for who, whats in times.items()
        for what, rounds in whats.items()
    ]


def fractions(times: Times, ours: Sequence[str], must_move: Mapping[str, int], size: int) -> list[dict[str, Any]]:
    """Bandwidth of each part of ours over that of a copy of ``size`` bytes: the median over rounds, and of the best
    times."""
    found = []
    for who in ours:
        for part, moved in must_move.items():
            work = moved / (COPIES * size)
            mine, copies = times[who][part], times["copy"]["copy"]
            median = statistics.median(work * c / m for c, m in zip(copies, mine, strict=True))
            found.append({
                "who": who, "what": part, "bytes": moved, "fraction": median, "best": work * min(copies) / min(mine),
            })  # fmt: skip
    return found


def ratios(times: Times, ours: Sequence[str]) -> list[dict[str, Any]]:
    """How many times longer than ours the others take for a SAM step: back to back, and on the device alone."""
    found = []
    for who in ours:
        for other in (name for name in times if name not in (*ours, "copy")):
            theirs, mine = times[other], times[who]
            device = statistics.median(
                (tp + tu) / (op + ou)
                for tp, tu, op, ou in zip(
                    theirs["perturb"], theirs["update"], mine["perturb"], mine["update"], strict=True
                )
            )
            step = statistics.median(t / m for t, m in zip(theirs["step"], mine["step"], strict=True))
            found.append({"who": who, "against": other, "step": step, "device": device})
    return found


def _distance(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    """The largest difference between two lists. NaN in either gives NaN."""
    worst = torch.zeros((), device=a[0].device)
    for x, y in zip(a, b, strict=True):
        difference = (x.detach().float() - y.detach().float()).abs().max()
        worst = torch.where(difference.isnan() | (difference > worst), difference, worst)
    return float(worst)


def same_weights(
    name: str, competitor: Competitor, standard: Competitor, before: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """How far the weights are from those of ``standard`` after the same steps.

    In fp32 this is relative to the largest change since ``before``. In bf16 such small changes mostly round to nothing,
    so there it is relative to the largest weight.
    """
    dtype = before[0].dtype
    zeros = [torch.zeros((), device=before[0].device).expand_as(p) for p in before]
    scale = _distance(standard.params, before if dtype == torch.float32 else zeros)
    distance = _distance(competitor.params, standard.params) / scale
    return {"who": name, "weights": distance, "agree": distance <= AGREEMENT[dtype]}


def agreement(
    competitors: Mapping[str, Competitor], grads: Grads, standard: str, second: Grads | None = None
) -> list[dict[str, Any]]:
    """One SAM step and one base step by all, from the same weights: how far each is from ``standard``.

    Perturbed weights are compared in fp32 only: bf16 ones are rounded stochastically by some and not by others.
    """
    norm = competitors[standard]
    before = [p.detach().clone() for p in norm.params]
    others = {name: c for name, c in competitors.items() if name != standard}
    for c in competitors.values():
        attach(c.params, grads)
        c.perturb()
    moved: dict[str, float | None] = dict.fromkeys(others)
    if before[0].dtype == torch.float32:
        e = _distance(norm.params, before)
        moved = {name: _distance(c.params, norm.params) / e for name, c in others.items()}
    for c in competitors.values():
        attach(c.params, grads if second is None else second)
        c.update()
        base_step(c, grads)
    found = []
    for name, c in others.items():
        distance, weights = moved[name], same_weights(name, c, norm, before)
        agree = weights["agree"] and (distance is None or distance <= AGREEMENT[torch.float32])
        found.append({**weights, "perturbed": distance, "agree": agree})
    return found
