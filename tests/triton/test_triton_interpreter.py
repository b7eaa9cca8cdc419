"""The op table on the Triton kernels in Triton's interpreter, on the CPU; and which errors these tests catch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from triton_processes import FLOAT32, MISSING, REMAINDERS, TESTS, run_pytest

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

ERRORS = "wrong_argument and (perturb_ or _norm)"
SHARDS = "test_shards and not long"
# (file, formula, the same formula broken, a test that sees it)
BROKEN = [
    ("sam_math.py", "tl.fma(scale, g, w)", "tl.fma(-scale, g, w)", "perturb_-negative_rho-float32-triton"),
    ("sam_math.py", "one_minus_gamma * g1", "gamma * g1", "restore_-gamma_0-float32-triton"),
    ("sgd_step.py", "tl.fma(momentum, buffer, d)", "tl.fma(momentum, d, buffer)", "sgd_step_-nesterov-float32-triton"),
    ("adam_step.py", "bias2_sqrt) + eps", "bias2_sqrt + eps)", "adam_step_-groups-float32-triton"),
    ("adam_step.py", "maximum(state[2], v)", "state[2]", "adam_step_-amsgrad_small-float32-triton"),
    ("lion_step.py", "sign(c), decay * w", "sign(c), w", "lion_step_-groups-float32-triton"),
    ("multi_tensor_apply.py", "offsets < count, 0.0", "offsets < count - 1, 0.0", "grad_norm-small-float32-triton"),
    ("grad_norm.py", "sum += tl.load(squares + i)", "sum += tl.load(squares)", "finish_norm-several-float64-triton"),
    ("random_bits.py", "to(tl.int64) * shard[4]", "to(tl.int64) * shard[3]",
     "SHARDS[columns-False-False-bfloat16-triton]"),
    ("sam_math.py", "(bits + 0x8000) >> 16", "bits >> 16", "REMAINDERS::test_update[sgd-]"),
    ("update.py", "remainder[0], at, count, rest,", "remainder[0], at, count, rest + 1,",
     "REMAINDERS::test_update[lion-without a perturbation]"),
    ("perturb.py", "w = join(kept, load(remainder[0], offsets, count, WHOLE))", "w = w",
     "REMAINDERS::test_perturb[sam-nearest-backup-]"),
    ("grad_norm.py", "w = join(w, load(remainder[0], at, count, WHOLE))", "w = w",
     "REMAINDERS::test_norm[remainders]"),
    ("perturb.py", "(first % 2 == 0) & ", "", "SHARDS[uneven rows-False-False-bfloat16-triton]"),
]
LONG = {  # test names, see BROKEN
    "SHARDS": "tests/ops/test_shards.py::test_a_shard_is_a_slice_of_the_whole",
    "REMAINDERS": "tests/support/remainder_checks.py",
}


def test_op_table_and_errors() -> None:
    """In float32 only, but for shards and remainders; all dtypes, and mixed ones, run from PTX."""
    files = (*(TESTS / f"ops/test_{name}.py" for name in ("ops", "ops_errors", "shards")), REMAINDERS)
    chosen = f"triton and ({FLOAT32} or {ERRORS} or {SHARDS}) or remainder_checks"
    done = run_pytest("interpreted", *files, "-k", chosen)
    assert done.get("passed", 0) > 200 and set(done) == {"passed"}


@pytest.fixture(scope="module")
def broken_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with every formula of BROKEN broken."""
    copy = tmp_path_factory.mktemp("broken")
    for name in ("kernels", "rst_fused", "tests"):
        shutil.copytree(TESTS.parent / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "csrc").mkdir()  # marks a checkout
    for file, formula, wrong, _ in BROKEN:
        path = copy / "kernels" / file
        text = path.read_text(encoding="utf-8")
        assert formula in text, f"{formula!r} is not in {file}"
        path.write_text(text.replace(formula, wrong), encoding="utf-8")
    return copy


def test_broken_formulas_are_caught(broken_copy: Path) -> None:
    oracle_test = "tests/ops/test_ops.py::test_against_oracle"
    ids = []
    for *_, test in BROKEN:
        long = next((name for name in LONG if test.startswith(name)), None)
        ids.append(f"{oracle_test}[{test}]" if long is None else LONG[long] + test.removeprefix(long))
    done = run_pytest("interpreted", *ids, folder=broken_copy)
    assert done == {"failed": len(BROKEN)}
