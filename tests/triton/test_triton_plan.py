"""Launch plans of the Triton backend, in Triton's interpreter and from PTX."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest
from side_by_side import Futures, chosen, side_by_side
from triton_processes import MISSING, PURE_PYTHON, SIMULATOR, SUPPORT, TESTS, counts, pytest_process

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
NO_SIMULATOR = not os.environ.get(SIMULATOR)


# How kernels run, and whether plans compare in Python. Both ways to compare meet every check; the interpreter is slow.
SLOW, FAST = [("interpreted", "0")], [("executed_ptx", "0"), ("executed_ptx", "1")]
ROWS = [("interpreted", "1"), *(SLOW if NO_SIMULATOR else FAST)]
IDS = {"0": "beside the extension", "1": "without it"}


@pytest.fixture(scope="module")
def processes(request: pytest.FixtureRequest) -> Iterator[Futures]:
    checks = SUPPORT / "triton_plan_checks.py", SUPPORT / "triton_interrupt_checks.py"
    parts = TESTS / "optim/test_plan_parts.py"
    # The updates within a backward are those of the op table: the interpreter alone runs them.
    released = {"interpreted": [SUPPORT / "triton_release_checks.py"]}
    rows = [(row["plugin"], row["pure_python"]) for row in chosen(request, "test_plans")]
    jobs = {
        (plugin, pure): partial(
            pytest_process, plugin, *checks, *released.get(plugin, ()), parts, "-k", "triton", **{PURE_PYTHON: pure}
        )
        for plugin, pure in rows
    }
    with side_by_side(jobs) as started:
        yield started


@pytest.mark.parametrize(("plugin", "pure_python"), ROWS, ids=[f"{plugin}-{IDS[pure]}" for plugin, pure in ROWS])
def test_plans(plugin: str, pure_python: str, processes: Futures) -> None:
    done = counts(processes[plugin, pure_python].result())
    assert done.get("passed", 0) > 110 and set(done) <= {"passed", "skipped"} and done.get("skipped", 0) <= 6
