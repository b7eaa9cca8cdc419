"""What the GPU should reach, and what it reached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LARGE = 100_000_000  # parameters from which on bandwidth is all that counts
FRACTION = 0.90  # of the bandwidth of a copy
LAUNCHES = 3  # per SAM step
HOST = 60e-6  # seconds per SAM step, with 150 tensors
RATIOS = {"usual": 3.0, "foreach": 1.8, "compile": 1.2}  # time of others over ours, GPT-2 small with SGD
RATIO_CASE = "gpt2"
OVERHEAD = 0.01  # of RST(p) over (1 + p) passes and a base step


@dataclass(frozen=True)
class Verdict:
    """One goal beside its result. ``met`` is None where nothing is judged."""

    what: str
    who: str
    result: str
    goal: str
    met: bool | None


Found = Iterator[tuple[str, str, str, str, bool]]  # what, who, result, goal, whether it is met


def _label(race: dict[str, Any]) -> str:
    return f"{race['title']}, {race['dtype']}, {race['base']}"


def _fractions(races: list[dict[str, Any]], least: int) -> Found:
    for race in races:
        for f in race["fractions"] if race["elements"] >= least else ():
            if f["what"] != "base":
                words = f"{f['what']} / copy bandwidth: {_label(race)}"
                yield words, f["who"], f"{f['fraction']:.2f}", f">= {FRACTION:.2f}", f["fraction"] >= FRACTION


def _ratios(races: list[dict[str, Any]], against: tuple[str, ...]) -> Found:
    for race in races:
        for r in race["ratios"] if race["case"] == RATIO_CASE and race["base"] == "sgd" else ():
            if r["against"] in against:
                goal = RATIOS[r["against"]]
                words = f"SAM step, time of {r['against']} / time of ours: {_label(race)}"
                yield words, r["who"], f"{r['step']:.2f}", f">= {goal:g}", r["step"] >= goal


def _launches(counted: list[dict[str, Any]], ours: list[str]) -> Found:
    for c in counted:
        if c["who"] in ours:
            words = f"launches per SAM step: {_label(c)}"
            yield words, c["who"], str(c["total"]), f"<= {LAUNCHES}", c["total"] <= LAUNCHES


def _host(host: list[dict[str, Any]], ours: list[str]) -> Found:
    for h in host:
        if h["who"] in ours:
            words = f"host time per SAM step: {h['tensors']} tensors of 64, fp32, sgd"
            yield words, h["who"], f"{h['median_s'] * 1e6:.1f} us", f"<= {HOST * 1e6:.0f} us", h["median_s"] <= HOST


def _trainings(trainings: list[dict[str, Any]]) -> Found:
    for t in trainings:
        for r in t["results"]:
            if r["who"].startswith("RST"):
                words = f"step of {r['who']} over its passes + base step: {t['model']}, {t['base']}"
                met = r["overhead"] <= OVERHEAD
                yield words, t["backend"], f"{r['overhead']:+.2%}", f"<= {OVERHEAD:+.0%}", met


def verdicts(data: dict[str, Any]) -> list[Verdict]:
    """All goals that have a result. A rehearsal shows the result of any size, and none is judged."""
    kernels = data.get("kernels", {})
    ours, races = kernels.get("backends", []), kernels.get("races", [])
    # Races beside torch.compile repeat a case.
    compiled = [race for race in races if any(r["against"] == "compile" for r in race["ratios"])]
    others = [race for race in races if race not in compiled]
    found = [
        *_fractions(others, 0 if data["rehearsal"] else LARGE),
        *_ratios(others, ("usual", "foreach")),
        *_ratios(compiled, ("compile",)),
        *_launches(kernels.get("launches", []), ours),
        *_host(kernels.get("host", []), ours),
        *_trainings(data.get("end_to_end", {}).get("trainings", [])),
    ]
    judged = not data["rehearsal"]
    return [Verdict(what, who, result, goal, met if judged else None) for what, who, result, goal, met in found]
