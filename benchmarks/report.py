"""``python -m benchmarks report``: prints result files as Markdown, and draws them."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import gpu, record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="*", help="result files; default: all of benchmarks/results")
    parser.add_argument("--plot", metavar="DIR", help="also draw each file but those of gpu there (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    files = [Path(name) for name in args.file] or sorted(record.RESULTS.glob("*.json"))
    if not files:
        print(f"no result files in {record.RESULTS}")
        return 1
    for path in files:
        data = record.read(path)
        of_gpu = data["command"] == "gpu"
        print(gpu.report.markdown(data) if of_gpu else record.markdown(data))
        if args.plot and not of_gpu:
            from .plots import plot

            Path(args.plot).mkdir(parents=True, exist_ok=True)
            print(f"drawn in {plot(data, Path(args.plot, path.stem + '.png'))}\n")
    return 0
