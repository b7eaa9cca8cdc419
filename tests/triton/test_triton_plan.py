"""Launch plans of the Triton backend, in Triton's interpreter and from PTX."""

from __future__ import annotations

import os

import pytest
from triton_processes import MISSING, PURE_PYTHON, SIMULATOR, SUPPORT, TESTS, run_pytest

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
NO_SIMULATOR = None if os.environ.get(SIMULATOR) else f"{SIMULATOR} does not name the folder of a PTX interpreter"


@pytest.mark.parametrize("pure_python", ["0", "1"], ids=["beside the extension", "without it"])
@pytest.mark.parametrize(
    "plugin",
    [
        "interpreted",
        pytest.param("executed_ptx", marks=pytest.mark.skipif(NO_SIMULATOR is not None, reason=str(NO_SIMULATOR))),
    ],
)
def test_plans(plugin: str, pure_python: str) -> None:
    checks = SUPPORT / "triton_plan_checks.py", SUPPORT / "triton_interrupt_checks.py"
    # The updates within a backward are those of the op table.
    released = [SUPPORT / "triton_release_checks.py"] if plugin == "interpreted" else []
    parts = TESTS / "optim/test_plan_parts.py"
    done = run_pytest(plugin, *checks, *released, parts, "-k", "triton", **{PURE_PYTHON: pure_python})
    assert done.get("passed", 0) > 110 and set(done) <= {"passed", "skipped"} and done.get("skipped", 0) <= 6
