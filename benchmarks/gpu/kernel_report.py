"""What a report says of single kernels: the device's ceilings, times, other builds, counters."""

from __future__ import annotations

from typing import Any

from ..record import seconds, table
from .predictions import SOURCE


def fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _ceilings(part: dict[str, Any]) -> str:
    rows = [
        [b["what"], f"{b['bytes'] / 1e9:.2f} GB", f"{b['median'] / 1e9:.0f} GB/s", f"{b['best'] / 1e9:.0f} GB/s"]
        for b in part.get("bandwidths", [])
    ]
    if not rows:
        return ""
    return "\n## Ceilings of this device\n\n" + table(["bandwidth", "moves", "median", "best"], rows)


def _kernels(found: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{k['kernel']}, {t['mode']}: {t['title']}, {t['base']}, {t['who']}",
            f"{k['bytes'] / 1e6:,.1f} MB", f"{seconds(k['median_s'])} ({seconds(k['best_s'])})",
            fraction(k["of_copy"]), fraction(k["predicted"]), fraction(k["of_read"]),
        ]
        for t in found for k in t["kernels"]
    ]  # fmt: skip
    if not rows:
        return ""
    head = ["kernel", "must move", "median (best)", "of a copy", "predicted", "of a read"]
    return "\n## Time per kernel\n\n" + table(head, rows) + f"\n{SOURCE}; fractions of a copy.\n"


def _variants(part: dict[str, Any]) -> str:
    found = part.get("kernels", [])
    if not found:
        return ""
    builds = list(dict.fromkeys(build for row in found for build in row["seconds"]))
    rows = []
    for row in found:
        cells = [
            f"{seconds(row['seconds'][b])}{_ratio(row['ratios'].get(b))}" if b in row["seconds"] else "" for b in builds
        ]
        rows.append([f"{row['kernel']}, {row['mode']}", *cells])
    head = "\n## Kernels built with other constants: time (over the time of the default build)\n\n"
    return head + table(["GPT-2 small, adamw", *builds], rows)


def _ratio(value: float | None) -> str:
    return "" if value is None else f" ({value:.2f})"


def _counters(part: dict[str, Any]) -> str:
    found = part.get("launches", [])
    if not found:
        return ""
    names = list(dict.fromkeys(name for launch in found for name in launch if name not in ("kernel", "stalls")))
    rows = [
        [
            launch["kernel"], *(launch.get(name, "") for name in names),
            ", ".join(f"{stall} {value:.1f}" for stall, value in launch["stalls"].items()),
        ]
        for launch in found
    ]  # fmt: skip
    head = "\n## Counters, by Nsight Compute: GPT-2 small, bf16, adamw\n\n"
    return head + table(["launch", *names, "stalls (warps per issue)"], rows)


def markdown(data: dict[str, Any]) -> str:
    return (
        _ceilings(data.get("ceilings", {}))
        + _kernels(data.get("kernels", {}).get("kernels", []))
        + _variants(data.get("variants", {}))
        + _counters(data.get("ncu", {}))
    )
