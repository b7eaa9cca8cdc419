"""What the GPU should reach, and what it reached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from . import modes

LARGE = 100_000_000  # parameters from which on bandwidth is all that counts
FRACTION = 0.90  # of the bandwidth of a copy, or of a read where a kernel only reads
JUDGED = tuple(mode.name for mode in modes.MAIN)
LAUNCHES = 3  # per SAM step: norm, perturbation, update
# Tensors that one launch of cuda carries at least, in its arguments: 32,764 bytes from CUDA 13 on, 4 KiB before. The
# tables of Triton lie in device memory, so its launches do not depend on the number of tensors.
LAUNCH_TENSORS, LAUNCH_TENSORS_CUDA_12 = 400, 40
HOST = {"cuda": 60e-6, "triton": 100e-6}  # seconds per SAM step, with 150 tensors
RATIOS = {"usual": 3.0, "foreach": 1.8, "compile": 1.2}  # time of others over ours, GPT-2 small with SGD
RATIO_CASE = "gpt2"
OVERHEAD = 0.01  # of RST(p) over (1 + p) passes and a base step
PARTS = ("kernels", "races", "more_races", "end_to_end", "more_training")


@dataclass(frozen=True)
class Verdict:
    """One goal beside its result, and what was predicted where something was. ``met`` is None where nothing is
    judged."""

    what: str
    who: str
    result: str
    goal: str
    met: bool | None
    predicted: str = ""


Found = Iterator[Verdict]


def merged(data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """All results of one kind, whichever stage found them."""
    return [entry for name in PARTS for entry in data.get(name, {}).get(key, [])]


def _label(race: dict[str, Any]) -> str:
    return f"{race['title']}, {race['mode']}, {race['base']}"


def _fractions(timed: list[dict[str, Any]], least: int) -> Found:
    for t in timed:
        for k in t["kernels"] if t["elements"] >= least and t["mode"] in JUDGED else ():
            against = "copy" if k["of_read"] is None else "read"
            reached = k[f"of_{against}"]
            words = f"{k['kernel']} / {against} bandwidth: {_label(t)}"
            goal = f">= {FRACTION:.2f}"
            predicted = "" if k["predicted"] is None else f"{k['predicted']:.2f} of a copy"
            yield Verdict(words, t["who"], f"{reached:.3f}", goal, reached >= FRACTION, predicted)


def _ratios(races: list[dict[str, Any]]) -> Found:
    for race in races:
        judged = race["case"] == RATIO_CASE and race["base"] == "sgd" and race["mode"] in JUDGED
        for r in race["ratios"] if judged else ():
            # Races beside torch.compile repeat a case.
            beside_compile = any(other["against"] == "compile" for other in race["ratios"])
            if r["against"] in RATIOS and (r["against"] == "compile" or not beside_compile):
                goal = RATIOS[r["against"]]
                words = f"SAM step, time of {r['against']} / time of ours: {_label(race)}"
                yield Verdict(words, r["who"], f"{r['step']:.2f}", f">= {goal:g}", r["step"] >= goal)


def most_launches(backend: str, tensors: int, build: dict[str, str]) -> int | None:
    """How many launches a SAM step over tensors of one kind may take; None where no goal is set."""
    if backend == "triton":
        return LAUNCHES
    if backend != "cuda":
        return None
    release = build.get("CUDA", "").partition(".")[0]
    each = LAUNCH_TENSORS if release.isdecimal() and int(release) >= 13 else LAUNCH_TENSORS_CUDA_12
    return LAUNCHES * -(-tensors // each)


def _launches(part: dict[str, Any]) -> Found:
    for c in part.get("launches", []):
        most = most_launches(c["who"], c["tensors"], part["build"])
        if most is not None:
            words = f"launches per SAM step: {_label(c)}"
            yield Verdict(words, c["who"], str(c["total"]), f"<= {most}", c["total"] <= most)


def _host(host: list[dict[str, Any]]) -> Found:
    for h in host:
        if h["who"] in HOST:
            goal, words = HOST[h["who"]], f"host time per SAM step: {h['tensors']} tensors of 64, fp32, sgd"
            yield Verdict(
                words, h["who"], f"{h['median_s'] * 1e6:.1f} us", f"<= {goal * 1e6:.0f} us", h["median_s"] <= goal
            )


def _trainings(trainings: list[dict[str, Any]]) -> Found:
    for t in trainings:
        for r in t["results"]:
            if r["who"].startswith("RST"):
                words = f"step of {r['who']} over its passes + base step: {t['model']}, {t['base']}"
                met = r["overhead"] <= OVERHEAD
                yield Verdict(words, t["backend"], f"{r['overhead']:+.2%}", f"<= {OVERHEAD:+.0%}", met)


def verdicts(data: dict[str, Any]) -> list[Verdict]:
    """All goals that have a result. A rehearsal shows the result of any size, and none is judged."""
    found = [
        *_fractions(merged(data, "kernels"), 0 if data["rehearsal"] else LARGE),
        *_ratios(merged(data, "races")),
        *(v for name in ("races", "more_races") for v in _launches(data.get(name, {}))),
        *_host(merged(data, "host")),
        *_trainings(merged(data, "trainings")),
    ]
    return [replace(verdict, met=None) for verdict in found] if data["rehearsal"] else found
