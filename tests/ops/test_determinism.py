"""The same bits in every run, for any number of threads and whatever shares the call."""

from __future__ import annotations

from collections.abc import Iterator

import op_db
import pytest
import torch
from op_db import BACKEND_IDS, BACKENDS, OPS, Place, Sample

from rst_fused import ops

on_backends = pytest.mark.parametrize(("backend", "device"), BACKENDS, ids=BACKEND_IDS)
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "large": [(1_000_000,)],
    "many": [(1000,)] * 1000,
    "uneven": [(3,), (300_001,), (), (0,), (50, 1000), (17,)] * 2,
}


@pytest.fixture(autouse=True)
def threads_in_use() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sample_of(op: str, shapes: str, dtype: torch.dtype, device: str = "cpu") -> Sample:
    """Each list one block of memory, as in a model's flat buffers."""
    names = list(OPS[op].lists) + (["momentum_buffers"] if "sgd" in op else [])
    names += ["first_grads"] if op.startswith("restore_") and op != "restore_" else []
    sizes = [torch.Size(shape).numel() for shape in SHAPES[shapes]]
    lists = {}
    for name in names:
        flat = op_db.make(name, 0, Place((sum(sizes),), (1,)), dtype, device)
        lists[name] = [t.view(shape) for t, shape in zip(flat.split(sizes), SHAPES[shapes], strict=True)]
    options = {**OPS[op].options, **({"momentum": 0.9} if "sgd" in op else {})}
    if op == "perturb_":
        options["stats"] = torch.tensor([800.0, 1 / 800.0, 0.0, 0.0, 0.0, 800.0**2], dtype=torch.float64, device=device)
    return Sample(lists, options)


def results_of(sample: Sample, op: str, backend: str) -> list[torch.Tensor]:
    copy = sample.copied()
    returned = copy.run(op, backend)
    written = [torch.cat([t.reshape(-1) for t in copy.lists[n]]) for n in OPS[op].written if n in copy.lists]
    return written + ([returned] if returned is not None else [])


def assert_same(results: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    assert len(results) == len(others) > 0
    assert all(op_db.same_bits(a, b) for a, b in zip(results, others, strict=True))


@pytest.mark.parametrize(
    ("backend", "device", "shapes"),
    [
        pytest.param(*backend.values, shapes, id=f"{shapes}-{name}", marks=backend.marks)
        for backend, name in zip(BACKENDS, BACKEND_IDS, strict=True) for shapes in SHAPES
        if backend.values[0] != "reference" or shapes != "many"  # a thousand calls show no more than one
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_any_number_of_threads(op: str, dtype: torch.dtype, shapes: str, backend: str, device: str) -> None:
    """torch sums with another order for another number of threads, so the reference promises only equal runs."""
    sample = sample_of(op, shapes, dtype, device)
    torch.set_num_threads(1)
    first = results_of(sample, op, backend)
    assert_same(first, results_of(sample, op, backend))
    for threads in (2, 3) if backend != "reference" or op != "grad_norm" else ():
        torch.set_num_threads(threads)
        for _ in range(2):
            assert_same(first, results_of(sample, op, backend))


@on_backends
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_norm_does_not_depend_on_addresses(adaptive: bool, backend: str, device: str) -> None:
    """Misaligned copies of the same gradients have the same norm."""
    torch.set_num_threads(1)
    g = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(device) for n in (5, 1000, 40_000)]
    w = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(device) for t in g]
    first = ops.grad_norm(g, w, adaptive=adaptive, backend=backend)
    for offset in (1, 2, 5):
        moved = [torch.cat([t[:offset], t])[offset:] for t in g]
        assert op_db.same_bits(first, ops.grad_norm(moved, w, adaptive=adaptive, backend=backend))


@on_backends
@pytest.mark.parametrize("op", [op.name for op in OPS.values() if op.written])
def test_a_list_is_its_tensors_one_by_one(op: str, backend: str, device: str) -> None:
    """Elementwise results do not depend on what else is in the call, nor on how calls are cut into groups."""
    torch.set_num_threads(2)
    sample = sample_of(op, "uneven", torch.float32, device)
    together, alone = sample.copied(), sample.copied()
    together.run(op, backend)
    for i in range(len(SHAPES["uneven"])):
        Sample({name: tensors[i : i + 1] for name, tensors in alone.lists.items()}, alone.options).run(op, backend)
    for name in OPS[op].written:
        for a, b in zip(together.lists.get(name, []), alone.lists.get(name, []), strict=True):
            assert op_db.same_bits(a, b)


@pytest.mark.skipif("cpu" not in BACKEND_IDS, reason="the extension is not built")
def test_strided_tensors_are_computed_as_dense_ones() -> None:
    """Gathering changes no bit: gradients in another order than the parameters, and in none, move them alike."""
    torch.set_num_threads(2)
    shape = (130, 257)
    w, g = (torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    stats = ops.grad_norm([g], backend="cpu")
    wanted, kept = w.clone(), [torch.empty_like(w)]
    ops.perturb_([wanted], [g], kept, stats, rho=1.0, backend="cpu")
    for grad in (g.t().contiguous().t(), torch.stack([g, g], dim=2)[..., 0]):
        for saved in (torch.empty_like(w), torch.empty_like(w.t()).t(), torch.empty(130, 300)[:, :257]):
            moved = w.clone()
            ops.perturb_([moved], [grad], [saved], stats, rho=1.0, backend="cpu")
            assert torch.equal(moved, wanted) and torch.equal(saved, w)
