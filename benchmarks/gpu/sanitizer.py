"""The stage ``sanitizer``: every op under compute-sanitizer, which looks for bad accesses and races."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .stages import ROOT, TAIL_LINES, tail, write_part

TOOLS = ("memcheck", "racecheck")
SPARE = 1.0  # seconds to write what was found
FOUND = 9  # exit status of compute-sanitizer when it finds something
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): .*")


def find(name: str = "compute-sanitizer") -> str | None:
    path = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    return shutil.which(name, path=path)


def read_log(text: str, code: int) -> dict[str, Any]:
    """The verdict on one run: the sanitizer's own summary, or the last line where there is none."""
    found = SUMMARY.findall(text) or text.split("\n")
    summary = next((line.strip() for line in reversed(found) if line.strip()), f"exit status {code}")
    status = "passed" if code == 0 else "found errors" if code == FOUND else "failed"
    return {"status": status, "summary": summary}


def run(command: list[str], environment: dict[str, str], limit: float, log: Path) -> dict[str, Any]:
    """One run, with its output in ``log``."""
    print("$ " + " ".join(command), flush=True)
    started = time.monotonic()
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT,
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
    parser.add_argument("--backend", nargs="+", default=[])
    parser.add_argument("--seconds", type=float, required=True, help="for all runs together")
    args = parser.parse_args()
    exercise = [sys.executable, "-m", "benchmarks.gpu.exercise", "--device", args.device]
    exercise += ["--backend", *args.backend] if args.backend else []
    # Without torch's cache every tensor has an allocation of its own, so that an access beyond its end is seen.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    end = time.monotonic() + args.seconds - SPARE

    def log(name: str) -> Path:
        return args.out.with_name(f"{args.out.stem}-{name}.log")

    found = {"plain": run(exercise, {}, (end - time.monotonic()) / (1 + len(TOOLS)), log("plain"))}
    write_part(args.out, found)
    sanitizer = find() if args.device == "cuda" else None
    for i, tool in enumerate(TOOLS):
        if sanitizer is None:
            found[tool] = {"status": "not available", "summary": "compute-sanitizer was not found", "seconds": 0.0}
        else:
            command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *exercise]
            limit = max(1.0, (end - time.monotonic()) / (len(TOOLS) - i))
            found[tool] = run(command, environment, limit, log(tool))
        write_part(args.out, found)
    return 0 if all(f["status"] in ("passed", "not available") for f in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
