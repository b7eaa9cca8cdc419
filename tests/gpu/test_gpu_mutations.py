"""The checks of the GPU kernels see what they are for: each fault here, put into the sources, is found."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gpu_simulator
import op_db
import pytest
import torch
from gpu_simulator import aligned, tensors
from torch import Tensor

from rst_fused import ops

pytestmark = [pytest.mark.usefixtures("one_thread"), gpu_simulator.needed]
F64, BF16 = torch.float64, torch.bfloat16

APPLY = "cuda/multi_tensor_apply.cuh"
# (what is wrong, file, what stands there, what is put there, the kernels that show it)
FAULTS = [
    ("tail begins too late", APPLY, "done = whole * kPack;", "done = whole * kPack + 1;", "perturb"),
    ("tail ends too late", APPLY, "i < count; i += kThreads", "i <= count; i += kThreads", "perturb"),
    ("packs overrun", APPLY, "count / kPack;", "(count + kPack - 1) / kPack;", "restore"),
    ("one tensor too early", APPLY, "[middle] <= block", "[middle] < block", "sgd_step"),
    ("offset overflows", APPLY, "const int64_t begin =", "const int16_t begin =", "restore"),
    ("addresses thought aligned", APPLY, "all % 16 == 0", "all % 2 == 0", "perturb"),
    ("sum without a fence", "cuda/grad_norm.cuh", "__threadfence();", "", "grad_norm"),
    ("warps do not wait", "cuda/grad_norm.cuh", "= x;\n  __syncthreads();", "= x;", "grad_norm"),
    ("last seen too soon", "cuda/grad_norm.cuh", "  __syncthreads();\n  if (last)", "  if (last)", "grad_norm"),
    ("last block too early", "cuda/grad_norm.cuh", "1) == gridDim.x - 1", "1) == gridDim.x - 2", "grad_norm"),
    ("ticket kept", "cuda/grad_norm.cuh", "atomicInc(ticket, gridDim.x - 1)", "atomicAdd(ticket, 1)", "grad_norm"),
    ("climbs down", "math/sam_math.h", "return fma(scale, g, w); }", "return fma(-scale, g, w); }", "perturb"),
    ("no backup", "cuda/perturb.cuh", "if constexpr (!Master) store(copy, i, in.w);", "", "perturb"),
    ("neighbours share random bits", "cuda/perturb.cuh", ": bits >> 16;", ": bits;", "perturb"),
    ("momentum forgotten", "cuda/update.cuh", "store(state[s], i, kept[s]);", "", "sgd_step"),
    ("step count from elsewhere", "cuda/update.cuh", "? c.steps[row]", "? c.hyperparams[row][5]", "adam_step"),
    ("largest second moment forgotten", "math/rules/adam.h", "maximum(state[2], v)", "v", "adam_step"),
    ("beta1 for beta2", "math/rules/lion.h", "fma(one_minus_beta2, g - m", "fma(one_minus_beta1, g - m", "lion_step"),
    ("numbers before they are there", "cuda/update.cuh", "    __syncthreads();\n", "", "adam_step"),
]  # fmt: skip
SIZES = (7, 40_001, 16_384, 3)


def run_op(op: str, backend: str) -> list[Tensor]:
    """Everything that the op writes, for aligned and for misaligned tensors and for bfloat16."""
    written = []
    for dtype, offset in ((torch.float32, 0), (BF16, 0), (torch.float32, 1)):
        lists = []
        for seed in range(4):
            lists.append([aligned(n + 1, dtype)[offset : offset + n] for n in SIZES])
            for t, values in zip(lists[-1], tensors(*SIZES, seed=seed), strict=True):
                t.copy_(values.abs())
        p, g, b, m = lists
        v = [t.clone() for t in m]
        largest = [t.clone() for t in b]
        if op == "grad_norm":
            stats = torch.zeros(5, dtype=F64)
            for factor in (1, 2):  # the ticket must be back for the second call
                ops.grad_norm([t.float() * factor for t in g], stats=stats, backend=backend)
            written.append(stats.float())  # sums in another order than the CPU's differ in the last bits of float64
        elif op == "perturb":
            stats = torch.tensor([1.0, 1.0, 0, 0, 0], dtype=F64)
            ops.perturb_(p, g, b, stats, rho=0.1, backend=backend)
        elif op == "restore":
            ops.restore_(p, b, backend=backend)
        elif op == "sgd_step":
            ops.sgd_step_(p, g, m, lr=0.1, momentum=0.9, backend=backend)
        elif op == "lion_step":
            ops.lion_step_(p, g, m, lr=0.1, backend=backend)
        else:
            ops.adam_step_(p, g, m, v, max_exp_avg_sqs=largest, lr=0.1, step=4, backend=backend)
        written += [*p, *b, *m, *v, *largest]
    return written


def agrees(op: str, simulator: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernels do what the CPU does, however blocks are scheduled, with nothing reported."""
    expected = run_op(op, "cpu")
    for options in ({"check": 2}, {"check": 2, "resident": 4, "quantum": 30, "seed": 1}):
        monkeypatch.setattr(simulator, "options", {**options, "max_ins": 10**9})
        try:
            with gpu_simulator.simulated(simulator, monkeypatch):
                result = run_op(op, "simulated")
        except (AssertionError, RuntimeError):  # reported, or stopped
            return False
        if not all(op_db.same_bits(a, b) for a, b in zip(result, expected, strict=True)):
            return False
    return True


@pytest.mark.parametrize("op", ["grad_norm", "perturb", "restore", "sgd_step", "adam_step", "lion_step"])
def test_kernels_as_they_are(
    op: str,
    kernels: gpu_simulator.Simulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert agrees(op, kernels, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new", "op"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_fault_is_found(
    file: str, old: str, new: str, op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(gpu_simulator.ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("*.cpp", "*.cu", "tests"))
    source = "update" if op.endswith("_step") else op
    shutil.copy(gpu_simulator.ROOT / "csrc" / "cuda" / f"{source}.cu", csrc / "cuda")
    text = (csrc / file).read_text()
    assert text.count(old) >= 1, f"{file} no longer reads {old!r}: adapt the fault"
    (csrc / file).write_text(text.replace(old, new))
    simulator = gpu_simulator.Simulator(gpu_simulator.compile_ptx(tmp_path, csrc=csrc))
    assert not agrees(op, simulator, monkeypatch)
