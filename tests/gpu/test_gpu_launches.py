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
            launches.append((kernel, blocks, gpu_simulator.decoded(kernel, data)))

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


# Beside remainders, which are 2 of the bytes of w.
WITH_REMAINDERS = {
    "perturb_": (6, 4), "restore_": (2, 2), "restore_sgd_step_": (10, 8), "restore_adam_step_": (14, 12),
    "restore_lion_step_": (10, 8), "adam_step_": (14, 12),
}  # fmt: skip


def test_every_op_has_its_traffic() -> None:
    """But for one over no parameters."""
    assert set(TRAFFIC) == op_db.FUNCTIONS - {"finish_norm"}


def run_op(op: str, dtype: torch.dtype, masters: torch.dtype | None, n: int = N) -> None:
    state = F32 if masters else dtype
    p, g, b = (aligned(n, dtype) for _ in range(3))
    m, v = (aligned(n, state) for _ in range(2))
    given = {"masters": [aligned(n, masters)]} if masters else {}
    copies = masters == F32
    options: dict[str, Any] = {"backend": "simulated"}
    stats = torch.tensor([1.0, 1.0, 0, 0, 0, 1.0], dtype=F64)
    if op == "grad_norm":
        ops.grad_norm([g], **options)
    elif op == "perturb_":
        ops.perturb_([p], [g], None if copies else [b], stats, rho=0.1, **given, **options)
    elif op == "restore_":
        ops.restore_([p], None if copies else [b], **given, **options)
    elif op == "sgd_step_":
        ops.sgd_step_([p], [g], [m], lr=0.1, momentum=0.9, **given, **options)
    elif op == "restore_sgd_step_":
        ops.restore_sgd_step_([p], [g], [b], [m], lr=0.1, momentum=0.9, **given, **options)
    elif op == "adam_step_":
        ops.adam_step_([p], [g], [m], [v], lr=0.1, step=1, **given, **options)
    elif op == "restore_adam_step_":
        ops.restore_adam_step_([p], [g], [b], [m], [v], lr=0.1, step=1, **given, **options)
    elif op == "lion_step_":
        ops.lion_step_([p], [g], [m], lr=0.1, **given, **options)
    else:
        ops.restore_lion_step_([p], [g], [b], [m], lr=0.1, **given, **options)


@pytest.mark.parametrize("dtype", [F32, F64, *HALVES])
@pytest.mark.parametrize("op", TRAFFIC)
def test_moves_the_fewest_bytes_16_at_a_time(
    op: str, dtype: torch.dtype, simulator: gpu_simulator.Simulator
) -> None:
    run_op(op, dtype, masters=None)
    check_traffic(simulator, TRAFFIC[op](dtype.itemsize, dtype.itemsize))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("op", WITH_MASTERS)
def test_masters_move_the_fewest_bytes(op: str, dtype: torch.dtype, simulator: gpu_simulator.Simulator) -> None:
    run_op(op, dtype, masters=F32)
    check_traffic(simulator, WITH_MASTERS[op](2, 4))


@pytest.mark.parametrize("op", WITH_REMAINDERS)
def test_remainders_move_the_fewest_bytes(op: str, simulator: gpu_simulator.Simulator) -> None:
    run_op(op, BF16, masters=torch.int16)
    check_traffic(simulator, WITH_REMAINDERS[op])


@pytest.mark.parametrize("dtype", [F32, F64, *HALVES])
def test_amsgrad_moves_the_fewest_bytes(dtype: torch.dtype, simulator: gpu_simulator.Simulator) -> None:
    p, g, m, v, largest = (aligned(N, dtype) for _ in range(5))
    ops.adam_step_([p], [g], [m], [v], max_exp_avg_sqs=[largest], lr=0.1, step=1, backend="simulated")
    check_traffic(simulator, (5 * dtype.itemsize, 4 * dtype.itemsize))


@pytest.mark.parametrize("dtype", [F32, F64, *HALVES])
def test_weights_in_the_place_of_gradients_move_the_bytes_of_a_backup(
    dtype: torch.dtype, simulator: gpu_simulator.Simulator
) -> None:
    p, g = aligned(N, dtype, 3.0), aligned(N, dtype, 2.0)
    ops.perturb_([p], [g], [g], torch.tensor([1.0, 1.0, 0, 0, 0, 1.0], dtype=F64), rho=0.5, backend="simulated")
    check_traffic(simulator, (2 * dtype.itemsize, 2 * dtype.itemsize))
    assert p.unique().tolist() == [4.0] and g.unique().tolist() == [3.0]


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


LISTS = ("params", "grads", "backups", "exp_avgs", "exp_avg_sqs")
# The lists that each op reads and writes, beside which others may lie anywhere.
MISALIGNED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "grad_norm": (("grads",), ()), "perturb_": (("params", "grads"), ("params", "backups")),
    "restore_": (("backups",), ("params",)),
    "restore_sgd_step_": (("backups", "grads", "exp_avgs"), ("params", "exp_avgs")),
    "restore_adam_step_": (("backups", "grads", "exp_avgs", "exp_avg_sqs"), ("params", "exp_avgs", "exp_avg_sqs")),
}  # fmt: skip


def words_of(dtype: torch.dtype, offset: int) -> int:
    """Bytes of one access to a tensor that begins so many elements after a multiple of 16 bytes."""
    size = dtype.itemsize
    return next(width for width in (16, 4, 2) if offset * size % width == 0) if size == 2 else size if offset else 16


@pytest.mark.parametrize("dtype", [F32, F64, *HALVES])
@pytest.mark.parametrize(
    ("op", "shifted"), [(op, name) for op, sides in MISALIGNED.items() for name in sorted({*sides[0], *sides[1]})]
)
def test_a_misaligned_operand_alone_is_read_by_words(
    op: str, shifted: str, dtype: torch.dtype, simulator: gpu_simulator.Simulator
) -> None:
    """As views of DDP's buckets lie: the same results, and 16 bytes at a time for all others."""
    read, written = MISALIGNED[op]
    n = 4096 + 8
    for offset in (1, 2):
        if offset * dtype.itemsize % 16 == 0:
            continue
        results = []
        for backend in ("simulated", "cpu"):
            lists = {}
            for i, name in enumerate(LISTS):
                at = offset if name == shifted else 0
                lists[name] = aligned(n + at, dtype)[at:]
                lists[name].copy_(tensors(n, dtype=dtype, seed=i)[0].abs())
            p, g, b, m, v = ([lists[name]] for name in LISTS)
            stats = torch.tensor([1.0, 1.0, 0, 0, 0, 1.0], dtype=F64)
            if op == "grad_norm":
                stats = ops.grad_norm(g, backend=backend)
            elif op == "perturb_":
                ops.perturb_(p, g, b, stats, rho=0.5, backend=backend)
            elif op == "restore_":
                ops.restore_(p, b, backend=backend)
            elif op == "restore_sgd_step_":
                ops.restore_sgd_step_(p, g, b, m, lr=0.1, momentum=0.9, backend=backend)
            else:
                ops.restore_adam_step_(p, g, b, m, v, lr=0.1, step=2, backend=backend)
            results.append((stats, [*p, *b, *m, *v]))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=gpu_simulator.NORM_ERROR, atol=0)
        assert all(op_db.same_bits(x, y) for x, y in zip(results[0][1], results[1][1], strict=True))
        counted = simulator.launches[-1][3]
        width = words_of(dtype, offset)
        for kind, names in (("ld_width", read), ("st_width", written)):
            wide = 16 * counted[kind].get(16, 0)
            assert wide == n * dtype.itemsize * len([name for name in names if name != shifted])
            if shifted in names:  # beside it every thread reads a few numbers of 8 bytes
                assert width * counted[kind].get(width, 0) >= n * dtype.itemsize


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64, *HALVES])
def test_the_norm_does_not_depend_on_addresses(
    dtype: torch.dtype, adaptive: bool, simulator: gpu_simulator.Simulator
) -> None:
    """Bit for bit: what is added up together does not change with the width of the accesses."""
    found = []
    for offset in (0, 1, 2):
        g, w = (aligned(N + offset, dtype)[offset:] for _ in range(2))
        g.copy_(tensors(N, dtype=dtype)[0])
        w.copy_(tensors(N, dtype=dtype, seed=1)[0])
        found.append(ops.grad_norm([g], [w], adaptive=adaptive, backend="simulated"))
    assert op_db.same_bits(found[0], found[1]) and op_db.same_bits(found[0], found[2])


# --- splits ---------------------------------------------------------------------------------------------------------
def test_400_tensors_need_one_launch_each(kernels: gpu_simulator.Simulator) -> None:
    """But for AMSGrad and remainders, which are one more tensor each, and updates that round a moment, which have a
    shard."""
    capacities = {name: gpu_simulator.capacity(name) for name in kernels.kernels if "finish" not in name}
    rounding = {name: n for name, n in capacities.items() if "rounding" in name}
    others = {name: n for name, n in capacities.items() if name not in rounding}
    longer = {name: n for name, n in others.items() if {"amsgrad", "remainder"} & {*name.split("_")}}
    assert min(n for name, n in others.items() if name not in longer) >= 400
    assert min(n for name, n in longer.items() if "amsgrad" not in name or "remainder" not in name) >= 350
    assert min(longer.values()) >= 325 and min(rounding.values()) >= 250


@pytest.mark.parametrize("beyond", [-1, 0, 1, 4000])
def test_many_tensors(beyond: int, recorded: list[tuple[str, int, Any]]) -> None:
    """Every tensor is in one launch, with its own blocks."""
    count = gpu_simulator.capacity("rst_sgd_step_float32") + beyond
    params = tensors(*(1 + i % 3 for i in range(count)))
    ops.sgd_step_(params, [p.clone() for p in params], None, lr=0.1, backend="simulated")
    assert len(recorded) == -(-count // gpu_simulator.capacity("rst_sgd_step_float32"))
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


@pytest.mark.parametrize("base", ["sgd", "adam"])
@pytest.mark.parametrize(
    "on_device", [(False,), (True,), (True, True)], ids=["by value", "on device", "steps on device"]
)
@pytest.mark.parametrize("groups", [gpu_simulator.ROWS, gpu_simulator.ROWS + 1, 150])
def test_rows_of_hyperparameters(
    groups: int, on_device: tuple[bool, ...], base: str, kernels: gpu_simulator.Simulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every parameter group has its own numbers, by value, or read by the kernel as from the device; for
    Adam with capturable=True, the step counts alone. By value, a launch holds those of 64 groups."""
    numbers = [0.1 * (i + 1) for i in range(groups)]
    common: dict[str, Any] = {"group_sizes": [1] * groups}
    stats = torch.tensor([1.0, 1.0, 0, 0, 0, 1.0], dtype=F64)
    results = []
    with gpu_simulator.simulated(kernels, monkeypatch, *on_device):
        for backend in ("simulated", "cpu"):
            p, g, m, v, backups = (tensors(*[5] * groups, seed=seed) for seed in range(5))
            v = [t.abs() for t in v]
            ops.perturb_(p, g, backups, stats, rho=numbers, backend=backend, **common)
            moved = [t.clone() for t in p]
            if base == "sgd":
                ops.restore_sgd_step_(p, g, backups, m, lr=numbers, momentum=0.9, backend=backend, **common)
            else:
                steps = [float(i + 1) for i in range(groups)]
                ops.restore_adam_step_(p, g, backups, m, v, lr=numbers, step=steps, backend=backend, **common)
            results.append([*moved, *p, *m, *v])
        by_value = -(-groups // gpu_simulator.ROWS)
        perturbing, updating = 1 if on_device[0] else by_value, 1 if on_device == (True,) else by_value
        assert len(kernels.launches) == perturbing + updating
    for ours, theirs in zip(*results, strict=True):
        assert op_db.same_bits(ours, theirs)


def test_norm_of_several_launches(simulator: gpu_simulator.Simulator) -> None:
    """Dtypes and splits follow one another; the last block of the last launch adds all sums up."""
    grads = [*tensors(*[70] * 1300), *tensors(50, 40_000, dtype=F64, seed=1), *tensors(33, dtype=BF16, seed=2)]
    stats = ops.grad_norm(grads, backend="simulated")
    expected = sum((g.double() ** 2).sum() for g in grads).sqrt()  # type: ignore[union-attr]
    assert stats[0].item() == pytest.approx(expected.item(), rel=gpu_simulator.NORM_ERROR) and stats[4] == 0
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


def test_the_perturbation_begins_where_the_norm_ended(
    simulator: gpu_simulator.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backwards: the gradients that the norm read last are still in the L2 cache."""
    stats = torch.tensor([1.0, 1.0, 0, 0, 0, 1.0], dtype=F64)

    p, g, backups = ([aligned(100, F32) for _ in range(2)] for _ in range(3))

    def perturb() -> None:
        for t in p:
            t.fill_(1)
        ops.perturb_(p, g, backups, stats, rho=0.5, backend="simulated")

    perturb()
    whole = simulator.launches[-1][3]["ins"]
    monkeypatch.setattr(simulator, "options", {"max_ins": int(0.45 * whole)})  # one of two blocks stores
    with pytest.raises(RuntimeError, match="instruction"):
        perturb()
    assert (p[1] == 1.5).all() and (p[0] == 1).all()


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
        stats = torch.tensor([3.0, 1 / 3, 0, 0, 0, 9.0], dtype=F64)
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
