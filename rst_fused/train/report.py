"""What a comparison leaves behind: a table as text, a picture and a JSON file."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import rst_fused
from rst_fused.train.runner import SHARPNESS_IMAGES, Plan, Run

COLOURS = {"base": "#7f7f7f", "sam": "#d62728", "rst": "#1f77b4", "g-rst": "#2ca02c"}
MARKERS = {"base": "o", "sam": "s", "rst": "^", "g-rst": "D"}
SCHEDULE_POINTS = 500


@dataclass(frozen=True)
class Row:
    """One method at one label noise: means over the seeds that did not diverge, None where all of them did.

    accuracy and its sample standard deviation in percent (None for a single run); seconds_per_step: median of
    the runs; relative_time: that over the base optimizer's, None where it was not run.
    """

    label_noise: float
    method: str
    label: str
    runs: int
    diverged: int
    accuracy: float | None
    accuracy_std: float | None
    cost: float
    seconds_per_step: float
    relative_time: float | None
    loss_rise: float | None
    top_eigenvalue: float | None


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


def summarise(plan: Plan, runs: Sequence[Run]) -> list[Row]:
    """A row for each label noise and method, in that order."""
    rows = []
    for noise in plan.config.label_noise:
        groups = {
            method: [run for run in runs if run.label_noise == noise and run.method == method]
            for method in plan.config.methods
        }
        times = {m: statistics.median(run.seconds_per_step for run in group) for m, group in groups.items()}
        for method, group in groups.items():
            accuracies = [run.test_accuracy for run in group if run.test_accuracy is not None]
            rows.append(
                Row(
                    label_noise=noise,
                    method=method,
                    label=plan.config.label(method),
                    runs=len(group),
                    diverged=sum(run.diverged for run in group),
                    accuracy=_mean(accuracies),
                    accuracy_std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                    cost=statistics.fmean(run.cost for run in group),
                    seconds_per_step=times[method],
                    relative_time=times[method] / times["base"] if "base" in times else None,
                    loss_rise=_mean(run.loss_rise for run in group),
                    top_eigenvalue=_mean(run.top_eigenvalue for run in group),
                )
            )
    return rows


def table(plan: Plan, rows: Sequence[Row]) -> str:
    """The rows as aligned text, with a line that says what was run and one that explains the columns."""
    config, data = plan.config, plan.data
    base = config.label("base")
    heads = ("noise", "method", "accuracy %", "pairs/step", f"time/{base}", "loss rise", "top eig.", "")
    cells = [heads]
    for row in rows:
        if row.accuracy is None:
            accuracy = "diverged"
        else:
            spread = "" if row.accuracy_std is None else f" ± {row.accuracy_std:.1f}"
            accuracy = f"{row.accuracy:.1f}{spread}"
        cells.append((
            f"{row.label_noise:.0%}", row.label, accuracy, f"{row.cost:.2f}", _cell(row.relative_time, ".2f"),
            _cell(row.loss_rise, ".4f"), _cell(row.top_eigenvalue, ".2f"),
            f"{row.diverged} of {row.runs} diverged" if row.diverged else "",
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    left = {1, len(heads) - 1}
    lines = [
        "  ".join(f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(line))
        for line in cells
    ]
    lines.insert(1, "-" * len(lines[0].rstrip()))
    title = (
        f"{data.name}, {config.model}, {len(data.train_labels)} training images, {config.epochs} epochs, "
        f"{config.seeds} seed{'s' if config.seeds > 1 else ''}, rho {config.rho:g}"
    )
    if config.shard is not None:
        title += f", {config.processes} process{'es' if config.processes > 1 else ''} ({config.shard})"
    probed = min(SHARPNESS_IMAGES, len(data.train_labels))
    note = (
        "accuracy on the test set after the last epoch, mean ± std of seeds; pairs: forward-backward pairs\n"
        f"loss rise at w + e, |e| = {config.rho:g}, and top Hessian eigenvalue on {probed} training images"
    )
    return "\n".join([title, "", *(line.rstrip() for line in lines), "", note])


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def write_json(plan: Plan, runs: Sequence[Run], rows: Sequence[Row], path: Path) -> None:
    """config, versions, schedule (with its mean cost over the run), runs (one each) and table (the rows)."""
    content = {
        "config": asdict(plan.config),
        "versions": {
            "rst_fused": rst_fused.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "schedule": {
            "text": repr(plan.schedule),
            "steps": plan.steps,
            "mean_cost": 1.0 + plan.schedule.mean_over(plan.steps),
        },
        "runs": [asdict(run) for run in runs],
        "table": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def draw(plan: Plan, rows: Sequence[Row], path: Path) -> None:
    """A PNG: accuracy against cost for each label noise, then p(t)."""
    noises = plan.config.label_noise
    figure = Figure(figsize=(3.6 * (len(noises) + 1), 3.4), layout="constrained")
    panels = figure.subplots(1, len(noises) + 1, squeeze=False)[0]
    for axes, noise in zip(panels, noises, strict=False):
        _draw_accuracy(axes, [row for row in rows if row.label_noise == noise], noise)
    _draw_schedule(panels[-1], plan)
    # One legend below all panels: inside them it would cover points.
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=len(MARKERS))
    figure.savefig(path, dpi=120)


def _draw_accuracy(axes: Axes, rows: Sequence[Row], noise: float) -> None:
    for row in rows:
        if row.accuracy is not None:
            axes.errorbar(
                row.cost, row.accuracy, yerr=row.accuracy_std, fmt=MARKERS[row.method],
                color=COLOURS[row.method], capsize=3,
            )  # fmt: skip
    axes.set(
        title=f"{noise:.0%} of the labels random" if noise else "clean labels",
        xlabel="forward-backward pairs per step", ylabel="test accuracy, %", xlim=(0.9, 2.1),
    )  # fmt: skip
    axes.grid(alpha=0.3)


def _draw_schedule(axes: Axes, plan: Plan) -> None:
    points = sorted({round(i * (plan.steps - 1) / (SCHEDULE_POINTS - 1)) for i in range(SCHEDULE_POINTS)})
    for method in plan.config.methods:
        curve = plan.schedule_of(method)
        axes.plot(
            points, [curve(t) for t in points], drawstyle="steps-post", color=COLOURS[method],
            # RST and G-RST share a curve: dashes let both be seen.
            linestyle="--" if method == "g-rst" else "-", marker=MARKERS[method], markevery=[0, len(points) - 1],
            label=plan.config.label(method),
        )  # fmt: skip
    axes.set(title="schedule", xlabel="step t", ylabel="probability of a SAM step, p(t)", ylim=(-0.05, 1.05))
    axes.grid(alpha=0.3)
