"""The same operations as pytest-benchmark entries: ``python -m pytest benchmarks/test_speed.py``.

These show one number after another, not ratios from interleaved rounds: good for watching one op while it is changed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import CASES, DTYPES, Hyper
from .peers import PEERS, Competitor, Unavailable, attach, make

pytest.importorskip("pytest_benchmark")


@pytest.fixture(autouse=True)
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _competitor(name: str, case_name: str, dtype: str) -> tuple[Competitor, list[torch.Tensor]]:
    case = CASES[case_name]()
    try:
        competitor = make(name, case, DTYPES[dtype], Hyper())
    except Unavailable as error:
        pytest.skip(str(error))
    return competitor, case.tensors(DTYPES[dtype], seed=1, scale=1e-3)


@pytest.mark.parametrize("what", ["perturb", "update", "base"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("case", ["resnet18", "1000x1000"])
@pytest.mark.parametrize("name", [name for name in PEERS if name not in ("compile", "ours-master")])
def test_speed(benchmark: Any, name: str, case: str, dtype: str, what: str) -> None:
    competitor, grads = _competitor(name, case, dtype)
    benchmark.group = f"{case}, {dtype}: {what}"

    perturbed = False

    def prepare() -> None:
        """Brings the competitor to where ``what`` starts, from where the call before left it."""
        nonlocal perturbed
        if perturbed:
            attach(competitor.params, grads)
            competitor.update()
        if what == "update":
            attach(competitor.params, grads)
            competitor.perturb()
        attach(competitor.params, grads)
        perturbed = what == "perturb"

    benchmark.pedantic(getattr(competitor, what), setup=prepare, rounds=15, warmup_rounds=2)
