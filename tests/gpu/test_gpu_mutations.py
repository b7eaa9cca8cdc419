"""The checks of the GPU kernels see what they are for: each fault here, put into the sources, is found."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gpu_simulator
import op_db
import ptx_order
import pytest
import torch
from gpu_simulator import aligned, tensors
from side_by_side import Futures, chosen, side_by_side
from torch import Tensor

from rst_fused import ops

pytestmark = [pytest.mark.usefixtures("one_thread"), gpu_simulator.needed]
F64, BF16 = torch.float64, torch.bfloat16

QUOTIENT = "better == better ? copysign(better, quotient) : quotient"
APPLY, NORM = "cuda/multi_tensor_apply.cuh", "cuda/grad_norm.cuh"
# (what is wrong, file, what stands there, what is put there, the kernels that show it)
FAULTS = [
    ("tail begins too late", APPLY, "i = packs * kPack +", "i = packs * kPack + 1 +", "perturb"),
    ("tail ends too late", APPLY, "i < count; i += kThreads", "i <= count; i += kThreads", "perturb"),
    ("packs overrun", APPLY, "packs = count / static_cast", "packs = (count + 3) / static_cast", "restore"),
    ("one tensor too early", APPLY, "[middle] <= block", "[middle] < block", "sgd_step"),
    ("offset overflows", APPLY, "const int64_t begin =", "const int8_t begin =", "restore"),
    ("addresses thought aligned", APPLY, "all % 16 == 0", "all % 2 == 0", "perturb"),
    ("packs thought aligned", "cuda/pack.cuh", "if (!is_multiple(base, alignof(P)))", "if (false)", "restore"),
    ("16 bits thought aligned", "cuda/pack.cuh", "if (!is_multiple(base, 4))", "if (!is_multiple(base, 2))", "perturb"),
    ("sum without a release", NORM, "atom.acq_rel", "atom.acquire", "grad_norm"),
    ("sum without an acquire", NORM, "atom.acq_rel", "atom.release", "grad_norm"),
    ("sum for one block alone", NORM, "acq_rel.gpu", "acq_rel.cta", "grad_norm"),
    ("warps do not wait", NORM, "any = __syncthreads_or(any);", "", "grad_norm"),
    ("last seen too soon", NORM, "  __syncthreads();\n  if constexpr", "  if constexpr", "grad_norm"),
    ("last block too early", NORM, "1) == gridDim.x - 1", "1) == gridDim.x - 2", "grad_norm"),
    ("ticket kept", NORM, "gpu.inc.u32", "gpu.add.u32", "grad_norm"),
    ("small squares lost", NORM, "found.sum >= 0x1p-60 && ", "", "grad_norm"),
    ("large squares lost", NORM, " && found.sum < INFINITY", "", "grad_norm"),
    ("turns not added", NORM, "sum += of_turn;", "sum = of_turn;", "grad_norm"),
    ("backwards from one too far", "cuda/perturb.cuh", "gridDim.x - 1 - block", "gridDim.x - block", "perturb"),
    ("rows after the eighth", "cuda/update.cuh", "args.rows[args.row[t]]", "args.rows[args.row[t] % 8]", "sgd_step"),
    ("rho after the eighth", APPLY, "= args.row[tensor];", "= args.row[tensor] % 8;", "perturb"),
    ("one correction of a quotient", "cuda/fast_float.cuh", QUOTIENT, "quotient", "adam_step"),
    ("quotient of infinity", "cuda/fast_float.cuh", QUOTIENT, "better", "adam_step"),
    ("root of infinity", "cuda/fast_float.cuh", "a.x == INFINITY ? a.x : ", "", "adam_step"),
    ("root of zero", "cuda/fast_float.cuh", "::max(to_bits(a.x), 0x00800000u)", "to_bits(a.x)", "adam_step"),
    ("small roots that matter", "math/rules/adam.h", ">= 0x1p-36f", ">= 0", "adam_step"),
    ("halves change places", "cuda/pack.cuh", '"f"(high), "f"(low)', '"f"(low), "f"(high)', "sgd_step"),
    ("climbs down", "math/sam_math.h", "return fma(scale, g, w); }", "return fma(-scale, g, w); }", "perturb"),
    ("no backup", "cuda/perturb.cuh", "if constexpr (master != Master::Copy) store<access>(copy, i, in.w.stored);", "",
     "perturb"),
    ("neighbours share random bits", "cuda/random.cuh", ": bits >> 16;", ": bits;", "perturb"),
    ("shards thought even", "cuda/perturb.cuh", "first % 2 != 0 || ", "", "perturb"),
    ("runs thought endless", "cuda/perturb.cuh", " || shard.together(piece.begin) < piece.count", "", "perturb"),
    ("runs that follow one another", "cuda/random.cuh", "shard.stride - shard.run", "0 * shard.run", "perturb"),
    ("a run too long", "cuda/random.cuh", "if (left == 0)", "if (left < 0)", "perturb"),
    ("key of the first block", "cuda/random.cuh", "if (position >> 32 != block)", "if (false)", "perturb"),
    ("one block for all", "math/shard.h", "in_run < in_block ? in_run : in_block", "in_run", "perturb"),
    ("stride forgotten", "math/shard.h", "static_cast<uint64_t>(stride)", "static_cast<uint64_t>(run)", "perturb"),
    ("state thought even", "cuda/update.cuh", "first % 2 == 0 && ", "", "rounding"),
    ("state thought one run", "cuda/update.cuh", " && shard.together(piece.begin) >= piece.count", "", "rounding"),
    ("the bits of the weight", "cuda/update.cuh", "RandomBits::kState + ", "", "rounding"),
    ("one part for all", "core/params.h", "sum += squares[i]", "sum = squares[i]", "grad_norm"),
    ("momentum forgotten", "cuda/update.cuh", "store<access>(state[s], i, narrow_all<S>(kept[s]));", "", "sgd_step"),
    ("largest second moment forgotten", "math/rules/adam.h", "maximum(state[2], v)", "v", "adam_step"),
    ("remainders without a sign", "math/sam_math.h", "upper + ((lower ^ 0x8000u) - 0x8000u)", "upper + lower",
     "remainder"),
    ("remainders forgotten", "cuda/weights.cuh", "store<access>(rest, i, lower);", "", "remainder"),
    ("remainders of others", "cuda/weights.cuh", "first, second, 0x5410", "second, first, 0x5410", "remainder"),
    ("parameters cut off", "math/sam_math.h", "return {bits + 0x8000u, bits};", "return {bits, bits};", "remainder"),
    ("remainders unread by perturb", "cuda/weights.cuh", "join(upper, rest.at[k].bits)", "join(upper, 0)", "perturb"),
    ("beta1 for beta2", "math/rules/lion.h", "fma(one_minus_beta2, g - m", "fma(one_minus_beta1, g - m", "lion_step"),
    ("numbers before they are there", "cuda/update.cuh", "  __syncthreads();\n  return prepared", "  return prepared",
     "adam_step on device"),
    ("step count from elsewhere", "cuda/update.cuh", ": on_device.steps[row];", ": on_device.steps[0];",
     "adam_step on device"),
    ("rows of the device after the eighth", "cuda/update.cuh", "on_device.hyperparams + row *",
     "on_device.hyperparams + row % 8 *", "sgd_step on device"),
]  # fmt: skip
SIZES = (7, 20_001, 3, *[5] * 9)
GROUPS: dict[str, Any] = {"group_sizes": [1] * len(SIZES)}
# One run, at an even and at an odd place, and across a multiple of 2^32; runs of odd, even and any lengths.
SHARDS = [
    (4, 0, 0), (5, 0, 0), (2**32 - 1000, 0, 0), (2**32 - 999, 0, 0), (2, 35, 71), (6, 4096, 10_000), (0, 3, 2**30),
]  # fmt: skip
RATES = [0.1 * (i + 1) for i in range(len(SIZES))]
# Elements of these dtypes, so many after a multiple of 16 bytes.
PLACES = ((torch.float32, 0), (BF16, 0), (torch.float32, 1), (BF16, 1), (BF16, 2))
ON_DEVICE = " on device"  # where the kernel reads hyperparameters and step counts
UPDATES = {
    "sgd_step": ("Sgd", 1, "_momentum"), "adam_step": ("Adam", 3, "_amsgrad"), "lion_step": ("Lion", 1, ""),
    "rounding": ("Lion", 1, ""),  # of a state in bfloat16
    "remainder": ("Sgd", 1, "_momentum"),
}  # fmt: skip


def norms(g: list[Tensor], backend: str) -> list[Tensor]:
    """Of ordinary gradients, twice, since the ticket must be back for the second call; of some whose squares fp32 holds
    neither in one direction nor in the other; and of zeros. Before these the norm over parts."""
    stats = torch.zeros(6, dtype=F64)
    parts = ops.finish_norm(torch.tensor([4.0, 9.0, 3.0], dtype=F64), backend=backend)[0]
    return [parts] + [
        ops.grad_norm([(t.float() * scale).to(t) for t in g], stats=stats, backend=backend)[0].clone()
        for scale in (1, 2, 1e-25, 1e25, 0)
    ]


def run_op(op: str, backend: str) -> list[Tensor]:
    """Everything that the op writes, at all PLACES."""
    written = []
    for dtype, offset in PLACES:
        lists = []
        for seed in range(4):
            lists.append([aligned(n + offset, dtype)[offset:] for n in SIZES])
            for t, values in zip(lists[-1], tensors(*SIZES, seed=seed), strict=True):
                t.copy_(values.abs())
        p, g, b, m = lists
        v = [t.clone() for t in m]
        largest = [t.clone() for t in b]
        if op == "grad_norm":
            written += norms(g, backend)
        elif op == "perturb":
            stats = torch.tensor([1.0, 1.0, 0, 0, 0, 1.0], dtype=F64)
            ops.perturb_(p, g, b, stats, rho=RATES, backend=backend, **GROUPS)
            if dtype == BF16:
                for shard in SHARDS:
                    written.append(p[1].clone())
                    ops.perturb_(p, g, b, stats, rho=RATES, shards=[shard] * len(p), backend=backend, **GROUPS)
                remainders = [aligned(n + offset, torch.int16)[offset:] for n in SIZES]
                for r in remainders:
                    r.copy_(torch.arange(-20_000, r.numel() - 20_000))
                ops.perturb_(p, g, b, stats, rho=RATES, masters=remainders, backend=backend, **GROUPS)
        elif op == "restore":
            ops.restore_(p, b, backend=backend)
        elif op == "sgd_step":
            ops.sgd_step_(p, g, m, lr=RATES, momentum=0.9, backend=backend, **GROUPS)
        elif op == "lion_step":
            ops.lion_step_(p, g, m, lr=0.1, backend=backend)
        elif op == "rounding":
            m = [aligned(n + offset, BF16)[offset:].copy_(t) for n, t in zip(SIZES, m, strict=True)]
            for shard in ((0, 0, 0), (5, 0, 0), (2**32 - 1000, 0, 0), (2, 35, 71)):
                shards = [shard] * len(p)
                ops.lion_step_(p, g, m, lr=0.1, rng=(1, 2), shards=shards, backend=backend)
        elif op == "remainder":
            if dtype == BF16:
                remainders = [aligned(n + offset, torch.int16)[offset:] for n in SIZES]
                for r in remainders:
                    r.copy_(torch.arange(-20_000, r.numel() - 20_000))
                momentum = [t.float() for t in m]
                ops.restore_sgd_step_(
                    p, g, b, momentum, lr=RATES, momentum=0.9, masters=remainders, backend=backend, **GROUPS
                )
                written += [*remainders, *momentum]
        else:
            for t in (*g, *m, *v, *largest):
                t[::7] = 0
            for t in (*v, *largest):
                t[1::11] = torch.inf
            steps = [float(i + 1) for i in range(len(SIZES))]
            adam: dict[str, Any] = {"max_exp_avg_sqs": largest, "lr": RATES, "step": steps, **GROUPS}
            ops.adam_step_(p, g, m, v, backend=backend, **adam)
            for t in (*g, *v, *largest):
                t[2::7] = 0
            ops.adam_step_(p, g, m, v, eps=1e-30, backend=backend, **adam)
        written += [*p, *b, *m, *v, *largest]
    return written


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; norms as nearly as fp32 adds up squares."""
    return torch.allclose(a, b, rtol=1e-6, atol=0) if a.dim() == 0 else op_db.same_bits(a, b)


def agrees(op: str, simulator: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernels do what the CPU does, however blocks are scheduled, with nothing reported."""
    if any(ptx_order.unacquired_reads(lines) for lines in simulator.instructions.values()):
        return False
    name, on_device = op.removesuffix(ON_DEVICE), op.endswith(ON_DEVICE)
    expected = run_op(name, "cpu")
    for options in ({"check": 2}, {"check": 2, "resident": 4, "quantum": 30, "seed": 1}):
        monkeypatch.setattr(simulator, "options", {**options, "max_ins": 10**9})
        try:
            with gpu_simulator.simulated(simulator, monkeypatch, on_device):
                result = run_op(name, "simulated")
        except (AssertionError, RuntimeError):  # reported, or stopped
            return False
        if not all(same(a, b) for a, b in zip(result, expected, strict=True)):
            return False
    return True


@pytest.mark.parametrize("op", sorted({fault[-1] for fault in FAULTS}))
def test_kernels_as_they_are(
    op: str,
    kernels: gpu_simulator.Simulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert agrees(op, kernels, monkeypatch)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Futures]:
    """The PTX with each fault that is to be found: compilers run beside the tests."""
    faults = [params["fault"] for params in chosen(request, "test_fault_is_found")]
    jobs = {fault[0]: partial(compile_fault, *fault[1:], tmp_path_factory.mktemp("fault")) for fault in faults}
    with side_by_side(jobs) as started:
        yield started


def compile_fault(file: str, old: str, new: str, op: str, folder: Path) -> dict[str, Path]:
    csrc = folder / "csrc"
    shutil.copytree(gpu_simulator.ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("*.cpp", "*.cu", "tests"))
    if rule := UPDATES.get(op.removesuffix(ON_DEVICE)):
        (csrc / "cuda" / "update.cu").write_text(update_source(op.removesuffix(ON_DEVICE), *rule))
    else:
        source = (gpu_simulator.ROOT / "csrc" / "cuda" / f"{op}.cu").read_text()
        (csrc / "cuda" / f"{op}.cu").write_text(few_kernels(source.split("#define RST_OF(")[0]) + "}\n")
        (csrc / APPLY).write_text(few_kernels((csrc / APPLY).read_text()))
    text = (csrc / file).read_text()
    assert text.count(old) >= 1, f"{file} no longer reads {old!r}: adapt the fault"
    (csrc / file).write_text(text.replace(old, new))
    return gpu_simulator.compile_ptx(folder, csrc=csrc)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_fault_is_found(
    fault: tuple[str, str, str, str, str], compiled: Futures, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not agrees(fault[-1], gpu_simulator.Simulator(compiled[fault[0]].result()), monkeypatch)


def few_kernels(source: str) -> str:
    """Without those that run_op does not use: ASAM's, and of other dtypes."""
    made = r"^(?!#define)(.*?)\b(X|RST_[A-Z_]+)\([^()\n]*(adaptive|\bfloat16|\bfloat64|64_bits)[^()\n]*\)"
    return re.sub(made, r"\1", source, flags=re.MULTILINE)


def update_source(op: str, rule: str, states: int, suffix: str) -> str:
    """The two kernels of an update that run_op uses: all of them take long to compile."""
    lines = ['#include "cuda/update.cuh"', "namespace rst::cuda {"]
    args, suffix = ("RoundingUpdateArgs", "_rounding") if op == "rounding" else ("UpdateArgs", suffix)
    remainders = op == "remainder"
    suffix, master = ("_remainder" + suffix, "Remainder") if remainders else (suffix, "None")
    op = op.replace("rounding", "lion_step").replace("remainder", "sgd_step")
    for name, dtype in (("float32", "float"), ("bfloat16", "BFloat16"))[remainders:]:
        signature = f"RST_KERNEL(rst_{op}_{name}{suffix}, 1, {args}<rst::{rule}, {states}, {str(remainders).lower()}>)"
        lines.append(f"{signature} {{ update<rst::{rule}, {states}, {dtype}, false, Master::{master}>(args); }}")
    return "\n".join([*lines, "}", ""])
