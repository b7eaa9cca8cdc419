"""Lengths past 2^31 and 2^32, where a 32-bit count would go wrong. Gradients are zero pages, which take no memory."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from op_db import BACKEND_IDS

from rst_fused import ops

pytestmark = pytest.mark.skipif("cpu" not in BACKEND_IDS, reason="the extension is not built")
GIB = 2**30


def needs(gib: int) -> None:
    """Skips unless so much memory is at hand, what the system may still take back included."""
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    if available < gib:
        pytest.skip(f"needs {gib} GiB of free memory, there are {available:.1f}")


linux = pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="no /proc/meminfo to ask for free memory")


def zeros_but(n: int, marks: dict[int, float]) -> torch.Tensor:
    """bfloat16; numpy's come from calloc, whose pages share one zero page until they are written."""
    out = torch.from_numpy(np.zeros(n, dtype=np.int16)).view(torch.bfloat16)
    for i, value in marks.items():
        out[i] = value
    return out


@linux
def test_norm_of_more_than_2_to_the_32_elements() -> None:
    n = 2**32 + 64
    marks = {5: 3.0, 2**31 + 9: 4.0, n - 1: 12.0}
    assert float(ops.grad_norm([zeros_but(n, marks)], backend="cpu")[0]) == 13.0
    strided = torch.ones(1, dtype=torch.bfloat16).expand(2**31 + 2)  # a gradient may be expanded
    assert float(ops.grad_norm([strided], backend="cpu")[0]) == pytest.approx((2**31 + 2) ** 0.5, rel=1e-12)


@linux
def test_step_over_more_than_2_to_the_31_elements() -> None:
    """perturb_ and the fused restore and update: what lies around the limit and at the end, and where nothing was."""
    needs(10)
    n = 2**31 + 70
    marks = {5: 3.0, 2**31 - 1: 4.0, 2**31: 0.0, n - 1: 12.0}
    seen = [*marks, *range(2**31 - 40, 2**31 + 40), *range(n - 40, n)]
    grad, w, backup = zeros_but(n, marks), zeros_but(n, {2**31 + 3: 7.0}), zeros_but(n, {})
    stats = ops.grad_norm([grad], backend="cpu")
    ops.perturb_([w], [grad], [backup], stats, rho=13.0, stochastic_rounding=False, backend="cpu")
    expected = [marks.get(i, 7.0 * (i == 2**31 + 3)) for i in seen]
    assert w[seen].tolist() == expected  # 13 g / 13, exact in bfloat16
    assert backup[seen].tolist() == [7.0 * (i == 2**31 + 3) for i in seen]
    # Nothing else moved:
    assert float(ops.grad_norm([w], backend="cpu")[0]) == pytest.approx((169 + 49) ** 0.5, rel=1e-12)
    ops.restore_sgd_step_([w], [grad], [backup], lr=0.5, backend="cpu")
    assert w[seen].tolist() == [7.0 * (i == 2**31 + 3) - 0.5 * marks.get(i, 0.0) for i in seen]
    assert float(ops.grad_norm([w], backend="cpu")[0]) == pytest.approx((169 / 4 + 49) ** 0.5, rel=1e-12)
