"""``python -m benchmarks gpu``: builds, tests and measures on a GPU in one go, within a budget of time.

Run it from the repository root; nothing has to be installed. The stages, in this order, each in a process of its own
and in its own limit:

  ceilings    how fast the device copies and reads memory
  build       compiles the extension in place; if that fails, what is importable is measured
  exercise    every op once over small tensors, compared with plain torch; if one is wrong, only memcheck follows
  memcheck    only then: the same under compute-sanitizer
  kernels     the time of every kernel, beside that of a copy and of a read
  ncu         counters of the norm and of Adam in bf16, by Nsight Compute
  sanitizer   the exercise under memcheck and racecheck
  tests       the tests that are marked gpu, without those of Triton
  races       the optimizer against other implementations; host time, launches, CUDA graphs
  end_to_end  training steps of ResNet-50

Others run only if --stage names them, as in a second call:

  variants       the kernels built with other constants, beside the default (after kernels)
  triton_tests   the tests of the backend triton
  tune           times block sizes and warps of the Triton kernels, which are kept and used from then on
  more_races     races at other sizes and of all backends, torch.compile
  more_training  training steps of ViT-B/16, and of both models with the other optimizer

DIR holds at most three files: gpu.json and gpu.md with what is known so far at any time, and logs.tar.gz with the
output of every stage. With --device cpu all of it is rehearsed at tiny sizes, which says nothing about speed. The exit
status is 1 if any stage failed.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from .. import record
from . import device_tests, environment, report, results
from .order import BUDGET, FIRST, ON_REQUEST, TESTS, planned
from .stages import PASSED, TAIL_LINES, read_part, run_stages, tail, write_atomically, write_part

LOGS = "logs.tar.gz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the results go")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse; default: cuda")
    parser.add_argument("--budget", metavar="SECONDS", type=float, default=BUDGET,
                        help=f"for all stages; default: {BUDGET:g}")  # fmt: skip
    parser.add_argument("--stage", nargs="+", choices=(*FIRST, *ON_REQUEST), default=list(FIRST), metavar="STAGE",
                        help=f"default: {' '.join(FIRST)}")  # fmt: skip
    parser.add_argument("--backend", nargs="+", metavar="NAME",
                        help="which to measure; default: the first that is available, in more_races all")  # fmt: skip
    parser.add_argument("--variant", nargs="+", metavar="DEFINES", help='of the stage variants, as in "NAME=1 OTHER=2"')
    parser.add_argument("--commit", metavar="TEXT", help="what is measured, where this is no git repository")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes long")
    parser.add_argument("--force", action="store_true", help="replace results in DIR")


def gathered(head: dict[str, Any], folder: Path, outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole result so far: the head, how the stages went, and what they have found."""
    data = {**head, "stages": outcomes}
    for name in (o["name"] for o in outcomes):
        part = device_tests.counts(folder / f"{name}.xml") if name in TESTS else read_part(folder / f"{name}.json")
        if part:
            data[name] = part
            if "device" in part and not head["rehearsal"]:  # the device is the one that torch ran on
                data["device"] = part["device"]
    return data


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def run(args: argparse.Namespace) -> int:
    end = time.monotonic() + args.budget
    target: Path = args.out.resolve()
    target.mkdir(parents=True, exist_ok=True)
    result, summary = target / "gpu.json", target / "gpu.md"
    record.refuse_overwrite(result, args.force)
    head = environment.collect(args.device, args.commit)
    # Not in DIR: of that, some machines give back few files only.
    with tempfile.TemporaryDirectory(prefix="rst_fused-gpu-") as work:
        data = _run_all(args, head, Path(work), end, target)
    print(f"\n{report.overview(data)}\nall numbers: {summary}, {result.name}; output of the stages: {LOGS}")
    return 0 if all(o["status"] == PASSED for o in data["stages"]) else 1


def _run_all(args: argparse.Namespace, head: dict[str, Any], work: Path, end: float, target: Path) -> dict[str, Any]:
    """Runs the stages, which write to ``work``, and keeps what is in ``target`` up to date."""
    said: set[str] = set()

    def changed(outcomes: list[dict[str, Any]]) -> None:
        data = gathered(head, work, outcomes)
        write_part(target / "gpu.json", data)
        write_atomically(target / "gpu.md", report.markdown(data))
        for o in outcomes:
            line = f"{o['name']}: {o['status']}"
            if line not in said:
                said.add(line)
                results.pack(work, target / LOGS)
                took = f" ({o['seconds']:.0f} s)" if o["seconds"] else ""
                print(f"{line}{took} {o['detail']}".rstrip(), flush=True)
                if o["status"] not in (PASSED, "running"):
                    print(tail(work / o["log"], TAIL_LINES), flush=True)

    handler = signal.signal(signal.SIGTERM, _interrupted)  # so that a stage under way is ended, too
    try:
        outcomes = run_stages(planned(args, work), work, end, changed)
    finally:
        signal.signal(signal.SIGTERM, handler)
        results.pack(work, target / LOGS)
    return gathered(head, work, outcomes)
