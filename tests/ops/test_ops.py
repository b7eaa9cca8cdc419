"""Every op on every backend and dtype against the float64 oracle; then what the oracle cannot say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gpu_simulator
import op_db
import oracle
import pytest
import torch
from op_checks import CASES, check_lists, check_stats
from op_db import BACKEND_IDS, BACKENDS, OPS, Sample
from torch import Tensor

from rst_fused import _op_arguments, ops
from rst_fused._schemas import SCHEMAS, STATS

pytestmark = pytest.mark.usefixtures("one_thread")
on_backends = pytest.mark.parametrize(("backend", "device"), BACKENDS, ids=BACKEND_IDS)
of_dtypes = pytest.mark.parametrize("dtype", op_db.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
UPDATES = [op for op in OPS.values() if op.name.endswith("_step_")]
# float64 results have no wider type to be compared in: the oracle rounds as often as the op.
NORM_TOLERANCE = 1e-12
# The CPU kernels add eight squares in fp32, each time off by at most 2^-24 of the sum, whose root is half as far off.
# Errors of both signs leave less than one of them in the norm.
FP32_TOLERANCE = {"cpu": 2.0**-24, "cuda": gpu_simulator.NORM_ERROR}


def test_every_op_has_a_row() -> None:
    assert set(OPS) == op_db.FUNCTIONS
    assert set(SCHEMAS) == {op for op in OPS if f"restore_{op}" not in OPS}


@on_backends
@pytest.mark.parametrize(("op", "spec", "kind"), CASES)
def test_against_oracle(op: op_db.OpInfo, spec: op_db.Spec, kind: str, backend: str, device: str) -> None:
    sample = op_db.build(op, spec, kind, device)
    after = sample.copied()
    result = after.run(op.name, backend)
    if op.norm is not None:
        norm = op.norm(**sample.lists, **sample.options)
        in_fp64 = kind in ("float64", "complex128")
        tolerance = NORM_TOLERANCE if in_fp64 else FP32_TOLERANCE.get(backend, NORM_TOLERANCE)
        if backend == "reference" and "asam" in spec.name:
            tolerance = 1e-6  # it takes |w| of a complex64 tensor in float32
        check_stats(result, norm, tolerance)
    expected: oracle.Results = {} if op.oracle is None else op.oracle(**sample.lists, **sample.options)
    check_lists(op, sample, after, expected, sample.options.get("stochastic_rounding", True))


# --- norms that have no direction -----------------------------------------------------------------------------------
def weights_and(grads: list[list[float]], dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    g = [torch.tensor(x, device=device).to(dtype) for x in grads]
    return [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(t) for t in g], g


@on_backends
@of_dtypes
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_no_direction(bad: float, adaptive: bool, dtype: torch.dtype, backend: str, device: str) -> None:
    """Zero and non-finite gradients: e = 0, bit for bit, and stats say which it was."""
    w, g = weights_and([[0.0 if bad == 0 else 1.0] * 20, [0.0] * 5 + [bad] + [0.0] * 30], dtype, device)
    w[0][:3] = torch.tensor([-0.0, math.nan, math.inf], dtype=dtype)
    if adaptive:  # |w| = inf alone would make the norm infinite
        w[0][:3] = -0.0
    before, backups = [t.clone() for t in w], [torch.zeros_like(t) for t in w]
    stats = ops.grad_norm(g, w, adaptive=adaptive, eta=0.01, backend=backend)
    norm, inverse, non_finite, count, ticket, squared_norm = stats.tolist()
    assert (inverse, non_finite, count, ticket) == (0.0, float(bad != 0), float(bad != 0), 0.0)
    assert math.isnan(norm) if math.isnan(bad) else norm == squared_norm == abs(bad)
    ops.perturb_(w, g, backups, stats, rho=0.5, adaptive=adaptive, eta=0.01, backend=backend)
    for p, old, saved in zip(w, before, backups, strict=True):
        assert op_db.same_bits(p, old) and op_db.same_bits(saved, old)


@on_backends
@pytest.mark.parametrize("dtype", op_db.HALVES)
def test_no_direction_with_masters(dtype: torch.dtype, backend: str, device: str) -> None:
    """The parameter stays as it is: a new draw of its rounding would be a perturbation."""
    g = [torch.zeros(500, dtype=dtype, device=device)]
    masters = [torch.randn(500, generator=torch.Generator().manual_seed(0)).to(device)]
    w = [masters[0].to(dtype)]
    stats = ops.grad_norm(g, backend=backend)
    ops.perturb_(w, g, None, stats, rho=0.5, masters=masters, backend=backend)
    assert op_db.same_bits(w[0], masters[0].to(dtype))


@on_backends
@of_dtypes
def test_rho_zero(dtype: torch.dtype, backend: str, device: str) -> None:
    """The backup is written all the same: what follows restores from it."""
    w, g = weights_and([[1.0] * 20], dtype, device)
    before, kept = w[0].clone(), [torch.zeros_like(w[0])]
    ops.perturb_(w, g, kept, ops.grad_norm(g, backend=backend), rho=0.0, backend=backend)
    assert torch.equal(w[0], before) and op_db.same_bits(kept[0], before)


@on_backends
def test_stats_count_bad_norms(backend: str, device: str) -> None:
    good, bad = torch.ones(4, device=device), torch.full((4,), math.inf, device=device)
    stats = ops.grad_norm([good], backend=backend)
    for g, flag, count in ((bad, 1, 1), (good, 0, 1), (bad, 1, 2), (good, 0, 2)):
        assert ops.grad_norm([g], stats=stats, backend=backend) is stats
        assert stats[2:5].tolist() == [flag, count, 0]
    assert stats[0] == 2.0 and stats.dtype == torch.float64 and stats.device.type == device
    assert ops.grad_norm([], backend=backend).tolist() == [0] * len(STATS)


# --- numbers at the edges -------------------------------------------------------------------------------------------
EXTREMES = [
    (torch.float32, 1e30), (torch.float32, 1e36), (torch.float32, 1e-30),
    (torch.float64, 1e150), (torch.float64, 1e-100),
    (torch.bfloat16, 1e30), (torch.bfloat16, 1e-30), (torch.float16, 6e4), (torch.float16, 1e-7),
    (torch.complex64, 1e30), (torch.complex128, 1e-100),
]  # fmt: skip


@on_backends
@pytest.mark.parametrize(("dtype", "size"), EXTREMES)
def test_extreme_gradients(dtype: torch.dtype, size: float, backend: str, device: str) -> None:
    """Squares beyond float32 and float16, and norms below the eps of float16: exact norms and directions."""
    signs = torch.tensor([1.0, -0.5] * 32, dtype=torch.float64, device=device)
    g = [(size * signs).to(dtype)]
    w = [torch.zeros(64, dtype=dtype, device=device)]
    norm = oracle.grad_norm(g)
    stats = ops.grad_norm(g, backend=backend)
    check_stats(stats, norm, 1e-12)
    expected = oracle.perturb_(w, g, 0.5)["params"]
    ops.perturb_(w, g, [torch.zeros_like(w[0])], stats, rho=0.5, stochastic_rounding=False, backend=backend)
    op_db.assert_close("perturb_", w[0], expected[0])


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_adaptive_at_zero_weights(dtype: torch.dtype, backend: str, device: str) -> None:
    """T = 0 where w = 0 and eta = 0: nothing moves there; all weights zero: no direction."""
    w = [torch.tensor([0.0, -0.0, 1.0, -2.0], dtype=dtype, device=device)]
    g = [torch.ones(4, dtype=dtype, device=device)]
    backups, before = [torch.zeros_like(w[0])], w[0].clone()
    stats = ops.grad_norm(g, w, adaptive=True, backend=backend)
    ops.perturb_(w, g, backups, stats, rho=0.5, adaptive=True, backend=backend)
    assert torch.equal(w[0][:2], before[:2]) and (w[0][2:] > before[2:]).all()
    zero = [torch.zeros_like(w[0])]
    assert ops.grad_norm(g, zero, adaptive=True, backend=backend).tolist() == [0] * len(STATS)


@on_backends
def test_complex_adaptive_uses_the_modulus(backend: str, device: str) -> None:
    """T^2 = |w|^2 is real, so e is parallel to g; w^2 would turn it."""
    w = [torch.tensor([3 + 4j, 1j], dtype=torch.complex128, device=device)]
    g = [torch.tensor([1 + 0j, 2j], dtype=torch.complex128, device=device)]
    stats = ops.grad_norm(g, w, adaptive=True, backend=backend)
    assert stats[0].item() == pytest.approx(math.sqrt(25 + 4))
    before = w[0].clone()
    ops.perturb_(w, g, [torch.zeros_like(w[0])], stats, rho=2.0, adaptive=True, backend=backend)
    expected = before + 2.0 / math.sqrt(29) * torch.tensor([25 + 0j, 2j], dtype=torch.complex128, device=device)
    torch.testing.assert_close(w[0], expected, rtol=1e-12, atol=0)


@on_backends
@of_dtypes
def test_lion_where_the_sign_is_none(dtype: torch.dtype, backend: str, device: str) -> None:
    """sign(0) = 0: there the weight only decays. sign(NaN) is NaN, and no neighbour notices."""
    w = [torch.ones(20, dtype=dtype, device=device)]
    g, m = [torch.zeros_like(w[0])], [torch.zeros_like(w[0])]
    g[0][3], g[0][7], g[0][11] = 2.0, math.nan, -0.0
    ops.lion_step_(w, g, m, lr=0.5, beta1=0.5, beta2=0.75, weight_decay=0.25, backend=backend)
    expected, mean = torch.full_like(w[0], 0.875), torch.zeros_like(w[0])
    expected[3], mean[3] = 0.375, 0.5
    expected[7] = mean[7] = math.nan
    torch.testing.assert_close(w[0], expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(m[0], mean, rtol=0, atol=0, equal_nan=True)


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *op_db.HALVES])
def test_amsgrad_keeps_nan(dtype: torch.dtype, backend: str, device: str) -> None:
    """As torch.maximum: a NaN in v, or in the largest v so far, stays where it is."""
    w = [torch.ones(20, dtype=dtype, device=device)]
    g, m, v, largest = ([torch.ones_like(w[0])] for _ in range(4))
    v[0][3], largest[0][7] = math.nan, math.nan
    ops.adam_step_(w, g, m, v, max_exp_avg_sqs=largest, step=2, lr=0.5, backend=backend)
    nan = torch.zeros(20, dtype=torch.bool, device=device)
    nan[3] = nan[7] = True
    assert torch.equal(w[0].isnan(), nan) and torch.equal(largest[0].isnan(), nan)


# --- tensors that stand for others ----------------------------------------------------------------------------------
@on_backends
@pytest.mark.parametrize("layout", ["small", "apart"])
@pytest.mark.parametrize("op", [op for op in UPDATES if op.restores], ids=lambda op: op.name)
@pytest.mark.parametrize("kind", ["float32", "mixed"])
def test_parameters_as_their_own_backup(op: op_db.OpInfo, layout: str, kind: str, backend: str, device: str) -> None:
    """A parameter that was not perturbed is its own backup, and its gradient is its own first gradient."""
    spec = op_db.Spec("own", layout, ("first_grads",), {"gamma": 0.7})
    sample = op_db.build(op, spec, kind, device)
    for i in range(0, len(sample.lists["params"]), 2):
        sample.lists["params"][i] = sample.lists["backups"][i]
        sample.lists["first_grads"][i] = sample.lists["grads"][i]
    after = sample.copied()
    after.run(op.name, backend)
    expected = op.oracle(**sample.lists, **sample.options)  # type: ignore[misc]
    for i, t in enumerate(after.lists["params"]):
        op_db.assert_close(f"params[{i}]", t, expected["params"][i])


@on_backends
def test_lazy_conjugates_and_negatives(backend: str, device: str) -> None:
    """Views that torch has not yet computed (conj and neg bits) count with their values."""
    z = torch.randn(100, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).to(device)
    for lazy in (z.conj(), z.conj().imag):
        assert lazy.is_conj() or lazy.is_neg()
        w = [torch.zeros_like(lazy.resolve_conj().resolve_neg())]
        ops.sgd_step_(w, [lazy], lr=1.0, backend=backend)
        assert torch.equal(w[0], -lazy.resolve_conj().resolve_neg())


# --- many steps -----------------------------------------------------------------------------------------------------
@on_backends
@pytest.mark.parametrize(
    ("op_name", "state", "options"),
    [("sgd_step_", ("momentum_buffers",), {"momentum": 0.9}), ("adam_step_", (), {}),
     ("adam_step_", ("max_exp_avg_sqs",), {}), ("lion_step_", (), {})],
    ids=["sgd", "adam", "amsgrad", "lion"],
)  # fmt: skip
def test_many_steps(
    op_name: str, state: tuple[str, ...], options: dict[str, Any], backend: str, device: str
) -> None:
    """100 steps in float64 against the oracle fed with its own results: state is carried as it should be."""
    op = OPS[op_name]
    sample = op_db.build(op, op_db.Spec("many", "apart", state, {**options, "weight_decay": 0.01}), "float64", device)
    for name in set(op.written) & set(sample.lists) - {"params"}:
        for t in sample.lists[name]:
            t.zero_()
    other = sample.copied()
    for step in range(1, 101):
        for s in (sample, other):
            for i, g in enumerate(s.lists["grads"]):
                g.copy_(torch.sin(torch.arange(g.numel(), device=device) * (1 + i) + step).reshape(g.shape))
            if "step" in s.options:
                s.options["step"] = step
        sample.run(op.name, backend)
        for name, results in op.oracle(**other.lists, **other.options).items():  # type: ignore[misc]
            for t, result in zip(other.lists.get(name, []), results, strict=False):
                t.copy_(torch.from_numpy(result.value))
    for name in set(op.written) & set(sample.lists):
        for t, expected in zip(sample.lists[name], other.lists[name], strict=True):
            torch.testing.assert_close(t, expected, rtol=1e-11, atol=1e-13)


# --- autograd, schemas, fake kernels --------------------------------------------------------------------------------
def one_sample(op: str, device: str = "cpu", **more: Any) -> Sample:
    """With every state list."""
    state = ("momentum_buffers",) if "sgd" in op else ("max_exp_avg_sqs",) if "adam" in op else ()
    options = {**({"momentum": 0.9} if "sgd" in op else {}), **more}
    return op_db.build(OPS[op], op_db.Spec("one", "small", state, options), "float32", device)


@on_backends
@pytest.mark.parametrize("op", [op.name for op in OPS.values() if op.written])
def test_version_counters_rise(op: str, backend: str, device: str) -> None:
    sample = one_sample(op, device)
    written = [t for name in OPS[op].written for t in sample.lists.get(name, [])]
    before = [t._version for t in written]
    sample.run(op, backend)
    assert all(t._version > old for t, old in zip(written, before, strict=True))


@on_backends
@pytest.mark.parametrize("op", [op for op in OPS if "params" in OPS[op].written])
def test_autograd_notices_the_change(op: str, backend: str, device: str) -> None:
    """A graph that saved the weights must not run backward through weights that have moved since."""
    sample = one_sample(op, device)
    for p in sample.lists["params"]:
        p.nan_to_num_(1.0).requires_grad_()
    loss = sum((p * p).sum() for p in sample.lists["params"])
    sample.run(op, backend)
    assert all(p.requires_grad and p.is_leaf for p in sample.lists["params"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[union-attr]


class Recorder:
    """A backend that notes the ops called, with their arguments."""

    def __init__(self) -> None:
        self.ops, self.calls = self, []  # type: ignore[var-annotated]

    def __getattr__(self, op: str) -> Callable[..., None]:
        return lambda *args: self.calls.append((op, args))


@pytest.mark.skipif("cpu" not in BACKEND_IDS, reason="no compiled kernels to check against their schemas")
@pytest.mark.parametrize(
    ("op", "options"), [*((op, {}) for op in OPS), *((op.name, {"rng": (3, 4)}) for op in UPDATES)]
)  # fmt: skip
def test_schemas_and_fake_kernels(op: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutates exactly what the schema says, and behaves alike under fake tensors and AOT dispatch."""
    recorder = Recorder()
    monkeypatch.setattr(_op_arguments, "backend_for", lambda *_: recorder)
    one_sample(op, **options).run(op)
    ((registered, args),) = recorder.calls
    assert registered in (op, f"restore_{op}")
    torch.library.opcheck(getattr(torch.ops.rst_fused, registered).default, args)
