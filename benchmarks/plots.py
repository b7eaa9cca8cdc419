"""Pictures of result files: who takes how long, and how much of the memory bandwidth is reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STEP_PARTS = ("perturb", "update")
COLOURS = {"perturb": "#4878a8", "update": "#e08a3c", "peak": "#9fbcd8", "kept": "#4878a8"}


def _bars(axis: Any, race: dict[str, Any]) -> None:
    chosen = race["results"]
    names = list(dict.fromkeys(r["who"] for r in chosen))
    unit, word = (1e3, "ms") if max(r["median_s"] for r in chosen) > 2e-3 else (1e6, "us")
    left = [0.0] * len(names)
    for part in STEP_PARTS:
        times = {r["who"]: r["median_s"] * unit for r in chosen if r["what"] == part}
        widths = [times[name] for name in names]
        axis.barh(names, widths, left=left, label=part, color=COLOURS[part])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for name, total in zip(names, left, strict=True):
        axis.text(total, name, f" {total:.3g}", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_title(f"{race['case']}, {race['label']}", fontsize=10)
    axis.set_xlabel(word)


def _memory(plt: Any, entries: list[dict[str, Any]]) -> Any:
    """The peak with what is kept in it, in fp32 where that was measured."""
    entries = [e for e in entries if isinstance(e.get("alone"), dict)]
    dtype = next((e["dtype"] for e in entries if e["dtype"] == "fp32"), entries[0]["dtype"])
    entries = [e for e in entries if e["dtype"] == dtype]
    names = [e["mode"] for e in entries]
    figure, axis = plt.subplots(figsize=(9, 0.3 * len(names) + 1.4))
    for key, name in (("peak", "at the peak of a step"), ("kept", "kept between steps")):
        sizes = [e["alone"][key] / e["alone"]["elements"] for e in entries]
        axis.barh(names, sizes, label=name, color=COLOURS[key])
        if key == "peak":
            for row, size in enumerate(sizes):
                axis.text(size, row, f" {size:.1f}", va="center", fontsize=8)
    of_gpt2 = [(row, e["gpt2"]) for row, e in enumerate(entries) if isinstance(e.get("gpt2"), dict)]
    if of_gpt2:
        axis.plot(
            [found["peak"] / found["elements"] for _, found in of_gpt2], [row for row, _ in of_gpt2],
            "|", color="black", markersize=9, label="peak with the passes of GPT-2",
        )  # fmt: skip
    axis.invert_yaxis()
    axis.margins(x=0.08)
    axis.tick_params(labelsize=8)
    axis.set_xlabel(f"bytes per {dtype} parameter beside the weights, gradients included")
    axis.legend(fontsize=8, loc="upper right")
    return figure


def plot(data: dict[str, Any], path: Path) -> Path:
    """Writes a PNG: a stacked bar per competitor (``cpu``, ``host``) or a bar per mode (``memory``)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if "memory" in data:
        figure = _memory(plt, data["memory"])
    else:
        races = data["races"]
        columns = min(2, len(races))
        rows = -(-len(races) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(5.5 * columns, 2.4 * rows), squeeze=False)
        for axis, race in zip(axes.flat, races, strict=False):
            _bars(axis, race)
        for axis in axes.flat[len(races) :]:
            axis.set_visible(False)
        axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{data['device']}, commit {data['commit']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
