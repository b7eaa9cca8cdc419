"""The Triton kernels as a GPU gets them, without a GPU: compiled offline, and their PTX executed on the op table."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from triton_processes import MISSING, MIXED, REMAINDERS, SIMULATOR, SUPPORT, TESTS, run_pytest, run_python

NO_SIMULATOR = None if os.environ.get(SIMULATOR) else f"{SIMULATOR} does not name the folder of a PTX interpreter"
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
simulated = pytest.mark.skipif(NO_SIMULATOR is not None, reason=str(NO_SIMULATOR))
NUMBERS_ALONE = ("grad_norm finish", "finish_norm")  # kernels that work on no parameters
MOST_REGISTERS = 128  # with 128 threads, 4 programs and 64 KiB of loads are in flight on a multiprocessor
MOST_SECONDS = 20.0  # per kernel; 0.2 to 0.7 on an idle machine


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Kernels that both tests need are compiled once; none comes from an earlier run."""
    return str(tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def report(cache: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path: Path = tmp_path_factory.mktemp("report") / "report.json"
    done = run_python(SUPPORT / "triton_offline.py", path, TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_kernel_is_compiled(report: list[dict[str, Any]]) -> None:
    """VARIANTS of triton_offline has a row for each."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (TESTS.parent / "kernels").glob("*.py"))
    assert {row["function"] for row in report} == set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))


def test_an_update_has_the_name_of_its_rule(report: list[dict[str, Any]]) -> None:
    """In profilers: they all are update_kernel with another rule. By that name its launch configuration is kept."""
    updates = {row["symbol"] for row in report if row["function"] == "update_kernel"}
    assert updates == {"sgd_step_kernel", "adam_step_kernel", "lion_step_kernel"}
    assert {row["symbol"] for row in report if row["function"] == "perturb_kernel"} == {"perturb_kernel"}


def test_every_architecture_compiles_without_spills(report: list[dict[str, Any]]) -> None:
    """A stack frame may hold what a call to division needs, never a spilled register."""
    assert {row["target"] for row in report} == {"sm_80", "sm_90", "sm_100", "gfx942", "gfx1100"}
    assert [row for row in report if row["spills"]] == []
    assert [row for row in report if row["target"].startswith("sm") and row["registers"] > MOST_REGISTERS] == []


def test_all_operands_have_16_byte_accesses(report: list[dict[str, Any]]) -> None:
    rows = [row for row in report if row["kernel"] not in NUMBERS_ALONE]
    assert [row for row in rows if 16 not in row["ld"]] == []
    assert [row for row in rows if 16 not in row["st"] and not row["kernel"].startswith("grad_norm")] == []


def test_whole_blocks_on_amd_have_no_narrow_accesses(report: list[dict[str, Any]]) -> None:
    """Beside float32 the least is 4 numbers of 16 bits. On NVIDIA triton_checks counts the bytes."""
    rows = [row for row in report if row["target"].startswith("gfx") and row["kernel"] not in NUMBERS_ALONE]
    assert len({row["target"] for row in rows}) == 2
    kinds = [(row["kernel"], row["target"], row["buffer"]) for row in rows]

    def has_both(kernel: str) -> bool:
        mixing = "master mixing" in kernel or "remainder mixing" in kernel
        return mixing or ("rounding" in kernel and "bf16" not in kernel)

    assert [row for row in kinds if row[2] not in ([16], [8, 16] if has_both(row[0]) else [16])] == []


def test_only_sums_use_shared_memory(report: list[dict[str, Any]]) -> None:
    """Elsewhere it would mean that threads exchange data, because their accesses do not match."""
    assert [row for row in report if row["shared"] and not row["kernel"].startswith("grad_norm")] == []


def test_compile_time(report: list[dict[str, Any]]) -> None:
    assert [row for row in report if row["seconds"] > MOST_SECONDS] == []


@simulated
def test_op_table(cache: str) -> None:
    of_ops = (TESTS / f"ops/test_{name}.py" for name in ("ops", "stochastic_rounding", "shards", "state_rounding"))
    chosen = f"triton and ({MIXED} or test_shards or known_bits) or triton_checks or agree_bit_for_bit"
    chosen += " or remainder_checks and (adamw or asam-stochastic or test_norm or test_shards)"
    files = *of_ops, SUPPORT / "triton_checks.py", REMAINDERS
    done = run_pytest("executed_ptx", *files, "-k", chosen, TRITON_CACHE_DIR=cache)
    assert done.get("passed", 0) > 400 and set(done) == {"passed"}
