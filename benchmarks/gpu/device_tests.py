"""How the tests that need a GPU are run, and what became of them."""

from __future__ import annotations

import importlib.util
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

WORKERS = 8  # of pytest-xdist; each has the device to itself for moments only
NO_TESTS = 5  # pytest's exit status when no test is selected
COUNTS = ("tests", "failures", "errors", "skipped")
# The backend reference is plain torch, whose answers on a GPU nobody waits for.
CUDA, TRITON = "not triton and not reference", "triton and not reference"


def command(junit: Path, chosen: str) -> list[str]:
    """In several processes where pytest-xdist is installed: a test on a GPU is mostly work of the host."""
    parallel = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-m", "gpu", "-k", chosen, "-q", *parallel, f"--junitxml={junit}"]


def counts(path: Path) -> dict[str, int]:
    """Of pytest's junit file: how many tests ran, failed and so on; empty without a file."""
    try:
        suite = ElementTree.parse(path).getroot().find("testsuite")
    except (OSError, ElementTree.ParseError):
        return {}
    return {} if suite is None else {name: int(suite.get(name, 0)) for name in COUNTS}
