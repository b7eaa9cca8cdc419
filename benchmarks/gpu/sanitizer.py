"""The stages ``memcheck`` and ``sanitizer``: every op under compute-sanitizer, which looks for bad accesses and races.

Only this package's kernels are checked: checking those of torch, too, takes minutes and says nothing about these.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .environment import tool
from .stages import ROOT, TAIL_LINES, tail, write_part

TOOLS = ("memcheck", "racecheck")
KERNELS = "rst_"  # in the name of every kernel of the backend cuda
SPARE = 1.0  # seconds to write what was found
FOUND = 9  # exit status of compute-sanitizer when it finds something
SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): .*")
# Without torch's cache every tensor has an allocation of its own, so that an access beyond its end is seen.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def read_log(text: str, code: int) -> dict[str, Any]:
    """The verdict on one run: the sanitizer's own summary, or the last line where there is none."""
    found = SUMMARY.findall(text) or text.split("\n")
    summary = next((line.strip() for line in reversed(found) if line.strip()), f"exit status {code}")
    status = "passed" if code == 0 else "found errors" if code == FOUND else "failed"
    return {"status": status, "summary": summary}


def command(sanitizer: str, name: str) -> list[str]:
    exercise = [sys.executable, "-m", "benchmarks.gpu.exercise", "--device", "cuda", "--backend", "cuda"]
    checked = ["--kernel-name", f"kns={KERNELS}"]
    return [sanitizer, "--tool", name, "--error-exitcode", str(FOUND), *checked, *exercise]


def run(words: list[str], limit: float, log: Path) -> dict[str, Any]:
    """One run, with its output in ``log``."""
    print("$ " + " ".join(words), flush=True)
    started = time.monotonic()
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                words, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=output, stderr=subprocess.STDOUT,
                timeout=limit,
            )  # fmt: skip
            verdict = read_log(log.read_text(errors="replace"), done.returncode)
        except subprocess.TimeoutExpired:
            verdict = {"status": "timed out", "summary": f"stopped after {limit:.0f} s"}
    print(tail(log, TAIL_LINES), flush=True)
    return {**verdict, "seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--seconds", type=float, required=True, help="for all runs together")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds - SPARE
    found: dict[str, Any] = {}
    sanitizer = tool("compute-sanitizer") if args.device == "cuda" else None
    for i, name in enumerate(args.tool):
        if sanitizer is None:
            found[name] = {"status": "not available", "summary": "compute-sanitizer was not found", "seconds": 0.0}
        else:
            limit = max(1.0, (end - time.monotonic()) / (len(args.tool) - i))
            found[name] = run(command(sanitizer, name), limit, args.out.with_name(f"{args.out.stem}-{name}.log"))
        write_part(args.out, found)
    return 0 if all(f["status"] in ("passed", "not available") for f in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
