"""The command `rst-fused`: one module per subcommand, imported only when it is the one that was asked for.

Each such module has add_arguments(parser) and run(args) -> exit status. Because of the lazy import,
`rst-fused info` works without the packages that training needs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import rst_fused

COMMANDS = {
    "train": ("rst_fused.train", "train SGD, SAM, RST and G-RST on real data and compare them"),
    "info": ("rst_fused.info_cli", "show the build, the backends and the machine"),
    "schedule": ("rst_fused.schedule_cli", "print and plot a schedule p(t) and what it costs"),
}

# Modules that come with the extra `train`; see pyproject.toml.
TRAIN_EXTRA = {"sklearn", "matplotlib", "tqdm", "PIL", "numpy"}


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser with every subcommand's name and help, and the options of `command` alone."""
    parser = argparse.ArgumentParser(prog="rst-fused", description="Randomized Sharpness-Aware Training.")
    parser.add_argument("--version", action="version", version=f"rst_fused {rst_fused.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module_name, help_text) in COMMANDS.items():
        description = f"{help_text[0].upper()}{help_text[1:]}."
        subparser = subparsers.add_parser(name, help=help_text, description=description)
        if name == command:
            module = importlib.import_module(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status; `argv` defaults to the process's arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else None
    try:
        args = build_parser(command).parse_args(arguments)
        return args.run(args)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in TRAIN_EXTRA:
            raise
        print(
            f"rst-fused {command}: the package {package!r} is not installed; "
            f"pip install 'rst_fused[train]' brings everything that this command needs",
            file=sys.stderr,
        )
        return 1
