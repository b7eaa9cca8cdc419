"""What holds for any list of tensors: the oracle, and the geometry of a perturbation."""

from __future__ import annotations

import math
from typing import Any

import op_db
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_db import BACKEND_IDS, BACKENDS, OPS, Place, Sample
from torch import Tensor

from rst_fused import ops

pytestmark = pytest.mark.usefixtures("one_thread")
on_backends = pytest.mark.parametrize(("backend", "device"), BACKENDS, ids=BACKEND_IDS)
# The same examples in every run: a failure that comes and goes helps nobody.
examples = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def places(draw: st.DrawFn, size: tuple[int, ...]) -> Place:
    """Any way to lay out ``size``: any order of dimensions, gaps at any of them, any alignment."""
    order = draw(st.permutations(range(len(size))))
    stride, step = [1] * len(size), draw(st.integers(1, 3))
    for d in reversed(order):
        stride[d] = step
        step = max(step * size[d], step) + draw(st.sampled_from((0, 0, 0, 1, 5)))
    return Place(size, tuple(stride), draw(st.integers(0, 5)))


SHAPES = st.lists(st.integers(0, 7), max_size=4) | st.lists(st.integers(1, 1500), min_size=1, max_size=1)
COMPANIONS = ("grads", "backups", "first_grads", *op_db.STATE)


@st.composite
def tensor_lists(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = op_db.DTYPES) -> dict[str, list[Tensor]]:
    """One to five parameters of any shape and dtype, with companions that lie in memory alike or each as it likes."""
    lists: dict[str, list[Tensor]] = {name: [] for name in ("params", *COMPANIONS)}
    for i in range(draw(st.integers(1, 5))):
        size, dtype = tuple(draw(SHAPES)), draw(st.sampled_from(dtypes))
        alike, first = draw(st.booleans()), draw(places(size))
        for name in lists:
            place = first if alike else draw(places(size))
            lists[name].append(op_db.make(name, i, place, dtype, "cpu"))
    return lists


def on_device(lists: dict[str, list[Tensor]], names: tuple[str, ...], device: str, **options: Any) -> Sample:
    return Sample({name: [t.to(device) for t in lists[name]] for name in names}, options)


def numbers(low: float, high: float) -> Any:
    return st.floats(low, high).map(lambda x: round(x, 3))


def check(op: str, sample: Sample, backend: str) -> None:
    after = sample.copied()
    after.run(op, backend)
    expected = OPS[op].oracle(**sample.lists, **sample.options)  # type: ignore[misc]
    for name in set(OPS[op].written) & set(expected) & set(after.lists):
        for i, t in enumerate(after.lists[name]):
            op_db.assert_close(f"{op} {name}[{i}]", t, expected[name][i])


@on_backends
@examples
@given(lists=tensor_lists(), rho=numbers(-1, 1), adaptive=st.booleans(), eta=numbers(0, 0.1))
def test_perturb(
    lists: dict[str, list[Tensor]], rho: float, adaptive: bool, eta: float, backend: str, device: str
) -> None:
    scaling = {"adaptive": adaptive, "eta": eta}
    sample = on_device(lists, ("params", "grads", "backups"), device, rho=rho, stochastic_rounding=False, **scaling)
    stats = ops.grad_norm(sample.lists["grads"], sample.lists["params"], **scaling, backend=backend)
    norm = oracle.grad_norm(lists["grads"], lists["params"], **scaling)
    assert stats[0].item() == pytest.approx(norm, rel=1e-6)
    sample.options["stats"] = torch.tensor(oracle.stats_of(norm), dtype=torch.float64, device=device)
    check("perturb_", sample, backend)


@on_backends
@examples
@given(
    lists=tensor_lists(), gamma=numbers(-1, 3), momentum=numbers(0, 1), dampening=numbers(0, 1), decay=numbers(0, 0.5),
    nesterov=st.booleans(), maximize=st.booleans(),
)  # fmt: skip
def test_restore_sgd_step(
    lists: dict[str, list[Tensor]], gamma: float, momentum: float, dampening: float, decay: float, nesterov: bool,
    maximize: bool, backend: str, device: str,
) -> None:  # fmt: skip
    names = ("params", "grads", "backups", "first_grads", "momentum_buffers")
    options = {"lr": 0.1, "gamma": gamma, "momentum": momentum, "dampening": dampening, "weight_decay": decay}
    sample = on_device(lists, names, device, **options, nesterov=nesterov, maximize=maximize)
    check("restore_sgd_step_", sample, backend)


@on_backends
@examples
@given(
    lists=tensor_lists(), gamma=numbers(-1, 3), beta1=numbers(0, 0.99), beta2=numbers(0, 0.999), decay=numbers(0, 0.5),
    step=st.integers(1, 10**5), decoupled=st.booleans(), maximize=st.booleans(), amsgrad=st.booleans(),
)  # fmt: skip
def test_restore_adam_step(
    lists: dict[str, list[Tensor]], gamma: float, beta1: float, beta2: float, decay: float, step: int, decoupled: bool,
    maximize: bool, amsgrad: bool, backend: str, device: str,
) -> None:  # fmt: skip
    names = ("params", "grads", "backups", "first_grads", "exp_avgs", "exp_avg_sqs")
    names += ("max_exp_avg_sqs",) if amsgrad else ()
    options = {"gamma": gamma, "beta1": beta1, "beta2": beta2, "weight_decay": decay, "eps": 1e-4, "lr": 0.01}
    sample = on_device(lists, names, device, **options, step=step, decoupled=decoupled, maximize=maximize)
    check("restore_adam_step_", sample, backend)


@on_backends
@examples
@given(
    lists=tensor_lists(), gamma=numbers(-1, 3), beta1=numbers(0, 0.99), beta2=numbers(0, 0.999), decay=numbers(0, 0.5),
    maximize=st.booleans(),
)  # fmt: skip
def test_restore_lion_step(
    lists: dict[str, list[Tensor]], gamma: float, beta1: float, beta2: float, decay: float, maximize: bool,
    backend: str, device: str,
) -> None:  # fmt: skip
    names = ("params", "grads", "backups", "first_grads", "exp_avgs")
    options = {"gamma": gamma, "beta1": beta1, "beta2": beta2, "weight_decay": decay, "lr": 0.01}
    check("restore_lion_step_", on_device(lists, names, device, **options, maximize=maximize), backend)


# --- the geometry of e ----------------------------------------------------------------------------------------------
WIDE = (torch.float64, torch.complex128)


def perturbation(
    w: list[Tensor], g: list[Tensor], rho: float, backend: str, **scaling: Any
) -> tuple[list[Tensor], float]:
    stats = ops.grad_norm(g, w, **scaling, backend=backend)
    moved = [t.clone() for t in w]
    ops.perturb_(moved, g, [torch.empty_like(t) for t in w], stats, rho=rho, **scaling, backend=backend)
    return [a - b for a, b in zip(moved, w, strict=True)], stats[0].item()


def length(tensors: list[Tensor]) -> float:
    return math.sqrt(sum((t.abs() ** 2).sum().item() for t in tensors))


def dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum((x.conj() * y).sum().real.item() for x, y in zip(a, b, strict=True))


@on_backends
@examples
@given(lists=tensor_lists(WIDE), rho=numbers(0.001, 10), factor=st.sampled_from((1e-6, 0.5, 3.0, 1e6)))
def test_sam_moves_by_rho_along_the_gradient(
    lists: dict[str, list[Tensor]], rho: float, factor: float, backend: str, device: str
) -> None:
    """||e|| = rho, e is parallel to g, and scaling the loss (or AMP's scale) does not change it."""
    w, g = ([t.to(device) for t in lists[name]] for name in ("params", "grads"))
    e, norm = perturbation(w, g, rho, backend)
    if norm == 0:
        assert length(e) == 0
        return
    assert norm == pytest.approx(length(g), rel=1e-12)
    assert length(e) == pytest.approx(rho, rel=1e-9) and dot(e, g) == pytest.approx(rho * norm, rel=1e-9)
    scaled, scaled_norm = perturbation(w, [t * factor for t in g], rho, backend)
    assert scaled_norm == pytest.approx(norm * factor, rel=1e-12)
    # 1e-12 is added to the norm, which the smallest factor lifts to 1e-6 of it at most.
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-12) for a, b in zip(scaled, e, strict=True))
    opposite, _ = perturbation(w, g, -rho, backend)
    assert all(torch.allclose(a, -b, rtol=1e-6, atol=1e-12) for a, b in zip(opposite, e, strict=True))


@on_backends
@examples
@given(lists=tensor_lists(WIDE), rho=numbers(0.001, 1), eta=numbers(0, 0.1), factor=st.sampled_from((0.25, 4.0)))
def test_asam_does_not_depend_on_the_scale_of_a_parameter(
    lists: dict[str, list[Tensor]], rho: float, eta: float, factor: float, backend: str, device: str
) -> None:
    """||T^-1 e|| = rho; with eta = 0 a rescaled layer, w -> a w and g -> g / a, gives e -> a e (Kwon et al. 2021)."""
    w, g = ([t.to(device) for t in lists[name]] for name in ("params", "grads"))
    e, norm = perturbation(w, g, rho, backend, adaptive=True, eta=eta)
    if norm == 0:
        return
    assert length([a / (b.abs() + eta) for a, b in zip(e, w, strict=True)]) == pytest.approx(rho, rel=1e-6)
    e, _ = perturbation(w, g, rho, backend, adaptive=True)
    scaled = perturbation([t * factor for t in w], [t / factor for t in g], rho, backend, adaptive=True)[0]
    assert all(torch.allclose(a, factor * b, rtol=1e-6, atol=1e-12) for a, b in zip(scaled, e, strict=True))


@on_backends
@examples
@given(lists=tensor_lists(WIDE), gamma=numbers(-1, 3))
def test_updates_are_linear_in_the_gradient(
    lists: dict[str, list[Tensor]], gamma: float, backend: str, device: str
) -> None:
    """SGD's step along the mix is the mix of its steps: (1 - gamma) of the first and gamma of the second gradient."""
    w, g1, g2 = ([t.to(device) for t in lists[name]] for name in ("params", "first_grads", "grads"))

    def step(g: list[Tensor], **mixing: Any) -> list[Tensor]:
        moved = [torch.full_like(t, math.nan) for t in w]
        ops.restore_sgd_step_(moved, g, w, lr=1.0, weight_decay=0.3, backend=backend, **mixing)
        return [a - b for a, b in zip(moved, w, strict=True)]

    mixed = step(g2, first_grads=g1, gamma=gamma)
    for both, a, b in zip(mixed, step(g1), step(g2), strict=True):
        torch.testing.assert_close(both, (1 - gamma) * a + gamma * b, rtol=0, atol=1e-13)


@on_backends
@examples
@given(lists=tensor_lists(), cuts=st.lists(st.integers(0, 5), min_size=2, max_size=2))
def test_restore_undoes_perturb(
    lists: dict[str, list[Tensor]], cuts: list[int], backend: str, device: str
) -> None:
    """Bit for bit, wherever the tensors lie and however they are grouped."""
    w, g, kept = ([t.to(device) for t in lists[name]] for name in ("params", "grads", "backups"))
    before, n = [t.clone() for t in w], len(w)
    low, high = sorted(min(c, n) for c in cuts)
    stats = ops.grad_norm(g, backend=backend)
    sizes = [low, high - low, n - high]
    ops.perturb_(w, g, kept, stats, rho=[1.0, 10.0, 100.0], group_sizes=sizes, backend=backend)
    assert all(op_db.same_bits(a, b) for a, b in zip(kept, before, strict=True))
    ops.restore_(w, kept, backend=backend)
    assert all(op_db.same_bits(a, b) for a, b in zip(w, before, strict=True))
