"""The stage ``ncu``: what Nsight Compute's counters say about the norm and Adam in bf16, where it may read them."""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .environment import tool
from .sanitizer import KERNELS
from .stages import ROOT, write_part

LAUNCHES = 8
# Column of the page "raw" -> what it is called here.
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps",
    "launch__registers_per_thread": "registers",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
MOST_STALLS = 3
# What ncu says where it may not, or cannot, read the counters of this machine.
REFUSALS = ("ERR_NVGPUCTRPERM", "Failed to initialize the profiler", "LibraryNotLoaded", "not supported on this device")


def profiling(ncu: str, report: Path) -> list[str]:
    """The command that profiles. The clocks are left as they are, as in all other measurements."""
    chosen = ["-k", f"regex:{KERNELS}", "-c", str(LAUNCHES)]
    target = [sys.executable, "-m", "benchmarks.gpu.one_step", "--device", "cuda"]
    return [ncu, "--clock-control", "none", "--set", "full", *chosen, "-f", "-o", str(report), *target]


def printing(ncu: str, report: Path) -> list[str]:
    return [ncu, "--import", str(report), "--csv", "--page", "raw"]


def read_raw(text: str) -> list[dict[str, Any]]:
    """The page "raw" as CSV: a line of names, one of units, and one for each launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    names, units, *launches = csv.reader(lines)
    return [_launch(names, units, values) for values in launches]


def _launch(names: Sequence[str], units: Sequence[str], values: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"kernel": values[names.index("Kernel Name")]}
    stalls: dict[str, float] = {}
    for name, unit, value in zip(names, units, values, strict=True):
        stall = STALL.fullmatch(name)
        if name in METRICS:
            found[METRICS[name]] = f"{value} {unit}".strip()
        elif stall and re.fullmatch(r"[\d.,]+", value):
            stalls[stall[1]] = float(value.replace(",", ""))
    return {**found, "stalls": dict(sorted(stalls.items(), key=lambda item: -item[1])[:MOST_STALLS])}


def refused(text: str) -> str | None:
    """The line that says that this machine does not let ncu read counters; None if there is none."""
    return next((line.strip() for line in text.splitlines() if any(words in line for words in REFUSALS)), None)


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    print("$ " + " ".join(command), flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    return done


def measure(ncu: str | None, report: Path) -> dict[str, Any]:
    """What was found, and in the notes why nothing could be."""
    data: dict[str, Any] = {"launches": [], "notes": [], "errors": []}
    if ncu is None:
        return {**data, "notes": ["no counters were read: ncu was not found"]}
    done = run(profiling(ncu, report))
    words = refused(done.stdout)
    if words:
        return {**data, "notes": [f"no counters were read: {words}"]}
    if done.returncode == 0:
        done = run(printing(ncu, report))
        data["launches"] = read_raw(done.stdout)
    if not data["launches"]:
        data["errors"].append(f"ncu found nothing, with exit status {done.returncode}: see its log")
    return data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data = measure(tool("ncu") if args.device == "cuda" else None, args.out.with_suffix(".ncu-rep"))
    write_part(args.out, data)
    return 1 if data["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
