"""How the CUDA kernels are launched and what they move: bytes, widths, splits, schedules. See gpu_simulator."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_simulator
import op_db
import pytest
import torch
from gpu_simulator import aligned, tensors

from rst_fused import _backends, ops

pytestmark = [pytest.mark.usefixtures("one_thread"), gpu_simulator.needed]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
HALVES = (BF16, F16)
N = 40_000  # elements: two whole chunks and a part


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, Any]]]:
    """The launches, none of which runs: for tensors that are too many or too large."""
    launches: list[tuple[str, int, Any]] = []

    class Recorder:
        launches: list[Any] = []

        def launch(self, kernel: str, blocks: int, threads: int, data: bytes) -> None:
            launches.append((kernel, blocks, gpu_simulator.decoded(kernel, data)[1]))

    with gpu_simulator.simulated(Recorder(), monkeypatch):  # type: ignore[arg-type]
        yield launches


# --- bytes and widths -----------------------------------------------------------------------------------------------
# Bytes read and written per parameter: (bytes of the dtype, of them), see rst_fused.ops. Beside 16-bit parameters with
# masters the state has 4 bytes.
TRAFFIC = {
    "grad_norm": lambda b, s: (b, 0), "perturb_": lambda b, s: (2 * b, 2 * b), "restore_": lambda b, s: (b, b),
    "restore_sgd_step_": lambda b, s: (3 * b, 2 * b), "sgd_step_": lambda b, s: (3 * b, 2 * b),
    "restore_adam_step_": lambda b, s: (4 * b, 3 * b), "adam_step_": lambda b, s: (4 * b, 3 * b),
    "restore_lion_step_": lambda b, s: (3 * b, 2 * b), "lion_step_": lambda b, s: (3 * b, 2 * b),
}  # fmt: skip
WITH_MASTERS = {
    "perturb_": lambda b, s: (s + b, b), "restore_": lambda b, s: (s, b),
    "sgd_step_": lambda b, s: (b + 2 * s, b + 2 * s), "adam_step_": lambda b, s: (b + 3 * s, b + 3 * s),
    "lion_step_": lambda b, s: (b + 2 * s, b + 2 * s),
}  # fmt: skip


def test_every_op_has_its_traffic() -> None:
    assert set(TRAFFIC) == op_db.FUNCTIONS


def run_op(op: str, dtype: torch.dtype, masters: bool, n: int = N) -> None:
    state = F32 if masters else dtype
    p, g, b = (aligned(n, dtype) for _ in range(3))
    m, v, master = (aligned(n, state) for _ in range(3))
    given = {"masters": [master]} if masters else {}
    options: dict[str, Any] = {"backend": "simulated"}
    stats = torch.tensor([1.0, 1.0, 0, 0, 0], dtype=F64)
    if op == "grad_norm":
        ops.grad_norm([g], **options)
    elif op == "perturb_":
        ops.perturb_([p], [g], None if masters else [b], stats, rho=0.1, **given, **options)
    elif op == "restore_":
        ops.restore_([p], None if masters else [b], **given, **options)
    elif op == "sgd_step_":
        ops.sgd_step_([p], [g], [m], lr=0.1, momentum=0.9, **given, **options)
    elif op == "restore_sgd_step_":
        ops.restore_sgd_step_([p], [g], [b], momentum_buffers=[m], lr=0.1, momentum=0.9, **options)
    elif op == "adam_step_":
        ops.adam_step_([p], [g], [m], [v], lr=0.1, step=1, **given, **options)
    elif op == "restore_adam_step_":
        ops.restore_adam_step_([p], [g], [b], [m], [v], lr=0.1, step=1, **options)
    elif op == "lion_step_":
        ops.lion_step_([p], [g], [m], lr=0.1, **given, **options)
    else:
        ops.restore_lion_step_([p], [g], [b], [m], lr=0.1, **options)


@pytest.mark.parametrize("dtype", [F32, F64, *HALVES])
@pytest.mark.parametrize("op", TRAFFIC)
def test_moves_the_fewest_bytes_16_at_a_time(
    op: str, dtype: torch.dtype, simulator: gpu_simulator.Simulator
) -> None:
    run_op(op, dtype, masters=False)
    check_traffic(simulator, TRAFFIC[op](dtype.itemsize, dtype.itemsize))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("op", WITH_MASTERS)
def test_masters_move_the_fewest_bytes(op: str, dtype: torch.dtype, simulator: gpu_simulator.Simulator) -> None:
    run_op(op, dtype, masters=True)
    check_traffic(simulator, WITH_MASTERS[op](2, 4))


@pytest.mark.parametrize("dtype", [F32, F64, *HALVES])
def test_amsgrad_moves_the_fewest_bytes(dtype: torch.dtype, simulator: gpu_simulator.Simulator) -> None:
    p, g, m, v, largest = (aligned(N, dtype) for _ in range(5))
    ops.adam_step_([p], [g], [m], [v], max_exp_avg_sqs=[largest], lr=0.1, step=1, backend="simulated")
    check_traffic(simulator, (5 * dtype.itemsize, 4 * dtype.itemsize))


def check_traffic(simulator: gpu_simulator.Simulator, expected: tuple[int, int]) -> None:
    assert len(simulator.launches) == 1
    _, blocks, _, counted = simulator.launches[0]
    assert blocks == 3
    # Beside the tensors every thread reads a few numbers, and the norm writes its sums.
    read, written = expected[0] * N, expected[1] * N
    wide_read, wide_written = (16 * counted[w].get(16, 0) for w in ("ld_width", "st_width"))
    assert (wide_read, wide_written) == (read, written)
    assert counted["ld_bytes"] - read <= blocks * gpu_simulator.THREADS * 8 + 64
    assert counted["st_bytes"] - written <= 128


@pytest.mark.parametrize("dtype", [F32, F64, *HALVES])
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_views(dtype: torch.dtype, offset: int, simulator: gpu_simulator.Simulator) -> None:
    """Parameters that start anywhere: the same numbers, one by one."""
    whole = [aligned(2000, dtype, value) for value in (1.0, 0.5, 0.0)]
    p, g, backup = (t[offset : offset + 1501] for t in whole)
    ops.perturb_([p], [g], [backup], torch.tensor([1.0, 1.0, 0, 0, 0], dtype=F64), rho=0.5, backend="simulated")
    assert (p == 1.25).all() and (backup == 1).all()
    assert simulator.launches[0][3]["ld_width"].get(16, 0) == 0


# --- splits ---------------------------------------------------------------------------------------------------------
def capacity(op: str) -> int:
    return len(gpu_simulator.args_type(len(gpu_simulator.OPERANDS[op]))().numel)


def test_400_tensors_need_one_launch_each() -> None:
    assert min(capacity(op) for op in gpu_simulator.OPERANDS) >= 400


@pytest.mark.parametrize("count", [1, 481, 482, 5000])
def test_many_tensors(count: int, recorded: list[tuple[str, int, Any]]) -> None:
    """Every tensor is in one launch, with its own blocks."""
    params = tensors(*(1 + i % 3 for i in range(count)))
    ops.sgd_step_(params, [p.clone() for p in params], None, lr=0.1, backend="simulated")
    assert len(recorded) == -(-count // capacity("sgd_step"))
    addresses, index = [], []
    for _, blocks, args in recorded:
        n = args.params.tensors
        assert list(args.first_chunk[: n + 1]) == list(range(n + 1)) and blocks == n
        addresses += list(args.data[0][:n])
        index += list(args.index[:n])
    assert addresses == [p.data_ptr() for p in params] and index == list(range(count))


def test_a_billion_elements(recorded: list[tuple[str, int, Any]]) -> None:
    """64-bit lengths, and no more sums of the norm than one block adds up quickly."""
    sizes = [2**32 + 5, 10**9, 7]  # the memory is never touched
    grads = [torch.empty(n, dtype=BF16) for n in sizes]
    ops.grad_norm(grads, backend="simulated")
    ((_, blocks, args),) = recorded
    chunk = args.params.chunk
    assert chunk & (chunk - 1) == 0 and blocks == sum(-(-n // chunk) for n in sizes) == args.params.all_partials
    assert blocks <= 32768 + len(sizes) and list(args.numel[:3]) == sizes


@pytest.mark.parametrize("scalars_on_device", [False, True])
def test_rows_of_hyperparameters(
    scalars_on_device: bool, kernels: gpu_simulator.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More groups than one launch holds; numbers by value, or read by the kernel as from the device."""
    rates = [0.1 * (i + 1) for i in range(20)]
    params = tensors(*[5] * 20)
    expected = [p - lr * 2 for p, lr in zip(params, rates, strict=True)]
    with gpu_simulator.simulated(kernels, monkeypatch, scalars_on_device):
        ops.sgd_step_(
            params, [torch.full((5,), 2.0) for _ in params], None, lr=rates, group_sizes=[1] * 20, backend="simulated"
        )
        assert len(kernels.launches) == (1 if scalars_on_device else 3)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-6, atol=1e-7)


def test_norm_of_several_launches(simulator: gpu_simulator.Simulator) -> None:
    """Dtypes and splits follow one another; the last block of the last launch adds all sums up."""
    grads = [*tensors(*[70] * 1300), *tensors(50, 40_000, dtype=F64, seed=1), *tensors(33, dtype=BF16, seed=2)]
    stats = ops.grad_norm(grads, backend="simulated")
    expected = sum((g.double() ** 2).sum() for g in grads).sqrt()  # type: ignore[union-attr]
    assert stats[0].item() == pytest.approx(expected.item(), rel=1e-12) and stats[4] == 0
    assert [args.params.last for _, _, args, _ in simulator.launches] == [False, False, False, True]


# --- schedules ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_of_blocks_does_not_matter(
    seed: int, simulator: gpu_simulator.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks and warps interleaved in three ways: one sum, bit for bit, and a ticket that is back at 0."""
    grads = tensors(40_000, 3, 16_384, 100)
    first = ops.grad_norm(grads, backend="simulated")
    monkeypatch.setattr(simulator, "options", {"check": 2, "resident": 4, "quantum": 30, "seed": seed})
    again = ops.grad_norm(grads, stats=first.clone(), backend="simulated")
    assert op_db.same_bits(first, again)


# --- beside the CPU kernels -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [F32, F64, *HALVES])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_bit_for_bit_as_on_the_cpu(base: str, dtype: torch.dtype, simulator: gpu_simulator.Simulator) -> None:
    """Perturbation with its random bits, restore, mixing and update: one formula, rounded at the same places."""
    results = []
    for backend in ("simulated", "cpu"):
        p, g, g2, m = (tensors(1000, 16_400, dtype=dtype, seed=s) for s in range(4))
        v = [t.abs() for t in tensors(1000, 16_400, dtype=dtype, seed=4)]
        backups = [torch.empty_like(t) for t in p]
        stats = torch.tensor([3.0, 1 / 3, 0, 0, 0], dtype=F64)
        ops.perturb_(p, g, backups, stats, rho=0.05, seed=3, step=7, backend=backend)
        moved = [t.clone() for t in p]
        common: dict[str, Any] = {"lr": 0.01, "gamma": 1.7, "weight_decay": 0.1, "first_grads": g, "backend": backend}
        if base == "sgd":
            ops.restore_sgd_step_(p, g2, backups, momentum_buffers=m, momentum=0.9, nesterov=True, **common)
        else:
            ops.restore_adam_step_(p, g2, backups, m, v, step=3, **common)
        results.append([*moved, *backups, *p, *m, *v])
    for ours, theirs in zip(*results, strict=True):
        assert op_db.same_bits(ours, theirs)


# --- registers ------------------------------------------------------------------------------------------------------
def test_no_kernel_spills() -> None:
    """As ptxas reported at build time, for every architecture; the build itself fails on a spill."""
    reports = sorted(Path(_backends.__file__).parents[1].glob("build/cuda/*.txt"))
    if not reports:
        pytest.skip("the extension was not built in this folder")
    text = "".join(path.read_text() for path in reports)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert spills and all(stores == loads == "0" for _, stores, loads in spills)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    assert len(registers) >= 3 * 50 and max(registers) <= 128  # 65,536 registers hold a block of 512 threads
