"""Tests of Triton run in processes of their own: what they change in triton would affect other tests.

And what stands in for launches where none are made.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
REMAINDERS = SUPPORT / "remainder_checks.py"
MISSING = None if importlib.util.find_spec("triton") is not None else "triton is not installed (pip install triton)"
SIMULATOR = "RST_FUSED_PTXSIM"
PURE_PYTHON = "RST_FUSED_TESTS_PURE_PYTHON"  # 1: plans of Triton find no extension, and compare in Python
# For -k: tests of one dtype, and tests of calls that mix all dtypes or have none in their name.
FLOAT32 = "float32"
MIXED = "not many_steps and not -float and not bfloat16 and not complex"


def recorder(launches: list[tuple[Any, ...]]) -> Callable[..., Any]:
    """In the place of launch_groups.starter: notes (function, device, programs, arguments, constants, warps)."""

    def starter(function: Any, device: Any, constants: dict[str, Any], warps: int) -> Callable[..., None]:
        def start(programs: int, args: Any, note: Callable[[Any], None]) -> None:
            launches.append((function, device, programs, args, constants, warps))
            note(None)

        return start

    return starter


def run_python(*arguments: object, folder: Path = TESTS.parent, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python process that imports the package from ``folder``."""
    paths = [str(folder), str(folder / "tests/support"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), **variables}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def run_pytest(plugin: str, *arguments: object, folder: Path = TESTS.parent, **variables: str) -> dict[str, int]:
    return counts(pytest_process(plugin, *arguments, folder=folder, **variables))


def pytest_process(plugin: str, *arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "pytest", "-p", plugin, "-q", "-p", "no:cacheprovider", *arguments, **more)


def counts(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """{"passed": .., "failed": ..}; the output of failures becomes the test's own."""
    print(done.stdout[-20000:], done.stderr[-4000:])
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    return {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", summary)}
