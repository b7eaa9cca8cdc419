"""The rows of the op table as pytest parameters, and what holds for the tensors of every call."""

from __future__ import annotations

import op_db
import oracle
import pytest
import torch
from op_db import OPS, Sample
from torch import Tensor

CASES = [
    pytest.param(op, spec, kind, id=f"{op.name}-{spec.name}-{kind}")
    for op in OPS.values() for spec in op.specs for kind in spec.kinds()
]  # fmt: skip


def check_stats(stats: Tensor, norm: float, error: float, count: int = 0) -> None:
    """``error``: of the norm, relatively. Its square may be off by twice that."""
    *expected, square = oracle.stats_of(norm, count)
    assert stats[:-1].tolist() == pytest.approx(expected, rel=error, abs=0)
    assert float(stats[-1]) == pytest.approx(square, rel=2 * error, abs=0)


def check_lists(op: op_db.OpInfo, before: Sample, after: Sample, expected: oracle.Results, stochastic: bool) -> None:
    """Written lists hold what is expected, and between their elements nothing changed; all others are untouched."""
    for name, tensors in after.lists.items():
        for i, t in enumerate(tensors):
            where, old = f"{op.name} {name}[{i}]", before.lists[name][i]
            if name in expected and name in op.written:
                rounds = stochastic if op.name == "perturb_" else name in op_db.FIRST_STATE and "rng" in after.options
                op_db.assert_close(where, t, expected[name][i], rounds)
                t.copy_(old)
            elif name == "backups" and name in op.written:
                assert op_db.same_bits(t, before.lists["params"][i]), f"{where} is not the parameter"
                t.copy_(old)
            elif name == "params" and op.name == "restore_":
                source = before.lists.get("masters") or before.lists["backups"]
                assert op_db.same_bits(t, source[i].to(t.dtype)), f"{where} is not what was kept"
                t.copy_(old)
            assert op_db.same_bits(op_db.whole(t), op_db.whole(old)), f"{where} was written out of bounds, or at all"
    for name, value in after.options.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, before.options[name]), f"{op.name} changed {name}"
