"""Which stages there are, in which order, and how each of them is run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import device_tests, environment
from .device import Gpu, Rehearsal
from .stages import LIMIT, Stage

# Without --stage. The order is that of what must be known first, should the time run out: is it right, what does each
# kernel reach, why, and only then how it compares.
FIRST = ("ceilings", "build", "exercise", "memcheck", "kernels", "ncu", "sanitizer", "tests", "races", "end_to_end")
ON_REQUEST = ("variants", "triton_tests", "tune", "more_races", "more_training")
TESTS = {"tests": device_tests.CUDA, "triton_tests": device_tests.TRITON}
RIGHT = "exercise"  # the stage that must pass before anything else is worth the time
BUDGET = 540.0  # seconds: with what comes before and after, within ten minutes


def planned(args: argparse.Namespace, folder: Path) -> list[Stage]:
    """What is to run, in order. Each has a share of the time that is left, so that of 540 s the first stages get about
    twice what they are expected to need: 15 s, 60, 20, 90 (kernels), 45, 40, 120, 90 and 60."""
    python, rehearses = sys.executable, args.device == "cpu"
    chosen = ["--backend", *args.backend] if args.backend else []
    every = chosen or ["--backend", *(Rehearsal if rehearses else Gpu).backends]
    compiled = ["--no-compile"] * args.no_compile

    def of(name: str, share: float, *more: str, module: str = "", needs: str = RIGHT, after: str = "") -> Stage:
        out = ["--out", str(folder / f"{name}.json")]
        command = [python, "-m", f"benchmarks.gpu.{module or name}", "--device", args.device, *out, *more]
        return Stage(name, command, share, needs=needs, after_failure_of=after)

    def tests(name: str, share: float) -> Stage:
        # On a GPU it would be a mistake if no test were selected; on the CPU it may be so.
        accepted = (0, device_tests.NO_TESTS) if rehearses else (0,)
        command = device_tests.command(folder / f"{name}.xml", TESTS[name])
        return Stage(name, command, share, accepted=accepted, meanings={device_tests.NO_TESTS: "no test was selected"},
                     needs=RIGHT)  # fmt: skip

    everything = [
        of("ceilings", 0.08, needs=""),
        # A rehearsal goes through setup.py but compiles nothing: its machine need not have the compilers.
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 0.40,
              {"RST_FUSED_BUILD_EXTENSION": "0"} if rehearses else environment.building()),
        of("exercise", 0.20, *chosen, needs=""),
        of("memcheck", 0.50, "--tool", "memcheck", "--seconds", LIMIT, module="sanitizer", needs="", after=RIGHT),
        of("kernels", 0.30, *chosen),
        of("variants", 0.60, "--seconds", LIMIT, *(["--variant", *args.variant] if args.variant else [])),
        of("ncu", 0.20),
        of("sanitizer", 0.25, "--seconds", LIMIT),
        tests("tests", 0.50),
        of("races", 0.60, *chosen, *compiled),
        of("end_to_end", 0.90, *chosen),
        tests("triton_tests", 0.50),
        of("tune", 0.40),
        of("more_races", 0.70, "--more", *every, *compiled, module="races"),
        of("more_training", 1.0, "--more", *chosen, module="end_to_end"),
    ]  # fmt: skip
    return [stage for stage in everything if stage.name in args.stage]
