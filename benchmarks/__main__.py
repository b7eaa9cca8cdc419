"""The command line. Subcommands are modules with ``add_arguments(parser)`` and ``run(args) -> status``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from . import cpu, gpu, host, machine_code, memory, report, stores

COMMANDS = {
    "cpu": cpu, "gpu": gpu, "host": host, "machine-code": machine_code, "memory": memory, "report": report,
    "stores": stores,
}  # fmt: skip
MEASURING = ("cpu", "host", "memory", "stores")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        words = (module.__doc__ or "").split(": ", 1)[1]
        sub = commands.add_parser(name, help=words.splitlines()[0], description=words)
        module.add_arguments(sub)
        if name in MEASURING:
            sub.add_argument("--threads", type=int, default=2, help="default: 2")
            sub.add_argument("--out", metavar="FILE", help="JSON file; its summary is written beside it as .md")
            sub.add_argument("--force", action="store_true", help="replace an existing result file")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if "threads" in args:
        torch.set_num_threads(args.threads)
    try:
        return COMMANDS[args.command].run(args)
    except (FileExistsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
