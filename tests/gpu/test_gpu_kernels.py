"""The CUDA kernels over the op table, executed without a GPU: see gpu_simulator.

Bounds are those of every single tensor, so guard bytes are everywhere; races, missing fences and barriers are reported.
"""

from __future__ import annotations

import gpu_simulator
import op_db
import oracle
import ptx_order
import pytest
import torch
from op_checks import CASES, check_lists, check_stats

from rst_fused import ops

pytestmark = [pytest.mark.usefixtures("one_thread"), gpu_simulator.needed]
AMP = {"grad_scale", "found_inf"}


def test_every_instruction_is_known(kernels: gpu_simulator.Simulator) -> None:
    assert [found for module in kernels.modules.values() for found in module.unsupported()] == []


def test_what_other_blocks_wrote_is_acquired(kernels: gpu_simulator.Simulator) -> None:
    """The last block of a norm reads the sums of all others."""
    assert kernels.instructions.keys() == kernels.kernels.keys()
    with_ticket = {name for name, lines in kernels.instructions.items() if any(map(ptx_order.ATOMIC.search, lines))}
    assert with_ticket == {name for name in kernels.kernels if "grad_norm" in name} and with_ticket
    assert all(ptx_order.unacquired_reads(kernels.instructions[name]) == [] for name in with_ticket)


@pytest.mark.parametrize(("op", "spec", "kind"), CASES)
def test_against_oracle(
    op: op_db.OpInfo, spec: op_db.Spec, kind: str, kernels: gpu_simulator.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers travel by value, but those of AMP are, with all others of their calls, read as from the device."""
    sample = op_db.build(op, spec, kind)
    after = sample.copied()
    with gpu_simulator.simulated(kernels, monkeypatch, bool(AMP & sample.options.keys())):
        result = after.run(op.name, "simulated")
    if op.norm is not None:
        in_fp64 = all(t.dtype in (torch.float64, torch.complex128) for t in sample.lists.get("grads", []))
        check_stats(result, op.norm(**sample.lists, **sample.options), 1e-12 if in_fp64 else gpu_simulator.NORM_ERROR)
    expected: oracle.Results = {} if op.oracle is None else op.oracle(**sample.lists, **sample.options)
    check_lists(op, sample, after, expected, sample.options.get("stochastic_rounding", True))
    assert kernels.launches or all(t.numel() == 0 for tensors in sample.lists.values() for t in tensors)


def test_parameters_that_require_grad_and_lie_otherwise_than_their_gradients(
    simulator: gpu_simulator.Simulator,
) -> None:
    """The copies that kernels work on come back into a leaf of autograd's graph."""
    p = torch.nn.Parameter(torch.ones(3, 4))
    ops.sgd_step_([p], [torch.arange(12.0).view(4, 3).t()], None, lr=1.0, backend="simulated")
    assert torch.equal(p.detach(), 1 - torch.arange(12.0).view(4, 3).t())
