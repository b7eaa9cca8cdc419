"""A first moment in bfloat16: stored by stochastic rounding, whose bits are its own and the same everywhere."""

from __future__ import annotations

import math
from typing import Any

import gpu_simulator
import numpy as np
import op_db
import pytest
import torch
from cuts import CUTS
from op_db import BACKEND_IDS, BACKENDS
from rounding_oracle import normal_values, random_bits, rounded_with
from torch import Tensor

from rst_fused import ops

pytestmark = pytest.mark.usefixtures("one_thread", "simulation")
SIMULATED = pytest.param("simulated", "cpu", marks=gpu_simulator.needed)
on_backends = pytest.mark.parametrize(
    ("backend", "device"), [*BACKENDS, SIMULATED], ids=[*BACKEND_IDS, "simulated"]
)  # fmt: skip
# The dtype of parameters whose updates compute in float32, and whether they have masters.
KINDS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)]
of_kinds = pytest.mark.parametrize(
    ("dtype", "with_masters"), KINDS, ids=["float32", "bfloat16", "bfloat16-masters", "float16-masters"]
)  # fmt: skip
of_rules = pytest.mark.parametrize("rule", ["sgd", "adam", "amsgrad", "lion"])
STATE_BITS = 2**32  # added to the index of a parameter


@pytest.fixture
def simulation(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params.get("backend") == "simulated":
        request.getfixturevalue("simulator")


def stored(x: Tensor, backend: str, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    """float32 ``x`` as SGD stores it: the buffer is 0 times what it was, and x; the decay of the weight is x."""
    masters = None if dtype == torch.float32 else [x]
    w = [x.clone() if masters is None else torch.zeros_like(x, dtype=dtype)]
    buffer = [torch.zeros_like(x, dtype=torch.bfloat16)]
    ops.sgd_step_(
        w, [torch.zeros_like(w[0])], buffer, lr=0.0, momentum=0.0, weight_decay=1.0, masters=masters, backend=backend,
        **options,
    )  # fmt: skip
    return buffer[0]


def step(rule: str, lists: dict[str, list[Tensor]], **options: Any) -> None:
    """One update. The lists: params, grads, backups, masters, m, v, largest, first_grads."""
    m, given = lists["m"], {k: lists[k] for k in ("params", "grads", "backups", "masters", "first_grads") if lists[k]}
    given = {"backups": None, **given, **({"gamma": 0.5} if "first_grads" in given else {}), **options}
    if rule == "sgd":
        ops.restore_sgd_step_(momentum_buffers=m, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01, **given)
    elif rule == "lion":
        ops.restore_lion_step_(exp_avgs=m, lr=0.1, weight_decay=0.01, **given)
    else:
        largest = {"max_exp_avg_sqs": lists["largest"]} if rule == "amsgrad" else {}
        ops.restore_adam_step_(exp_avgs=m, exp_avg_sqs=lists["v"], step=3, weight_decay=0.01, **largest, **given)


def lists_of(dtype: torch.dtype, with_masters: bool, shapes: list[tuple[int, ...]], device: str, mixing: bool = False
             ) -> dict[str, list[Tensor]]:  # fmt: skip
    generator = torch.Generator().manual_seed(5)

    def normal(dtype: torch.dtype, size: float = 1.0) -> list[Tensor]:
        numbers = [torch.randn(s, generator=generator, dtype=torch.float64) * size for s in shapes]
        return [t.to(dtype).to(device) for t in numbers]

    state = torch.float32 if with_masters else dtype
    return {
        "params": normal(dtype), "grads": normal(dtype, 0.1), "backups": [] if with_masters else normal(dtype),
        "masters": normal(torch.float32) if with_masters else [], "m": normal(torch.bfloat16, 0.1),
        "v": [t.abs() for t in normal(state, 0.01)], "largest": [t.abs() for t in normal(state, 0.01)],
        "first_grads": normal(dtype, 0.1) if mixing else [],
    }  # fmt: skip


def written(lists: dict[str, list[Tensor]]) -> list[Tensor]:
    return [t for name in ("params", "masters", "m", "v", "largest") for t in lists[name]]


def copied(lists: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [t.clone() for t in tensors] for name, tensors in lists.items()}


# --- the rounding -----------------------------------------------------------------------------------------------------
@on_backends
@pytest.mark.parametrize(
    "shard", [(0, 0, 0), (5, 0, 0), (2**32 - 701, 0, 0), (4, 64, 128), (7, 63, 129), (2**32 - 99, 1, 2)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, *op_db.HALVES], ids=str)
def test_known_bits(dtype: torch.dtype, shard: tuple[int, int, int], backend: str, device: str) -> None:
    """Recorded runs depend on these bits: they may never change, nor differ between backends."""
    x, (offset, run, stride) = normal_values(torch.bfloat16), shard
    positions = [offset + (i // run * stride + i % run if run else i) for i in range(len(x))]
    bits = random_bits(9, 2**40 + 8, STATE_BITS + 7, np.array(positions, dtype=np.uint64))
    expected = rounded_with(bits, x, torch.bfloat16).to(device)
    options = {"rng": (9, 2**40 + 8), "indices": [7], "shards": [shard]}
    assert op_db.same_bits(stored(x.to(device), backend, dtype, **options), expected)


@on_backends
def test_is_right_in_the_mean(backend: str, device: str) -> None:
    """Over steps, for each element and for all together; and goes to a neighbour."""
    steps, generator = 200, torch.Generator().manual_seed(0)
    x = torch.randn(2000, generator=generator).to(device)
    low = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    spacing = 2.0 ** (x.abs().log2().floor() - 7)
    total = torch.zeros_like(x, dtype=torch.float64)
    for t in range(steps):
        found = stored(x, backend, rng=(3, t)).float()
        assert ((found == low) | (found == low + spacing.copysign(x))).all()
        total += found
    off = (total / steps - x) / spacing
    assert off.abs().max() < 6 * 0.5 / math.sqrt(steps)
    assert abs(off.mean()) < 5 * 0.5 / math.sqrt(steps * len(x))


@on_backends
def test_shares_no_bits_with_a_perturbation(backend: str, device: str) -> None:
    """Of the same seed, step and index: the bits of weights and of their momentum are independent."""
    n = 20_000
    x = torch.full((n,), 1 + 2.0**-8, device=device)  # halfway
    w, stats = torch.zeros_like(x, dtype=torch.bfloat16), torch.tensor([1.0, 1.0, 0, 0, 0, 1.0], dtype=torch.float64)
    ops.perturb_([w], [torch.full_like(w, -0.0)], None, stats.to(device), rho=1.0, masters=[x], seed=3, step=4,
                 first_index=7, backend=backend)  # fmt: skip
    m = stored(x, backend, rng=(3, 4), indices=[7])
    assert abs((m == w).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(n)


@on_backends
@of_kinds
def test_special_numbers(dtype: torch.dtype, with_masters: bool, backend: str, device: str) -> None:
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 3.0e38] * 5, device=device)
    lists = lists_of(dtype, with_masters, [(40,)], device)
    lists["grads"] = [special.to(dtype)]
    for name in ("params", "backups", "masters", "m"):
        lists[name] = [torch.zeros_like(t) for t in lists[name]]
    options = {"lr": 0.0, "momentum": 0.5, "rng": (1, 2), "backend": backend}
    given = {k: lists[k] for k in ("params", "grads") if lists[k]}
    masters = lists["masters"] or None
    ops.restore_sgd_step_(backups=lists["backups"] or None, masters=masters, momentum_buffers=lists["m"], **given,
                          **options)  # fmt: skip
    found, expected = lists["m"][0].float(), special.to(dtype).float()
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())
    assert torch.equal(found.signbit(), expected.signbit()) or expected.isnan().any()
    finite = expected.isfinite()
    assert ((found - expected).abs()[finite] <= expected.abs()[finite] / 128 + 1e-40).all()


# --- where it takes its bits ------------------------------------------------------------------------------------------
@on_backends
@of_kinds
@of_rules
@pytest.mark.parametrize("mixing", [False, True], ids=["", "mixing"])
@pytest.mark.parametrize("name", ["uneven rows", "columns", "blocks"])
def test_a_shard_is_updated_as_its_slice_of_the_whole(
    name: str, mixing: bool, rule: str, dtype: torch.dtype, with_masters: bool, backend: str, device: str
) -> None:
    shape, cuts = CUTS[name]
    whole = lists_of(dtype, with_masters, [shape], device, mixing)
    before = copied(whole)
    options = {"rng": (5, 6), "indices": [3], "backend": backend}
    step(rule, whole, **options)
    for cut in cuts:
        part = {k: [t[cut.index].contiguous() for t in tensors] for k, tensors in before.items()}
        step(rule, part, shards=[cut.shard], **options)
        for mine, theirs in zip(written(part), written(whole), strict=True):
            assert op_db.same_bits(mine, theirs[cut.index].contiguous())


@on_backends
@of_kinds
@of_rules
def test_a_list_is_its_tensors_one_by_one(
    rule: str, dtype: torch.dtype, with_masters: bool, backend: str, device: str
) -> None:
    """However a step is split into calls, and whichever parameters have a gradient."""
    together = lists_of(dtype, with_masters, [(10,), (1000,), (3, 7)], device)
    alone = copied(together)
    step(rule, together, rng=(5, 6), indices=[4, 9, 2**31 - 1], backend=backend)
    for i, index in enumerate((4, 9, 2**31 - 1)):
        one = {k: tensors[i : i + 1] for k, tensors in alone.items()}
        step(rule, one, rng=(5, 6), indices=[index], backend=backend)
    assert all(map(op_db.same_bits, written(together), written(alone)))


@pytest.mark.skipif("cpu" not in BACKEND_IDS, reason="only the reference is available")
@of_kinds
@of_rules
@pytest.mark.parametrize("mixing", [False, True], ids=["", "mixing"])
def test_backends_agree(mixing: bool, rule: str, dtype: torch.dtype, with_masters: bool) -> None:
    """Moments to the bit, but where the sums that are rounded differ in their last digit."""
    shapes: list[tuple[int, ...]] = [(17,), (1023,), (130, 129), ()]
    lists = lists_of(dtype, with_masters, shapes, "cpu", mixing)
    results = []
    for name, device in (b.values for b in BACKENDS):
        mine = {k: [t.to(device, copy=True) for t in tensors] for k, tensors in lists.items()}
        step(rule, mine, rng=(5, 6), backend=name)
        results.append([t.cpu() for t in mine["m"]])
    for found in results:
        differ = sum((a != b).sum().item() for a, b in zip(found, results[-1], strict=True))
        assert differ <= 4, "of 17811"


@on_backends
def test_a_moment_that_may_not_be_bfloat16(backend: str, device: str) -> None:
    one, m = torch.ones(3, device=device), torch.ones(3, device=device, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] is .*bfloat16.* expected .*float32"):
        ops.lion_step_([one], [one], [m], backend=backend)
    for dtype in (torch.float64, torch.float16, torch.complex64):
        p = one.to(dtype)
        with pytest.raises(ValueError, match=r"exp_avgs\[0\] is .*bfloat16"):
            ops.lion_step_([p], [p.clone()], [m], rng=(0, 0), backend=backend)
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[0\] is .*bfloat16"):
        ops.adam_step_([one], [one.clone()], [m], [m.clone()], step=1, rng=(0, 0), backend=backend)


@on_backends
def test_rng_where_nothing_is_rounded(backend: str, device: str) -> None:
    """Moments in the dtype of their parameters stay as they are without it."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.complex64):
        results = []
        for rng in (None, (3, 4)):
            p, g, m = (torch.full((40,), x, device=device).to(dtype) for x in (1.0, 0.3, 0.7))
            ops.sgd_step_([p], [g], [m], lr=0.1, momentum=0.9, rng=rng, backend=backend)
            results.append((p, m))
        assert all(map(op_db.same_bits, *results))


WRONG = [
    ({"rng": 3}, ValueError, r"rng=3: expected \(seed, step\)"),
    ({"rng": (1, 2, 3)}, ValueError, "rng="),
    ({"rng": (-1, 2)}, ValueError, r"rng\[0\]=-1"),
    ({"rng": (1, 2), "indices": [1, 2]}, ValueError, "indices has 2 numbers, expected 1"),
    ({"rng": (1, 2), "indices": [2**31]}, ValueError, r"indices\[0\]=2147483648"),
    ({"rng": (1, 2), "shards": [(0, 0)]}, ValueError, "shards="),
]


@pytest.mark.parametrize(("options", "error", "match"), WRONG, ids=[match[:16] for _, _, match in WRONG])
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], match: str) -> None:
    p, g, m = torch.ones(3), torch.ones(3), torch.zeros(3, dtype=torch.bfloat16)
    with pytest.raises(error, match=match):
        ops.sgd_step_([p], [g], [m], lr=0.1, momentum=0.9, **options)
    assert (p == 1).all() and (m == 0).all()


# --- the registered ops -----------------------------------------------------------------------------------------------
W, M = (lambda: [torch.ones(3), torch.ones(2)]), (lambda: [torch.ones(n, dtype=torch.bfloat16) for n in (3, 2)])
D5, D6, D1 = (torch.zeros(n, dtype=torch.float64) for n in (5, 6, 1))
RNG = torch.zeros(2, dtype=torch.int64)
LISTS: tuple[Any, ...] = (W(), W(), [], [])
RAW: list[tuple[str, tuple[Any, ...], str]] = [
    ("restore_lion_step_", (*LISTS, M(), [], D5, [2], False, None, None, None, [], []), r"exp_avgs\[0\] has dtype"),
    ("restore_lion_step_", (*LISTS, M(), [], D5, [2], False, None, None, D1, [], []), "rng must be"),
    ("restore_lion_step_", (*LISTS, M(), [], D5, [2], False, None, None, RNG[:1], [], []), "rng has 1 elements"),
    ("restore_lion_step_", (*LISTS, M(), [], D5, [2], False, None, None, RNG, [1], []), "indices has 1 numbers"),
    ("restore_lion_step_", (*LISTS, M(), [], D5, [2], False, None, None, RNG, [1, -1], []), "indices has 2 numbers"),
    ("restore_lion_step_", (*LISTS, M(), [], D5, [2], False, None, None, RNG, [], [0, 0]), "shards has 2 numbers"),
    ("restore_adam_step_", (*LISTS, M(), M(), [], [], D6, D1, [2], False, False, None, None, RNG, [], []),
     r"exp_avg_sqs\[0\] has dtype"),
]  # fmt: skip


@pytest.mark.skipif("cpu" not in BACKEND_IDS, reason="no compiled kernels that could run out of bounds")
@pytest.mark.parametrize(("op", "args", "match"), RAW, ids=[match[:24] for _, _, match in RAW])
def test_registered_ops_guard_memory(op: str, args: tuple[Any, ...], match: str) -> None:
    with pytest.raises(RuntimeError, match=f"rst_fused::{op}: .*{match}"):
        getattr(torch.ops.rst_fused, op)(*args)
