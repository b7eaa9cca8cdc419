"""``rst-fused schedule``: print and plot a schedule p(t), its cost and the draws that a seed gives."""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from itertools import accumulate
from pathlib import Path

from rst_fused import schedule as schedules
from rst_fused.schedule import FAMILIES, Schedule, draw, for_cost, warmup

PARAMETERS = ("p", "b", "every", "offset")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``rst-fused schedule``."""
    parser.add_argument("family", choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--steps", type=int, default=1000, metavar="T", help="steps of the run (1000)")
    parser.add_argument("--p", type=float, help="probability; its meaning depends on the family")
    parser.add_argument("--b", type=float, help="late, early, piecewise: the switch, as a share of T")
    parser.add_argument("--every", type=int, metavar="K", help="interval: a SAM step every K steps")
    parser.add_argument("--offset", type=int, metavar="N", help="interval: the first SAM step (0)")
    parser.add_argument("--cost", type=float, metavar="C", help="solve for C pairs per step, warm-up aside")
    parser.add_argument("--warmup", type=int, default=0, metavar="N", help="base steps at the start (0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (0)")
    parser.add_argument("--output", type=Path, metavar="PNG", help="also write a picture (needs matplotlib)")


def build(args: argparse.Namespace) -> Schedule:
    """The schedule that the arguments ask for. Raises ValueError where they do not fit the family."""
    given = {name: getattr(args, name) for name in PARAMETERS if getattr(args, name) is not None}
    if args.cost is not None:
        schedule = for_cost(args.family, args.cost, args.steps, **given)
    else:
        family = getattr(schedules, args.family)
        known = inspect.signature(family).parameters
        missing = [name for name, par in known.items() if par.default is par.empty and name != "steps"]
        if absent := [f"--{name}" for name in missing if name not in given]:
            raise ValueError(f"{args.family} needs {' and '.join(absent)} (or --cost)")
        if extra := [f"--{name}" for name in given if name not in known]:
            raise ValueError(f"{args.family} takes no {' or '.join(extra)}")
        schedule = family(**given, **({"steps": args.steps} if "steps" in known else {}))
    return warmup(schedule, args.warmup) if args.warmup else schedule


def plot(values: list[float], width: int = 60, height: int = 10) -> str:
    """A bar chart of values in [0, 1] as plain text: a column per bin of steps, as high as the bin's mean."""
    width = min(width, len(values))
    edges = [column * len(values) // width for column in range(width + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    lines = []
    for row in range(height, 0, -1):
        # A cell is filled once its column covers half of it.
        cells = "".join("#" if mean * height >= row - 0.5 else " " for mean in means)
        lines.append(f"{row / height:4.1f} |{cells}".rstrip())
    last = str(len(values) - 1)
    lines += ["     +" + "-" * width, "      0" + last.rjust(width - 1) if width > len(last) else "      0"]
    return "\n".join(lines)


def report(schedule: Schedule, steps: int, seed: int) -> str:
    """The text that the command prints for a run of ``steps`` steps with the draws of ``seed``."""
    values = [schedule(t) for t in range(steps)]
    fired = sum(draw(seed, t, p) for t, p in enumerate(values))
    mean = math.fsum(values) / steps
    points = sorted({round(i * (steps - 1) / 9) for i in range(10)})
    width = len(str(steps - 1))
    return "\n".join([
        repr(schedule), "",
        *(f"p({t:{width}d}) = {values[t]:.4f}" for t in points), "",
        plot(values), "",
        f"mean p       {mean:.6g}",
        f"mean cost    {1 + mean:.6g} forward-backward pairs per step (SGD 1, SAM 2)",
        f"seed {seed}: {fired} SAM steps in {steps} steps, {1 + fired / steps:.6g} pairs per step",
    ])  # fmt: skip


def save(schedule: Schedule, steps: int, seed: int, path: Path) -> None:
    """Writes a picture: p(t) above, the SAM steps drawn so far against their expected number below."""
    from matplotlib.figure import Figure

    values = [schedule(t) for t in range(steps)]
    figure = Figure(figsize=(7, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(values, drawstyle="steps-post")
    top.axhline(math.fsum(values) / steps, color="gray", linestyle="--", label="mean p")
    top.set(title=repr(schedule), ylabel="p(t)", ylim=(-0.03, 1.03))
    top.legend()
    bottom.plot(list(accumulate(draw(seed, t, p) for t, p in enumerate(values))), label=f"drawn, seed {seed}")
    bottom.plot(list(accumulate(values)), color="gray", linestyle="--", label="expected")
    bottom.set(xlabel="step t", ylabel="SAM steps so far")
    bottom.legend()
    figure.savefig(path, dpi=150)


def run(args: argparse.Namespace) -> int:
    """Prints the report and writes the picture. Returns 0, or 2 after a message on stderr: wrong input."""
    try:
        if args.steps < 1:
            raise ValueError(f"--steps {args.steps}: expected an integer >= 1")
        schedule = build(args)
        print(report(schedule, args.steps, args.seed))
    except ValueError as error:
        print(f"rst-fused schedule: {error}", file=sys.stderr)
        return 2
    if args.output is not None:
        try:
            save(schedule, args.steps, args.seed, args.output)
        except (OSError, ValueError) as error:
            print(f"rst-fused schedule: --output {args.output}: {error}", file=sys.stderr)
            return 2
        print(f"wrote {args.output}")
    return 0
