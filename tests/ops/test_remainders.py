"""int16 masters: bfloat16 parameters with the 16 bits that they lack to be float32.

Copies in float32 are tested against the oracle. Here every op is given the same weights in both forms, and the results
have to be the same weights, bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import gpu_simulator
import numpy as np
import op_db
import pytest
import torch
from op_db import BACKEND_IDS, BACKENDS, OPS, OpInfo, Sample, Spec
from torch import Tensor

from rst_fused import ops, reference

pytestmark = pytest.mark.usefixtures("one_thread", "simulation")
SIMULATED = pytest.param("simulated", "cpu", marks=gpu_simulator.needed)
on_backends = pytest.mark.parametrize(
    ("backend", "device"), [*BACKENDS, SIMULATED], ids=[*BACKEND_IDS, "simulated"]
)  # fmt: skip
CASES = [
    pytest.param(op, spec, id=f"{op.name}-{spec.name}")
    for op in OPS.values()
    for spec in op.specs
    if "masters" in spec.lists
]
# The largest and the smallest of each kind, what rounding carries into the next exponent, and ties.
EDGES = [
    0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x3F7FFFFF, 0x3F7F8000, 0x3F7F7FFF,
    0x3F808000, 0x3F818000, 0xBF808000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000,
    0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF808000,
]  # fmt: skip


@pytest.fixture
def simulation(request: pytest.FixtureRequest) -> None:
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "simulated":
        request.getfixturevalue("simulator")


def floats(bits: Any) -> Tensor:
    return torch.from_numpy(np.asarray(bits, np.uint32).view(np.float32).copy())


def random_bits(n: int) -> Any:
    return np.random.default_rng(3).integers(0, 2**32, n, dtype=np.uint32)


def split_by_hand(w: Tensor) -> tuple[Any, Any]:
    """In integers, one by one: the multiple of 2^16 next to the bits, the upper one of two, and what is left."""
    upper, lower = [], []
    for number in w.numpy().view(np.uint32).tolist():
        bits = 0x7FC00000 if math.isnan(floats([number])) else number
        nearest = (bits // 2**16 + (bits % 2**16 >= 2**15)) % 2**16
        upper.append(nearest)
        lower.append((bits - nearest * 2**16 + 2**31) % 2**32 - 2**31)
    return upper, lower


def test_the_reference_splits_exactly() -> None:
    w = torch.cat([floats(EDGES), floats(random_bits(4000))])
    b, r = reference.split(w)
    upper, lower = split_by_hand(w)
    assert (b.dtype, r.dtype) == (torch.bfloat16, torch.int16)
    assert b.view(torch.int16).numpy().view(np.uint16).tolist() == upper
    assert r.tolist() == lower
    joined, nan = reference.join(b, r), w.isnan()
    assert torch.equal(joined.view(torch.int32)[~nan], w.view(torch.int32)[~nan])
    assert joined.isnan()[nan].all()


@on_backends
def test_every_kernel_splits_and_joins_as_the_reference(backend: str, device: str) -> None:
    """What a step without decay and gradient leaves of each weight (of an infinite one a NaN): as of a copy."""
    w = torch.cat([floats(EDGES), floats(random_bits(4000))]).to(device)
    copies, (b, r) = [w.clone()], reference.split(w)
    params, halves = ([b.clone()] for _ in range(2))
    zeros, masters = [torch.zeros_like(b)], [r.clone()]
    ops.sgd_step_(params, zeros, lr=0.0, masters=copies, backend=backend)
    ops.sgd_step_(halves, zeros, lr=0.0, masters=masters, backend=backend)
    numbers = ~copies[0].isnan()
    for found, expected in zip((halves[0], masters[0]), reference.split(copies[0]), strict=True):
        assert torch.equal(found.view(torch.int16)[numbers], expected.view(torch.int16)[numbers])
    assert torch.equal(copies[0][numbers & (w != 0)], w[numbers & (w != 0)])
    assert halves[0][~numbers].isnan().all() and not masters[0][~numbers].any()


@on_backends
def test_any_two_halves_are_a_number_unless_the_parameter_is_none(backend: str, device: str) -> None:
    """Somebody else may have written the parameter: 0 beside a negative remainder, say."""
    b = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    b = b[~b.isinf()]  # of which the step makes NaN, as of copies
    for r in (-(2**15), -1, 1, 2**15 - 1):
        params, masters = [b.to(device)], [torch.full_like(b, r, dtype=torch.int16, device=device)]
        ops.sgd_step_(params, [torch.zeros_like(params[0])], lr=0.0, masters=masters, backend=backend)
        after = reference.join(params[0].cpu(), masters[0].cpu())
        assert torch.equal(after.isnan(), b.isnan())
        off = (after.double() - b.double())[~b.isnan()].abs()
        spacing = 2.0 ** (b[~b.isnan()].double().abs().clamp_min(2.0**-126).log2().floor() - 7)
        assert (off <= spacing / 2).all()


def test_infinite_parameters_stay_so() -> None:
    b = torch.tensor([torch.inf, torch.inf, -torch.inf, -torch.inf, 0.0, -0.0], dtype=torch.bfloat16)
    r = torch.tensor([1, 2**15 - 1, 1, 0, -1, -(2**15)], dtype=torch.int16)
    joined = reference.join(b, r)
    assert torch.equal(joined, b.float()) and torch.equal(joined.signbit(), b.signbit())


def in_halves(sample: Sample, op: OpInfo) -> Sample:
    """The same weights as parameters, or backups, in bfloat16 with remainders; each tensor is laid out as it was."""
    halves = sample.copied()
    halves.lists["masters"] = [torch.empty_like(m, dtype=torch.int16) for m in sample.lists["masters"]]
    if op.restores or op.name == "perturb_":
        halves.lists["backups"] = [torch.full_like(p, math.nan) for p in halves.lists["params"]]
        halves.options.pop("backups", None)
    read = halves.lists["backups" if op.restores else "params"]
    for b, r, m in zip(read, halves.lists["masters"], sample.lists["masters"], strict=True):
        for to, half in zip((b, r), reference.split(m), strict=True):
            to.copy_(half)
    if "momentum_buffers" not in halves.lists and op.name == "sgd_step_":
        halves.options.pop("momentum", None)
    return halves


@on_backends
@pytest.mark.parametrize(("op", "spec"), CASES)
def test_the_same_weights_in_both_forms(op: OpInfo, spec: Spec, backend: str, device: str) -> None:
    copies = op_db.build(op, spec, "bfloat16", device)
    halves = in_halves(copies, op)
    before = [t.clone() for t in halves.lists.get("backups", [])]
    remainders = [r.clone() for r in halves.lists["masters"]]
    norms = copies.run(op.name, backend), halves.run(op.name, backend)
    if op.norm is not None:
        assert torch.equal(*norms)
        return
    for name in set(op.written) & set(copies.lists) - {"params", "masters", "backups"}:
        assert all(map(op_db.same_bits, copies.lists[name], halves.lists[name])), name
    if op.name == "perturb_":
        kept = [reference.split(m)[0] for m in copies.lists["masters"]]
        assert all(map(op_db.same_bits, halves.lists["backups"], kept))
        assert all(map(op_db.same_bits, halves.lists["params"], copies.lists["params"]))
        assert all(map(torch.equal, halves.lists["masters"], remainders))
    elif op.name == "restore_":
        assert all(map(op_db.same_bits, halves.lists["params"], before))
        assert all(map(torch.equal, halves.lists["masters"], remainders))
    else:
        for m, p, r in zip(copies.lists["masters"], halves.lists["params"], halves.lists["masters"], strict=True):
            assert op_db.same_bits(reference.join(p, r), m)
            assert op_db.same_bits(p, reference.split(m)[0])


@on_backends
def test_the_weights_go_where_the_gradient_was(backend: str, device: str) -> None:
    spec = op_db.spec_of("perturb_", "masters")
    apart = in_halves(op_db.build(OPS["perturb_"], spec, "bfloat16", device), OPS["perturb_"])
    swapped = apart.copied()
    swapped.lists["backups"] = swapped.lists["grads"]
    apart.run("perturb_", backend)
    swapped.run("perturb_", backend)
    assert all(map(op_db.same_bits, apart.lists["params"], swapped.lists["params"]))
    assert all(map(op_db.same_bits, apart.lists["backups"], swapped.lists["grads"]))


@on_backends
def test_an_overflow_without_a_perturbation_changes_nothing(backend: str, device: str) -> None:
    w = torch.randn(50, generator=torch.Generator().manual_seed(1))
    b, r = (t.to(device) for t in reference.split(w))
    params, masters, bad = [b.clone()], [r.clone()], torch.ones(1, device=device)
    ops.sgd_step_(params, [torch.ones_like(b)], lr=0.1, masters=masters, found_inf=bad, backend=backend)
    assert op_db.same_bits(params[0], b) and torch.equal(masters[0], r)


SHORT, FLOAT = torch.int16, torch.float32
WRONG: dict[str, tuple[Any, ...]] = {
    "float16": (torch.float16, [SHORT], r"masters are int16, but params\[0\] is torch.float16: remainders go with"),
    "mixed": (torch.bfloat16, [SHORT, FLOAT], r"masters\[1\] is .*float32.* expected .*int16"),
    "mixed, the other way": (torch.bfloat16, [FLOAT, SHORT], r"masters\[1\] is .*int16.* expected .*float32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_remainder(case: str) -> None:
    """Also by the raw op, which guards memory."""
    dtype, kinds, message = WRONG[case]
    params, grads = ([torch.ones(3, dtype=dtype) for _ in kinds] for _ in range(2))
    masters = [torch.zeros(3, dtype=kind) for kind in kinds]
    with pytest.raises(ValueError, match=message):
        ops.sgd_step_(params, grads, lr=0.1, masters=masters)
    raw = torch.ops.rst_fused.restore_sgd_step_
    hyper = torch.zeros(1, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="expected|go with bfloat16"):
        raw(params, grads, [], [], [], masters, hyper, [len(kinds)], False, False, None, None, None, [], [])
    assert all(p.eq(1).all() for p in params)
