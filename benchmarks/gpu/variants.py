"""The stage ``variants``: the CUDA kernels built with other constants, each timed beside the default build.

Each variant is compiled in a copy of the source tree, all of them at once, and then timed from there, one after the
other. The default is timed before and after them: a difference as small as between those two is noise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import environment
from .stages import ROOT, read_part, write_part

# What is defined in place of the defaults in csrc/cuda. Independent constants share a build.
VARIANTS = (
    "RST_CUDA_NORM_BLOCKS=2 RST_CUDA_ADAM_BLOCKS=1",
    "RST_CUDA_CHUNK=16384",
    "RST_CUDA_CHUNK=32768",
    "RST_CUDA_CHUNK=65536",
)
VARIABLE = "RST_FUSED_CUDA_DEFINES"  # read by setup.py
DEFAULT, AGAIN = "default", "default again"
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "rst_fused", "kernels", "benchmarks")
BUILD_SHARE = 0.5  # of the time
SPARE = 2.0  # seconds to write what was found


def copy_sources(folder: Path) -> None:
    """Without what was built or measured in them."""
    folder.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy2(source, folder / name)


def building(defines: str, jobs: int) -> tuple[list[str], dict[str, str]]:
    """The command that builds a variant in its folder, and what it adds to the environment."""
    more = {**environment.building(), VARIABLE: defines, "MAX_JOBS": str(jobs)}
    return [sys.executable, "setup.py", "build_ext", "--inplace"], more


def timing(out: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.kernels", "--device", "cuda", "--brief", "--backend", "cuda",
            "--out", str(out)]  # fmt: skip


def run(words: list[str], folder: Path, more: dict[str, str], limit: float, log: Path) -> str:
    """Runs a command in ``folder``; returns what went wrong, or nothing."""
    with log.open("ab") as output:
        try:
            done = subprocess.run(
                words, cwd=folder, env={**os.environ, **more}, stdout=output, stderr=subprocess.STDOUT,
                timeout=max(1.0, limit),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
    return f"exit status {done.returncode}" if done.returncode else ""


def compared(parts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kernel, in each mode, the seconds in every build, and their ratio to those in the default one."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for build, part in parts.items():
        for timed in part.get("kernels", []):
            for k in timed["kernels"]:
                key = (timed["mode"], k["kernel"])
                row = found.setdefault(key, {"mode": key[0], "kernel": key[1], "seconds": {}, "ratios": {}})
                row["seconds"][build] = k["median_s"]
    for row in found.values():
        default = row["seconds"].get(DEFAULT)
        row["ratios"] = {build: s / default for build, s in row["seconds"].items()} if default else {}
    return list(found.values())


def build_all(variants: list[str], folders: list[Path], logs: list[Path], limit: float) -> dict[str, str]:
    """Builds all at once; variant -> what went wrong, or nothing."""
    jobs = max(1, (os.cpu_count() or 1) // len(variants))

    def build(variant: str, folder: Path, log: Path) -> str:
        copy_sources(folder)
        words, more = building(variant, jobs)
        return run(words, folder, more, limit, log)

    with ThreadPoolExecutor(len(variants)) as pool:
        return dict(zip(variants, pool.map(build, variants, folders, logs), strict=True))


def measure(variants: list[str], out: Path, seconds: float) -> dict[str, Any]:
    """Builds and times everything, and writes what is known after each; the result is what was written last."""
    end = time.monotonic() + seconds - SPARE
    data: dict[str, Any] = {"variants": variants, "kernels": [], "notes": [], "errors": []}

    def log(i: int) -> Path:
        return out.with_name(f"{out.stem}-{i}.log")

    with tempfile.TemporaryDirectory(prefix="rst_fused-variants-") as place:
        folders = [Path(place, str(i)).resolve() for i in range(len(variants))]
        logs = [log(i) for i in range(len(variants))]
        failures = build_all(variants, folders, logs, BUILD_SHARE * seconds)
        data["notes"] += [f"{v}: not built ({words}, {log(i).name})"
                          for i, (v, words) in enumerate(failures.items()) if words]  # fmt: skip
        write_part(out, data)
        built = [(v, folder, path) for v, folder, path in zip(variants, folders, logs, strict=True) if not failures[v]]
        turns = [(DEFAULT, ROOT, log(len(variants))), *built, (AGAIN, ROOT, log(len(variants)))]
        parts: dict[str, dict[str, Any]] = {}
        for i, (build, folder, path) in enumerate(turns):
            found = Path(place, f"{i}.json")
            words = run(timing(found), folder, {}, (end - time.monotonic()) / (len(turns) - i), path)
            parts[build] = read_part(found)
            data["errors"] += [f"{build}: not timed ({words}, {path.name})"] if words else []
            if parts[build].get("package", str(folder)) != str(folder):
                raise RuntimeError(f"{build}: rst_fused was loaded from {parts[build]['package']}, not from {folder}")
            data["kernels"] = compared(parts)
            write_part(out, data)
    return data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), metavar="DEFINES")
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    if args.device == "cpu":
        write_part(args.out, {"notes": ["variants: nothing is compiled in a rehearsal"], "errors": []})
        return 0
    return 1 if measure(args.variant, args.out, args.seconds)["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
