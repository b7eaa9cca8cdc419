"""Pictures of result files: who takes how long, and how much of the memory bandwidth is reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STEP_PARTS = ("perturb", "update")
COLOURS = {"perturb": "#4878a8", "update": "#e08a3c"}


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


def plot(data: dict[str, Any], path: Path) -> Path:
    """Writes a PNG: a stacked bar per competitor (``cpu``, ``host``) or a bar per mode (``memory``)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if "memory" in data:
        figure, axis = plt.subplots(figsize=(7, 0.32 * len(data["memory"]) + 1.2))
        labels = [f"{m['mode']}, {m['dtype']}" for m in data["memory"]]
        axis.barh(labels, [m["measured"] for m in data["memory"]], color=COLOURS["perturb"])
        axis.invert_yaxis()
        axis.set_xlabel("peak extra bytes per parameter")
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
