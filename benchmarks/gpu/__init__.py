"""``python -m benchmarks gpu``: builds, tests and measures on a GPU in one go, within a budget of time.

Run it from the repository root; nothing has to be installed. The stages, each in a process of its own and in its own
limit, with its output in DIR/<stage>.log:

  build       compiles the extension in place; if that fails, what is importable is measured
  tests       the tests that are marked gpu
  sanitizer   every op once over small tensors, plainly and under compute-sanitizer
  kernels     the ops and the optimizer against other implementations and against a copy
  end_to_end  training steps of ResNet-50 and ViT-B/16

One more runs only if --stage names it, before the kernels are measured:

  tune        times block sizes and warps of the Triton kernels, which are kept and used from then on

DIR/gpu.json and DIR/gpu.md hold what is known so far at any time. With --device cpu all of it is rehearsed at tiny
sizes, which says nothing about speed. The exit status is 1 if any stage failed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from .. import record
from . import environment, report
from .stages import LIMIT, PASSED, TAIL_LINES, Stage, read_part, run_stages, tail, write_atomically, write_part

NAMES = ("build", "tests", "sanitizer", "kernels", "end_to_end")
ON_REQUEST = ("tune",)
PARTS = ("sanitizer", "tune", "kernels", "end_to_end")  # stages that write what they find to DIR/<stage>.json
COUNTS = ("tests", "failures", "errors", "skipped")
NO_TESTS = 5  # pytest's exit status when no test is selected


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where logs and results go")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse; default: cuda")
    parser.add_argument("--budget", metavar="SECONDS", type=float, default=480.0, help="for all stages; default: 480")
    parser.add_argument("--stage", nargs="+", choices=(*NAMES, *ON_REQUEST), default=list(NAMES), metavar="STAGE",
                        help=f"default: {' '.join(NAMES)}")  # fmt: skip
    parser.add_argument("--backend", nargs="+", metavar="NAME", help="which to measure; default: cuda and triton")
    parser.add_argument("--commit", metavar="TEXT", help="what is measured, where this is no git repository")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes long")
    parser.add_argument("--force", action="store_true", help="replace results in DIR")


def planned(args: argparse.Namespace, folder: Path) -> list[Stage]:
    """What is to run, in order."""
    python, rehearses = sys.executable, args.device == "cpu"
    chosen = ["--backend", *args.backend] if args.backend else []

    def measuring(name: str, *more: str) -> list[str]:
        out = str(folder / f"{name}.json")
        return [python, "-m", f"benchmarks.gpu.{name}", "--device", args.device, "--out", out, *more, *chosen]

    pytest = [python, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={folder / 'tests.xml'}"]
    everything = [
        # A rehearsal goes through setup.py but compiles nothing: its machine need not have the compilers.
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 0.40,
              {"RST_FUSED_BUILD_EXTENSION": "0"} if rehearses else
              {"RST_FUSED_BUILD_EXTENSION": "1", **environment.architecture()}),
        # On a GPU it would be a mistake if no test were selected; on the CPU it may be so.
        Stage("tests", pytest, 0.35, accepted=(0, NO_TESTS) if rehearses else (0,),
              meanings={NO_TESTS: "no test was selected"}),
        Stage("sanitizer", measuring("sanitizer", "--seconds", LIMIT), 0.25),
        Stage("tune", measuring("tune"), 0.75),
        Stage("kernels", measuring("kernels", *["--no-compile"] * args.no_compile), 0.65),
        Stage("end_to_end", measuring("end_to_end"), 1.0),
    ]  # fmt: skip
    return [stage for stage in everything if stage.name in args.stage]


def counts(path: Path) -> dict[str, int]:
    """Of pytest's junit file: how many tests ran, failed and so on; empty without a file."""
    try:
        suite = ElementTree.parse(path).getroot().find("testsuite")
    except (OSError, ElementTree.ParseError):
        return {}
    return {} if suite is None else {name: int(suite.get(name, 0)) for name in COUNTS}


def gathered(head: dict[str, Any], folder: Path, outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole result so far: the head, how the stages went, and what they have found."""
    ran = {o["name"] for o in outcomes}
    data = {**head, "stages": outcomes}
    if "tests" in ran:
        data["tests"] = counts(folder / "tests.xml")
    parts = {name: read_part(folder / f"{name}.json") for name in PARTS if name in ran}
    if not head["rehearsal"]:  # the device is the one that torch ran on
        data["device"] = next((part["device"] for part in parts.values() if "device" in part), head["device"])
    return data | parts


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def run(args: argparse.Namespace) -> int:
    end = time.monotonic() + args.budget
    folder: Path = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    result, summary = folder / "gpu.json", folder / "gpu.md"
    record.refuse_overwrite(result, args.force)
    for name in (*(f"{part}.json" for part in PARTS), "tests.xml"):
        (folder / name).unlink(missing_ok=True)  # of an earlier run
    head = environment.collect(args.device, args.commit)
    said: set[str] = set()

    def changed(outcomes: list[dict[str, Any]]) -> None:
        data = gathered(head, folder, outcomes)
        write_part(result, data)
        write_atomically(summary, report.markdown(data))
        for o in outcomes:
            line = f"{o['name']}: {o['status']}"
            if line not in said:
                said.add(line)
                print(line + (f" ({o['seconds']:.0f} s) {o['detail']}" if o["seconds"] else ""), flush=True)
                if o["status"] not in (PASSED, "running"):
                    print(tail(folder / o["log"], TAIL_LINES), flush=True)

    handler = signal.signal(signal.SIGTERM, _interrupted)  # so that a stage under way is ended, too
    try:
        outcomes = run_stages(planned(args, folder), folder, end, changed)
    finally:
        signal.signal(signal.SIGTERM, handler)
    print(f"\n{report.overview(gathered(head, folder, outcomes))}\nall numbers: {summary}, {result.name}")
    return 0 if all(o["status"] == PASSED for o in outcomes) else 1
