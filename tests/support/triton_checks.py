"""What the op table cannot check of the Triton kernels as a GPU gets them: bytes, widths, bits, torch.compile capture.

Collected by test_triton_ptx only, in a process where the plugin executed_ptx runs the kernels' PTX.
"""

from __future__ import annotations

from typing import Any

import executed_ptx
import op_db
import pytest
import torch
from op_db import OPS
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from rst_fused import ops, reference
from rst_fused.kernels import launch_config, multi_tensor_apply

pytestmark = pytest.mark.usefixtures("one_thread")
CHUNK = multi_tensor_apply.CHUNK.value
HEADER = 24 * 8 * 128  # bytes of tables and scalars that a program may read: 24 values, by each of its threads
of_dtypes = pytest.mark.parametrize("dtype", op_db.DTYPES, ids=lambda d: str(d).removeprefix("torch."))


# --- bytes and widths -----------------------------------------------------------------------------------------------
# (op, dtype, lists, options) -> bytes read and written per parameter, all of them in 16-byte accesses.
TRAFFIC = [
    ("grad_norm", torch.float32, (), {}, 4, 0),
    ("grad_norm", torch.bfloat16, (), {}, 2, 0),
    ("grad_norm", torch.float32, ("params",), {"adaptive": True}, 8, 0),
    ("perturb_", torch.float32, (), {}, 8, 8),
    ("perturb_", torch.float64, (), {}, 16, 16),
    ("perturb_", torch.bfloat16, (), {}, 4, 4),
    ("perturb_", torch.float16, ("masters",), {}, 6, 2),
    ("perturb_", torch.complex64, (), {"adaptive": True}, 16, 16),
    ("restore_", torch.float32, (), {}, 4, 4),
    ("restore_", torch.bfloat16, ("masters",), {}, 4, 2),
    ("restore_", torch.float32, ("grads", "first_grads"), {"gamma": 2.0}, 12, 8),
    ("restore_sgd_step_", torch.float32, ("momentum_buffers",), {"momentum": 0.9}, 12, 8),
    ("restore_sgd_step_", torch.float32, ("momentum_buffers", "first_grads"), {"momentum": 0.9, "gamma": 2.0}, 16, 8),
    ("restore_sgd_step_", torch.bfloat16, ("momentum_buffers",), {"momentum": 0.9}, 6, 4),
    ("restore_adam_step_", torch.float32, (), {}, 16, 12),
    ("restore_adam_step_", torch.float32, ("first_grads",), {"gamma": 2.0}, 20, 12),
    ("restore_adam_step_", torch.float32, ("max_exp_avg_sqs",), {}, 20, 16),
    ("restore_adam_step_", torch.float32, ("max_exp_avg_sqs", "first_grads"), {"gamma": 2.0}, 24, 16),
    ("restore_lion_step_", torch.float32, (), {}, 12, 8),
    ("restore_lion_step_", torch.float32, ("first_grads",), {"gamma": 2.0}, 16, 8),
    ("restore_lion_step_", torch.bfloat16, (), {}, 6, 4),
]  # fmt: skip


def run_aligned(op: str, dtype: torch.dtype, lists: tuple[str, ...], options: dict[str, Any], n: int) -> dict[str, Any]:
    """The statistics of the launch that does the work, on two tensors of ``n`` parameters."""
    spec, place = op_db.Spec("traffic", "small", lists, options), op_db.dense((n,))
    layouts = dict(op_db.LAYOUTS)
    try:
        op_db.LAYOUTS["small"] = lambda name: [place, place]
        sample = op_db.build(OPS[op], spec, str(dtype).removeprefix("torch."))
    finally:
        op_db.LAYOUTS.update(layouts)
    assert all(t.data_ptr() % 16 == 0 for tensors in sample.lists.values() for t in tensors)
    executed_ptx.launches.clear()
    sample.run(op, "triton")
    return executed_ptx.launches[0]


@pytest.mark.parametrize(
    ("op", "dtype", "lists", "options", "read", "written"), TRAFFIC,
    ids=[f"{op}-{dtype}-{'-'.join(lists)}" for op, dtype, lists, *_ in TRAFFIC],
)  # fmt: skip
def test_bytes_per_parameter_and_16_byte_accesses(
    op: str, dtype: torch.dtype, lists: tuple[str, ...], options: dict[str, Any], read: int, written: int
) -> None:
    """Kernels move the least that can be moved, 16 bytes at a time; in addition programs read tables and scalars."""
    n = 2 * CHUNK
    launch = run_aligned(op, dtype, lists, options, n)
    programs = 2 * n * (2 if dtype.is_complex else 1) // CHUNK
    wide = {kind: 16 * launch[f"{kind}_width"].get(16, 0) for kind in ("ld", "st")}
    assert wide == {"ld": read * 2 * n, "st": written * 2 * n}
    assert launch["ld_bytes"] - wide["ld"] <= programs * HEADER
    sums = 12 * programs + 44  # each program's own, and the ticket that it takes; then the stats
    assert launch["st_bytes"] - wide["st"] <= (sums if op == "grad_norm" else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_in_the_place_of_gradients_move_the_bytes_of_a_backup(dtype: torch.dtype) -> None:
    n = 2 * CHUNK
    p, g = torch.full((n,), 3.0, dtype=dtype), torch.full((n,), 2.0, dtype=dtype)
    assert p.data_ptr() % 16 == g.data_ptr() % 16 == 0
    executed_ptx.launches.clear()
    stats = torch.tensor([1.0, 1.0, 0, 0, 0, 1.0], dtype=torch.float64)
    ops.perturb_([p], [g], [g], stats, rho=0.5, backend="triton")
    (launch,) = executed_ptx.launches
    wide = {kind: 16 * launch[f"{kind}_width"].get(16, 0) for kind in ("ld", "st")}
    assert wide == {"ld": 2 * n * dtype.itemsize, "st": 2 * n * dtype.itemsize}
    assert launch["ld_bytes"] - wide["ld"] <= n // CHUNK * HEADER and launch["st_bytes"] == wide["st"]
    assert p.unique().tolist() == [4.0] and g.unique().tolist() == [3.0]


def test_state_beside_masters_moves_in_16_bytes() -> None:
    """16-bit gradients and parameters then move 8 bytes at a time, and nothing passes through shared memory."""
    launch = run_aligned("restore_adam_step_", torch.bfloat16, ("masters",), {}, 2 * CHUNK)
    n = 4 * CHUNK
    assert 16 * launch["ld_width"][16] == 12 * n and 16 * launch["st_width"][16] == 12 * n
    assert 8 * launch["st_width"][8] == 2 * n and launch["bar"] == 0


@pytest.mark.parametrize(("op", "states"), [("perturb_", 0), ("sgd_step_", 0), ("adam_step_", 2)])
def test_remainders_move_in_16_bytes(op: str, states: int) -> None:
    """8 where float32 state is beside them."""
    n = 2 * CHUNK
    (p, r), g = reference.split(torch.full((n,), 3.001)), torch.ones(n, dtype=torch.bfloat16)
    stats = torch.tensor([1.0, 1.0, 0, 0, 0, 1.0], dtype=torch.float64)
    executed_ptx.launches.clear()
    if op == "perturb_":
        ops.perturb_([p], [g], [torch.empty_like(p)], stats, rho=0.5, masters=[r], backend="triton")
    else:
        state = [[torch.zeros(n)] for _ in range(states)]
        options = {"step": 1} if states else {}
        getattr(ops, op)([p], [g], *state, lr=0.5, masters=[r], **options, backend="triton")
    (launch,) = executed_ptx.launches
    moved = [{w: w * launch[f"{kind}_width"].get(w, 0) for w in (8, 16)} for kind in ("ld", "st")]
    if states:
        assert moved[0][16] == moved[1][16] == 8 * n and moved[1][8] == 4 * n
        assert 6 * n <= moved[0][8] <= 6 * n + n // CHUNK * HEADER
    else:
        assert (moved[0][16], moved[1][16]) == (6 * n, 4 * n)
        assert launch["st_bytes"] == moved[1][16] and launch["bar"] == 0


# --- bits -----------------------------------------------------------------------------------------------------------
BITWISE = [
    (op, name, kind)
    for op, names in {
        "perturb_": ("stochastic", "asam_sizes", "apart", "negative_rho"),
        "restore_": ("gaps", "gamma_groups"),
        "restore_sgd_step_": ("sizes", "nesterov", "gamma_amp"),
        "restore_adam_step_": ("sizes", "groups_adamw", "gamma_amp", "gamma_amsgrad", "amsgrad_groups"),
        "restore_lion_step_": ("sizes", "groups", "gamma_amp"),
    }.items()
    for name in names for kind in ("float32", "float64", "bfloat16", "float16", "complex64")
]  # fmt: skip


def test_every_op_has_rows() -> None:
    """A base step runs the kernel of its restore_ variant, so that a row of one is a row of both."""
    with_tensors = [op.name for op in OPS.values() if op.lists]
    for rows, ops_in_rows in ((TRAFFIC, with_tensors), (BITWISE, [op for op in with_tensors if OPS[op].written])):
        assert [op for op in ops_in_rows if not any(op in row[0] for row in rows)] == []


@pytest.mark.skipif("cpu" not in op_db.BACKEND_IDS, reason="the C++ extension is not built")
@pytest.mark.parametrize(("op", "name", "kind"), BITWISE)
def test_same_bits_as_the_cpu_kernels(op: str, name: str, kind: str) -> None:
    """Formulas that round at the same places have one result."""
    sample = op_db.build(OPS[op], op_db.spec_of(op, name), kind)
    results = [sample.copied() for _ in range(2)]
    for result, backend in zip(results, ("cpu", "triton"), strict=True):
        result.run(op, backend)
    for list_name in results[0].lists:
        for i, (a, b) in enumerate(zip(*(r.lists[list_name] for r in results), strict=True)):
            assert op_db.same_bits(a, b), f"{list_name}[{i}]"


@of_dtypes
def test_norm_is_that_of_the_cpu_kernels(dtype: torch.dtype) -> None:
    g = [op_db.make("grads", i, op_db.dense((n,)), dtype, "cpu") for i, n in enumerate(op_db.SIZES)]
    ours = [ops.grad_norm(g, backend="triton") for _ in range(2)]
    assert op_db.same_bits(*ours)
    torch.testing.assert_close(ours[0], ops.grad_norm(g), rtol=2.0**-24, atol=0)


@pytest.mark.parametrize("chosen", [(4, 2), (16, 8)], ids=str)
@pytest.mark.parametrize(
    ("op", "name", "kind"),
    [("perturb_", "stochastic", "bfloat16"), ("perturb_", "asam_sizes", "complex64"), ("restore_", "gaps", "float16"),
     ("restore_sgd_step_", "nesterov", "float32"), ("restore_adam_step_", "masters", "bfloat16"),
     ("restore_adam_step_", "gamma_amsgrad_masters", "float16"), ("restore_lion_step_", "groups", "float32")],
)  # fmt: skip
def test_bits_do_not_depend_on_block_sizes(
    monkeypatch: pytest.MonkeyPatch, op: str, name: str, kind: str, chosen: tuple[int, int]
) -> None:
    sample = op_db.build(OPS[op], op_db.spec_of(op, name), kind)
    built_in, tuned = sample.copied(), sample.copied()
    built_in.run(op, "triton")
    monkeypatch.setattr(launch_config, "forced", [launch_config.LaunchConfig(*chosen)])
    executed_ptx.launches.clear()
    tuned.run(op, "triton")
    assert {launch["threads"] for launch in executed_ptx.launches} == {32 * chosen[1]}
    for list_name in sample.lists:
        for i, (a, b) in enumerate(zip(built_in.lists[list_name], tuned.lists[list_name], strict=True)):
            assert op_db.same_bits(a, b), f"{list_name}[{i}]"


# --- torch.compile --------------------------------------------------------------------------------------------------
def test_compiled_code_calls_one_op_and_clones_nothing() -> None:
    graphs: list[Any] = []

    def record(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def step(w: list[Tensor], g: list[Tensor], backups: list[Tensor], stats: Tensor) -> None:
        ops.perturb_(w, g, backups, stats, rho=0.1, backend="triton")

    w = [torch.randn(40), torch.randn(7, 5)]
    g, backups, before = [torch.ones_like(t) for t in w], [torch.zeros_like(t) for t in w], [t.clone() for t in w]
    compiled = torch.compile(step, backend=aot_autograd(fw_compiler=record), fullgraph=True)
    compiled(w, g, backups, ops.grad_norm(g, backend="triton"))
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("rst_fused_triton.perturb_" in t or "auto_functionalized" in t for t in targets) == 1, targets
    for t, old, saved in zip(w, before, backups, strict=True):
        assert not torch.equal(t, old) and torch.equal(saved, old)
