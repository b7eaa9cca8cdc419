"""``python -m benchmarks cpu``: time of a SAM step and its parts, competitors and the memory ceiling."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from . import record
from .cases import CASES, DTYPES, LARGE, Hyper
from .peers import PEERS, Ours, Unavailable, attach, make
from .probe import Probe
from .runner import OURS, OtherData, Plan, Race, entry

AGREEMENT = {"fp32": 1e-3, "bf16": 0.1}  # largest distance between two competitors' weights, relative


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), metavar="DTYPE")
    peers = f"which competitors, of {', '.join(PEERS)}; default: all that suit dtype and case"
    parser.add_argument("--peer", nargs="+", choices=list(PEERS), default=None, metavar="PEER", help=peers)
    parser.add_argument(
        "--rounds",
        type=int,
        default=None,
        help="default: 7, or 15 for a small case; times 5 beside the probe",
    )
    parser.add_argument("--calls", type=int, default=None, help="calls per round; default: 2, or 10 for a small case")
    parser.add_argument("--no-probe", action="store_true", help="leave out the bandwidth ceiling")


def default_peers(case_name: str, dtype: str) -> list[str]:
    """Every competitor, except masters beside fp32, and torch.compile where compiling takes many minutes."""
    left_out = {"ours-master" if dtype == "fp32" else "", "" if case_name in LARGE else "compile"}
    return [name for name in PEERS if name not in left_out]


def measure(case_name: str, dtype: str, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Times one case in one dtype: all competitors, then ours beside the bandwidth probe. Races and notes."""
    case, hyper, notes, races = CASES[case_name](), Hyper(), [], []
    competitors = {}
    for name in names:
        try:
            competitors[name] = make(name, case, DTYPES[dtype], hyper)
        except Unavailable as error:
            notes.append(f"{case_name}, {dtype}: {name} was left out: {error}")
    grads = [case.tensors(DTYPES[dtype], seed=1, scale=1e-3)]
    small = case_name not in LARGE
    rounds, calls = args.rounds or (15 if small else 7), args.calls or (10 if small else 2)
    race = Race(competitors, grads)
    race.run(Plan(rounds, calls))
    races.append(entry(race, case, dtype))
    first = next(iter(competitors))
    for name, distance in race.disagreement().items():
        if not distance <= AGREEMENT[dtype]:
            notes.append(f"{case_name}, {dtype}: weights of {name} are {distance:.1e} away from those of {first}")
    ours = {name: c for name, c in competitors.items() if name in OURS}
    # Torch's own base step is compared with our update from empty caches, too.
    beside = {**ours, **{name: c for name, c in competitors.items() if name == "foreach" and not small}}
    if "ours" in ours and not args.no_probe:
        del competitors, race  # the memory of the others
        mine = ours["ours"]
        assert isinstance(mine, Ours)
        for call in (mine.perturb, mine.update):  # with gradients that are held, so that there are backups
            attach(mine.params, grads[0])
            call()
        attach(mine.params, grads[0])
        probe = Probe(mine.streams(), torch.get_num_threads())
        # Many short rounds: the fraction of a ceiling needs more precision than a ratio of 2 or 10. The gradients are
        # held, so that the weights are kept in the very backups that the probe has.
        race = Race(beside, grads, probe, held=True)
        if not small:
            race.before = OtherData()
        race.run(Plan(5 * rounds, calls))
        state = "" if small else ", from empty caches"
        races.append(entry(race, case, f"{dtype}, beside the bandwidth probe{state}"))
        notes += [f"{case_name}, {dtype}: probe {mix}: {words}" for mix, words in probe.describe().items()]
        speeds = {what: probe.bandwidth(what, min(seconds)) / 1e9 for what, seconds in race.times["probe"].items()}
        words = ", ".join(f"{what} {speed:.1f} GB/s" for what, speed in speeds.items())
        notes.append(f"{case_name}, {dtype}: probe at its best: {words}")
    return {"races": races, "notes": notes}


def run(args: argparse.Namespace) -> int:
    out, data = record.begin("cpu", args.out, args.force)
    for case_name in args.case:
        for dtype in args.dtype:
            names = args.peer or default_peers(case_name, dtype)
            part = measure(case_name, dtype, names, args)
            data["races"] += part["races"]
            data["notes"] += part["notes"]
            record.write(out, data, force=True)  # as it goes: a later case that fails loses nothing
            print(f"{case_name}, {dtype}: done", flush=True)
    return record.show(out, data)
