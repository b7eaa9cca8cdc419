"""``python -m benchmarks host``: host time per call, with tensors too small to cost anything else."""

from __future__ import annotations

import argparse
import statistics
from typing import Any, NamedTuple

import torch

from . import record
from .cases import HOST_COUNTS, HOST_GOALS, HOST_SIZE, Hyper, many
from .peers import Unavailable, make
from .runner import OtherData, Plan, Race, entry


class Calls(NamedTuple):
    """What each call finds: so many sets of gradients that take turns, whether somebody holds them, and whether the
    caches have kept anything of the call before: neither data nor the interpreter's code, or all of it."""

    sets: int
    held: bool
    empty_caches: bool = False


CALLS = {
    "fresh gradients": Calls(1, held=False),
    "same gradients": Calls(1, held=True),
    "new gradient addresses": Calls(2, held=True),
    "same gradients, from empty caches": Calls(1, held=True, empty_caches=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", nargs="+", type=int, default=list(HOST_COUNTS), help="numbers of tensors")
    parser.add_argument("--peer", nargs="+", default=["foreach", "ours"], metavar="PEER")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=None, help="calls per round, of which the median counts")


def _goal_notes(races: list[dict[str, Any]]) -> list[str]:
    """Whether the goals are met with gradients that somebody holds: of others, `update` frees the memory. They were set
    for full caches."""
    notes = []
    for race in races:
        for goal in HOST_GOALS:
            for r in race["ratios"]:
                calls = CALLS[race["label"]]
                if not calls.held or calls.empty_caches or race["case"] not in goal.cases:
                    continue
                if (r["ours"], r["what"], r["against"]) == ("ours", goal.what, goal.against):
                    met = "met" if r["median"] >= goal.value else "MISSED"
                    what = f"{goal.against}: {goal.what}, {race['tensors']} tensors, {race['label']}"
                    notes.append(f"goal: {what}: {goal.value:g} times the time of ours; {r['median']:.1f}, {met}")
    return notes


def run(args: argparse.Namespace) -> int:
    out, data = record.begin("host", args.out, args.force)
    for count in args.count:
        case = many(count, HOST_SIZE)
        for label, calls in CALLS.items():
            competitors = {}
            for name in args.peer:
                try:
                    competitors[name] = make(name, case, torch.float32, Hyper())
                except Unavailable as error:
                    data["notes"].append(f"{name} was left out: {error}")
            grads = [case.tensors(torch.float32, seed=1 + i, scale=1e-3) for i in range(calls.sets)]
            plan = Plan(
                rounds=args.rounds,
                calls=args.calls or (10 if calls.empty_caches else 100 if count < 500 else 20),
                warmup=20,
                reduce=statistics.median,
            )
            before = OtherData() if calls.empty_caches else lambda: None
            race = Race(competitors, grads, before=before, held=calls.held)
            race.run(plan)
            data["races"].append(entry(race, case, label))
    data["notes"] += _goal_notes(data["races"])
    record.write(out, data, args.force)
    return record.show(out, data)
