"""The host side of the Triton backend: how it is found, tables of addresses, what is copied and what is refused."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from triton_processes import MISSING, run_python

from rst_fused import _backends

needs_triton = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
CUDA = torch.device("cuda", 0)


@pytest.fixture
def launch_groups() -> Any:
    return importlib.import_module("rst_fused.kernels.launch_groups")


@pytest.fixture
def device_cache() -> Any:
    return importlib.import_module("rst_fused.kernels.device_cache")


# --- the backend ----------------------------------------------------------------------------------------------------
def test_importing_the_package_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import rst_fused; print('kernels' in str(list(sys.modules)))"
    done = run_python("-c", code)
    assert done.stdout == "False\n", done.stderr


def test_importing_the_package_leaves_triton_alone() -> None:
    """It takes a second."""
    done = run_python("-c", "import sys, rst_fused; print('rst_fused.kernels' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_kernels_without_triton_say_how_to_get_it() -> None:
    done = run_python("-c", "import sys; sys.modules['triton'] = None; import rst_fused.kernels")
    assert "ImportError: rst_fused.kernels needs Triton, which is not installed: pip install triton" in done.stderr


def test_asked_for_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; from rst_fused import _backends; import torch\n"
        "print(_backends.backend_for('auto', torch.device('cuda')).name != 'triton')\n"
        "_backends.backend_for('triton', torch.device('cuda'))"
    )
    done = run_python("-c", code)
    assert done.stdout == "True\n"
    assert "RuntimeError: backend='triton' was asked for but Triton is not installed: pip install triton" in done.stderr


@needs_triton
def test_chosen_for_gpus() -> None:
    assert _backends.backend_for("triton", CUDA).name == "triton"
    usable = [b.name for b in _backends.backends() if b.available and b.supports(CUDA)]
    assert usable.index("triton") == usable.index("reference") - 1, "after what is compiled for GPUs"
    assert _backends.backend_for("auto", CUDA).name == usable[0]
    with pytest.raises(ValueError, match="backend='triton' runs on .*cuda.*, but a parameter is on cpu"):
        _backends.backend_for("triton", torch.device("cpu"))


@needs_triton
def test_cpu_tensors_are_refused_by_the_kernels_too() -> None:
    stats = torch.zeros(6, dtype=torch.float64)
    op = torch.ops.rst_fused_triton.grad_norm
    with pytest.raises(RuntimeError, match="rst_fused::grad_norm: stats is on the CPU, where Triton does not run"):
        op(stats, [torch.ones(3)], [], [], False, 0.0)


# --- tables ---------------------------------------------------------------------------------------------------------
def records(table: torch.Tensor, tensors: int, slots: int) -> list[list[int]]:
    width = importlib.import_module("rst_fused.kernels.multi_tensor_apply").HEADER.value + slots
    return table[: tensors * width].view(tensors, width).tolist()


@needs_triton
def test_table(device_cache: Any) -> None:
    chunk = device_cache.CHUNK.value
    lengths, slots = (3, 0, 2 * chunk, chunk + 1), ((0, 0, 256, 512), (16, 0, 1024, 516))
    table = device_cache.make_table(lengths, (0, 0, 1, 2), (5, 6, 7, 8), slots)
    assert records(table, 4, 2) == [
        [3, 3, 0, 5, 0, 0, 16],
        [0, 0, 0, 6, 1, 0, 0],
        [2 * chunk, 2 * chunk, 1, 7, 1, 256, 1024],
        [chunk + 1, 0, 2, 8, 3, 512, 516],  # 516 is not a multiple of 16: all of it is masked
    ]
    assert table[4 * 7 :].tolist() == [0, 2, 2, 3, 3] and table.dtype == torch.int64


@needs_triton
def test_tables_of_large_models(device_cache: Any) -> None:
    """Lengths and offsets beyond 2^32."""
    chunk, n = device_cache.CHUNK.value, 5 * 2**30
    lengths = (n + 1, *[7] * 5000)
    table = device_cache.make_table(lengths, (0,) * 5001, tuple(range(5001)), ((2**47,) * 5001,))
    first = records(table, 5001, 1)
    assert first[0][:2] == [n + 1, n + 1] and first[1][4] == n // chunk + 1 and first[-1][4] == n // chunk + 5000
    assert table.numel() == 5001 * 6 + n // chunk + 5001


@needs_triton
def test_a_table_is_made_once_for_the_same_addresses(device_cache: Any) -> None:
    t, cpu = torch.zeros(40), torch.device("cpu")

    def table(address: int) -> Any:
        return device_cache.table(cpu, (40,), (0,), (0,), ((address,),))

    first = table(t.data_ptr())
    assert table(t.data_ptr()) is first and table(t.data_ptr() + 16) is not first
    for k in range(device_cache._MOST_KEPT):
        table(16 * k)
    assert len(device_cache._tables) == device_cache._MOST_KEPT and table(t.data_ptr()) is not first


@needs_triton
def test_streams_do_not_share_tables(device_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, made = torch.device("cpu"), []
    for stream in (1, 2, 1):
        monkeypatch.setattr(device_cache, "stream_of", lambda _, stream=stream: stream)
        made.append(device_cache.table(cpu, (40,), (0,), (0,), ((64,),)))
    assert made[0] is made[2] and made[0] is not made[1]


@needs_triton
def test_what_a_capture_reads_is_kept(device_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay copies tables and scalars again, from memory that nothing else may reuse in the meantime."""
    device, captured = torch.device("meta"), []
    monkeypatch.setattr(device_cache, "_capturing", lambda _: True)
    monkeypatch.setattr(device_cache, "_captured", captured)
    monkeypatch.setattr(device_cache, "stream_of", lambda _: 0)
    monkeypatch.setattr(device_cache, "_spare", [torch.empty(1 << 16, dtype=torch.uint8)])
    monkeypatch.setattr(device_cache, "_tables", type(device_cache._tables)())
    table = device_cache.table(device, (40,), (0,), (0,), ((64,),))
    rho, rng = torch.tensor([0.5], dtype=torch.float64), torch.tensor([3, 1])
    scalars = device_cache.on_device(device, rho, rng, torch.tensor([1.0]))
    assert [t.device.type for t in (table, *scalars)] == ["meta"] * 4
    assert [(t.dtype, t.numel()) for t in scalars] == [(torch.float64, 1), (torch.int64, 2), (torch.float32, 1)]
    assert torch.equal(captured[0], device_cache.make_table((40,), (0,), (0,), ((64,),)))
    assert torch.equal(captured[1][8:24].view(torch.int64), rng) and captured[1][:8].view(torch.float64) == 0.5
    assert captured[0].data_ptr() + captured[0].nbytes <= captured[1].data_ptr()
    assert not device_cache._tables, "its device memory is the graph's"


@needs_triton
@pytest.mark.parametrize(
    ("shape", "stride", "dense", "overlaps"),
    [
        ((3, 4), (4, 1), (4, 1), False), ((3, 4), (1, 3), (1, 3), False), ((3, 4), (40, 2), (4, 1), False),
        ((3, 4), (0, 1), (1, 3), True), ((3, 1, 2), (2, 77, 1), (2, 77, 1), False), ((5,), (0,), (1,), True),
        ((), (), (), False), ((0, 3), (0, 0), (0, 1), False), ((4, 4), (2, 1), (4, 1), True),
    ],
)  # fmt: skip
def test_layouts(shape: tuple[int, ...], stride: tuple[int, ...], dense: tuple[int, ...], overlaps: bool) -> None:
    checks = importlib.import_module("rst_fused.kernels.checks")
    assert checks.dense(torch.Size(shape), stride) == dense
    assert checks.overlaps(torch.Size(shape), stride) == overlaps


@needs_triton
def test_only_tensors_of_another_layout_are_copied(launch_groups: Any) -> None:
    p, turned = torch.randn(3, 4), torch.randn(4, 3).T
    operands = [
        launch_groups.Operand("params", [p, turned], written=True),
        launch_groups.Operand("grads", [turned, turned.clone()]),
    ]
    (group,) = launch_groups.groups_of(operands, [2], 0)
    assert not group.in_place
    used, back = launch_groups._prepare(operands, group)
    assert used[0][0] is p and used[0][1] is turned and used[1][1] is operands[1].tensors[1] and back == []
    assert used[1][0] is not turned and used[1][0].is_contiguous() and torch.equal(used[1][0], turned)
