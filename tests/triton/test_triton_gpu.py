"""The Triton kernels on a GPU, besides the op table, which runs there with the other backends (test_ops.py)."""

from __future__ import annotations

from typing import Any

import op_db
import pytest
import torch
from op_db import OPS, Sample
from triton_processes import MISSING

from rst_fused import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
EXACT = [
    (op, name, kind)
    for op, name in (
        ("perturb_", "stochastic"), ("perturb_", "asam_sizes"), ("perturb_", "apart"), ("restore_", "gamma_groups"),
        ("restore_sgd_step_", "sizes"), ("restore_sgd_step_", "gamma_amp"), ("restore_adam_step_", "groups_adamw"),
        ("restore_adam_step_", "gamma_amsgrad"), ("restore_lion_step_", "groups"), ("restore_lion_step_", "gamma_amp"),
    )
    for kind in ("float32", "float64", "bfloat16", "float16", "complex64")
]  # fmt: skip


def on(sample: Sample, device: str) -> Sample:
    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, torch.Tensor) else x

    lists = {name: [moved(t) for t in tensors] for name, tensors in sample.lists.items()}
    return Sample(lists, {name: moved(value) for name, value in sample.options.items()})


@pytest.mark.skipif("cpu" not in op_db.BACKEND_IDS, reason="the C++ extension is not built")
@pytest.mark.parametrize(("op", "name", "kind"), EXACT)
def test_same_bits_as_the_cpu_kernels(op: str, name: str, kind: str) -> None:
    here = op_db.build(OPS[op], op_db.spec_of(op, name), kind)
    there = on(here, "cuda")
    here.run(op, "cpu")
    there.run(op, "triton")
    for list_name, tensors in here.lists.items():
        for i, (a, b) in enumerate(zip(tensors, there.lists[list_name], strict=True)):
            assert op_db.same_bits(a, b), f"{list_name}[{i}]"


@pytest.mark.parametrize("dtype", op_db.DTYPES, ids=str)
def test_norm(dtype: torch.dtype) -> None:
    g = [op_db.make("grads", i, op_db.dense((n,)), dtype, "cpu") for i, n in enumerate(op_db.SIZES)]
    there = [t.cuda() for t in g]
    ours = [ops.grad_norm(there, backend="triton").cpu() for _ in range(3)]
    assert op_db.same_bits(ours[0], ours[1]) and op_db.same_bits(ours[0], ours[2])
    torch.testing.assert_close(ours[0], ops.grad_norm(g), rtol=2.0**-24, atol=0)


def sam_step(w: list[Any], g: list[Any], backups: list[Any], buffers: list[Any], numbers: dict[str, Any]) -> None:
    """Through the registered ops, with all scalars on the device."""
    triton = torch.ops.rst_fused_triton
    triton.grad_norm(numbers["stats"], g, [], [], False, 0.0)
    triton.perturb_(
        w, g, backups, [], numbers["stats"], numbers["rho"], [len(w)], False, 0.0, True, numbers["rng"], 0, []
    )
    triton.restore_sgd_step_(
        w, g, backups, [], buffers, [], numbers["hyper"], [len(w)], False, False, None, numbers["found_inf"]
    )


@pytest.mark.parametrize("warm", [True, False], ids=["table_exists", "table_is_captured"])
def test_graph_replay_is_the_eager_step(warm: bool) -> None:
    """Scalars on the device may change between replays; memory freed since the capture must not matter."""
    generator = torch.Generator().manual_seed(0)

    def fresh() -> list[torch.Tensor]:
        return [torch.randn(n, generator=generator).cuda() for n in (3, 1025, 40000)]

    w, g, backups, buffers = (fresh() for _ in range(4))
    kept = [t.clone() for t in (*w, *buffers)]
    numbers = {
        "stats": torch.zeros(6, dtype=torch.float64), "rho": torch.tensor([0.1], dtype=torch.float64),
        "rng": torch.tensor([3, 1]), "hyper": torch.tensor([[0.1, 0.9, 0.0, 0.01, 1.0]], dtype=torch.float64),
        "found_inf": torch.zeros(1),
    }  # fmt: skip
    numbers = {name: t.cuda() for name, t in numbers.items()}
    others = [t.clone() for t in w], g, [t.clone() for t in backups], [t.clone() for t in buffers]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        sam_step(*(others if not warm else (w, g, backups, buffers)), numbers)  # kernels must be compiled beforehand
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sam_step(w, g, backups, buffers, numbers)
    twins = [t.clone() for t in kept]
    for t, old in zip((*w, *buffers), kept, strict=True):
        t.copy_(old)
    for size in range(1, 200):  # pushes tables out of the cache, and reuses what memory was freed
        ops.grad_norm([torch.ones(size, device="cuda")], backend="triton")
    for lr in (0.1, 0.2, 0.3):
        numbers["hyper"][0, 0] = lr
        graph.replay()
        sam_step(twins[:3], g, [torch.empty_like(t) for t in w], twins[3:], numbers)
    assert all(op_db.same_bits(a, b) for a, b in zip((*w, *buffers), twins, strict=True))


def test_no_host_sync() -> None:
    g = [torch.ones(1000, device="cuda")]
    ops.grad_norm(g, backend="triton")
    rho, stats = torch.tensor([0.1], dtype=torch.float64), torch.zeros(6, dtype=torch.float64, device="cuda")
    w, backups, rng = [torch.ones(1000, device="cuda")], [torch.ones(1000, device="cuda")], torch.tensor([0, 1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.rst_fused_triton.grad_norm(stats, g, [], [], False, 0.0)
        torch.ops.rst_fused_triton.perturb_(w, g, backups, [], stats, rho, [1], False, 0.0, True, rng, 0, [])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert w[0].sum() > 1000


@pytest.mark.slow
def test_more_than_2_to_the_32_bytes_apart() -> None:
    """Offsets in a tensor are 64-bit numbers."""
    n = 2**31 + 12345
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip("needs 10 GiB of free device memory")
    p = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    p[-7:] = 2.0
    assert ops.grad_norm([p], backend="triton")[0].item() == pytest.approx(28**0.5)
    ops.sgd_step_([p], [p], lr=0.5, backend="triton")
    assert p[-7:].tolist() == [1.0] * 7 and not p[:-7].any()
