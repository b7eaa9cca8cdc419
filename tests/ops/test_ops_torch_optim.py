"""The base steps against torch.optim: bit for bit where torch rounds as IEEE 754 says, else within a stated bound.

What is known of torch 2.13 on CPUs with AVX2:
* SGD fuses each multiplication with the addition it feeds, as csrc/math/ does: equal bits in float32 and float64.
* Adam and AdamW take the square root from MKL's vector library, which is off by one unit in the last place for about a
  fifth of all float32 and one percent of all float64 numbers. With a correctly rounded root instead, all bits agree.
* For beta1 <= 0.5 torch.lerp computes g - (g - m) beta1 instead of m + (g - m) (1 - beta1): the first moment differs.
The reference backend does not fuse, so it rounds once more in each term. In bfloat16 and float16 torch rounds after
each operation and this package once, so the two differ by a few spacings; fused=True loses updates there: never used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import op_db
import pytest
import torch
from op_db import BACKENDS
from torch import Tensor

from rst_fused import ops

NAMES = [backend.values[0] for backend in BACKENDS if backend.values[1] == "cpu"]
WIDE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
FOREACH = pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
ON = pytest.mark.parametrize("backend", NAMES)
pytestmark = pytest.mark.usefixtures("one_thread")
# torch fuses multiplications and additions only in its AVX2 and AVX-512 kernels.
FUSES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
SIZES, STEPS = (1, 3, 17, 1000, 20_000), 10


def weights(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    flat = [torch.randn(n, dtype=torch.float64, generator=generator).to(dtype) for n in SIZES]
    turned, gaps = (torch.randn((60, 50), generator=generator).to(dtype) for _ in range(2))
    return [*flat, turned.t(), gaps[::2]]


def gradients(step: int, like: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.empty_like(w).copy_(torch.randn(w.shape, dtype=torch.float64, generator=generator)) for w in like]


class Torch:
    """Some steps of a torch.optim optimizer, with its own copies of weights and gradients."""

    def __init__(self, cls: type[torch.optim.Optimizer], like: Sequence[Tensor], **options: Any) -> None:
        self.params = [torch.nn.Parameter(w.clone()) for w in like]
        self.optimizer = cls(self.params, **options)

    def step(self, grads: Sequence[Tensor]) -> None:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g.clone()
        self.optimizer.step()

    def state(self, name: str) -> list[Tensor]:
        return [self.optimizer.state[p][name] for p in self.params]


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(op_db.same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


def spacings(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference, in spacings of the dtype at the size of the tensor's largest number."""
    return max(
        ((a.double() - b.double()).abs().max() / (b.double().abs().max() * torch.finfo(b.dtype).eps)).item()
        for a, b in zip(ours, theirs, strict=True)
    )


SGD = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    {"momentum": 0.9, "weight_decay": 0.05, "maximize": True},
    {"nesterov": True, "momentum": 0.5, "maximize": True},
]


def run_sgd(dtype: torch.dtype, backend: str, options: dict[str, Any], foreach: bool) -> tuple[list[Tensor], Torch]:
    w = weights(dtype)
    theirs, buffers = Torch(torch.optim.SGD, w, lr=0.1, foreach=foreach, **options), [torch.zeros_like(t) for t in w]
    for step in range(STEPS):
        g = gradients(step, w)
        theirs.step(g)
        # torch.optim's first buffer is the gradient itself.
        ours = {**options, "dampening": 0.0} if step == 0 else options
        ops.sgd_step_(w, g, buffers if "momentum" in options else None, lr=0.1, backend=backend, **ours)
    if "momentum" in options and backend == "cpu" and FUSES and dtype not in op_db.HALVES:
        assert same(buffers, theirs.state("momentum_buffer"))
    return w, theirs


@ON
@WIDE
@FOREACH
@pytest.mark.parametrize("options", SGD, ids=lambda o: "-".join(o) or "plain")
def test_sgd(options: dict[str, Any], foreach: bool, dtype: torch.dtype, backend: str) -> None:
    w, theirs = run_sgd(dtype, backend, options, foreach)
    if backend == "cpu" and FUSES:
        assert same(w, theirs.params)
    # A step rounds at most four terms once more or once less, by half a spacing each, most of them smaller than w.
    assert spacings(w, theirs.params) <= STEPS / 2


ADAM = [
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"weight_decay": 0.1}),
    (torch.optim.Adam, {"weight_decay": 0.1, "maximize": True, "betas": (0.6, 0.9), "eps": 1e-3}),
    (torch.optim.AdamW, {"weight_decay": 0.0}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.AdamW, {"weight_decay": 0.1, "maximize": True, "betas": (0.8, 0.99), "eps": 0.1}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1, "maximize": True, "betas": (0.6, 0.7)}),
    (torch.optim.AdamW, {"amsgrad": True, "weight_decay": 0.1, "betas": (0.8, 0.6)}),
]
ADAM_IDS = [f"{cls.__name__}-{'-'.join(options) or 'plain'}" for cls, options in ADAM]
ADAMS = pytest.mark.parametrize(("cls", "options"), ADAM, ids=ADAM_IDS)


ADAM_STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
State = dict[str, list[Tensor]]


def run_adam(
    cls: type, dtype: torch.dtype, backend: str, options: dict[str, Any], foreach: bool
) -> tuple[list[Tensor], State, Torch]:
    """Weights, state and what torch.optim makes of them."""
    w = weights(dtype)
    theirs = Torch(cls, w, lr=0.01, foreach=foreach, **options)
    state = {name: [torch.zeros_like(t) for t in w] for name in ADAM_STATE[: 3 if options.get("amsgrad") else 2]}
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    ours = {k: x for k, x in options.items() if k not in ("betas", "amsgrad")}
    for step in range(1, STEPS + 1):
        g = gradients(step, w)
        theirs.step(g)
        ops.adam_step_(
            w, g, **{f"{name}s": tensors for name, tensors in state.items()}, step=step, lr=0.01, beta1=beta1,
            beta2=beta2, decoupled=cls is torch.optim.AdamW, backend=backend, **ours,
        )  # fmt: skip
    return w, state, theirs


def correctly_rounded_sqrt(t: Tensor) -> Tensor:
    """numpy's root is the processor's, which IEEE 754 requires to be correctly rounded."""
    return torch.empty_like(t).copy_(torch.from_numpy(np.sqrt(t.numpy())))


@pytest.mark.skipif("cpu" not in NAMES or not FUSES, reason="needs the compiled kernels and torch's for AVX2")
@WIDE
@FOREACH
@ADAMS
def test_adam_but_for_the_root(
    cls: type, options: dict[str, Any], foreach: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a correctly rounded root in torch.optim, all bits agree: the root is the only difference."""
    monkeypatch.setattr(torch.Tensor, "sqrt", correctly_rounded_sqrt)
    monkeypatch.setattr(torch, "_foreach_sqrt", lambda ts: [correctly_rounded_sqrt(t) for t in ts])
    w, state, theirs = run_adam(cls, dtype, "cpu", options, foreach)
    assert all(same(ours, theirs.state(name)) for name, ours in state.items())
    assert same(w, theirs.params)


@ON
@WIDE
@FOREACH
@ADAMS
def test_adam(cls: type, options: dict[str, Any], foreach: bool, dtype: torch.dtype, backend: str) -> None:
    w, state, theirs = run_adam(cls, dtype, backend, options, foreach)
    if backend == "cpu" and FUSES and cls is torch.optim.AdamW:  # no weights, and so no roots, in the moments
        assert all(same(ours, theirs.state(name)) for name, ours in state.items())
    # An update is about a hundredth of a weight, so a root that is off seldom moves a weight by one spacing.
    assert spacings(w, theirs.params) <= STEPS / 2
    assert all(spacings(ours, theirs.state(name)) <= 2 * STEPS for name, ours in state.items())


def test_amsgrad_differs_from_adam() -> None:
    """In the cases above the largest second moment is not always the last one."""
    for cls, options in (case for case in ADAM if case[1].get("amsgrad")):
        _, state, _ = run_adam(cls, torch.float64, "reference", options, False)
        larger = [(a > b).any() for a, b in zip(state["max_exp_avg_sq"], state["exp_avg_sq"], strict=True)]
        assert all(larger[2:])


@ON
@WIDE
def test_adam_with_a_small_beta1(dtype: torch.dtype, backend: str) -> None:
    """Where torch.lerp switches to its other form the bound remains."""
    w, state, theirs = run_adam(torch.optim.AdamW, dtype, backend, {"betas": (0.3, 0.9), "weight_decay": 0.1}, False)
    assert spacings(w, theirs.params) <= STEPS / 2
    assert spacings(state["exp_avg"], theirs.state("exp_avg")) <= 2 * STEPS


@ON
@pytest.mark.parametrize("dtype", op_db.HALVES, ids=["bfloat16", "float16"])
def test_16_bit(dtype: torch.dtype, backend: str) -> None:
    """Both round to 16 bits, torch three to five times a step and this package once for each result."""
    w, theirs = run_sgd(dtype, backend, {"momentum": 0.9, "weight_decay": 0.05}, False)
    assert spacings(w, theirs.params) <= 2 * STEPS
    w, _, adam = run_adam(torch.optim.AdamW, dtype, backend, {"eps": 1e-3, "weight_decay": 0.1}, False)
    assert spacings(w, adam.params) <= 2 * STEPS


LION = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "betas": (0.95, 0.98)},
    {"betas": (0.3, 0.6), "maximize": True},
]


@ON
@WIDE
@FOREACH
@pytest.mark.parametrize("options", LION, ids=lambda o: "-".join(o) or "plain")
def test_lion(options: dict[str, Any], foreach: bool, dtype: torch.dtype, backend: str) -> None:
    """Torch has no Lion; pytorch_optimizer has. Both take the same signs, and round a mean and a decay otherwise."""
    package = pytest.importorskip("pytorch_optimizer", reason="Lion is compared with that of pytorch_optimizer")
    w = weights(dtype)
    theirs, m = Torch(package.Lion, w, lr=0.01, foreach=foreach, **options), [torch.zeros_like(t) for t in w]
    beta1, beta2 = options.get("betas", (0.9, 0.99))
    ours = {k: x for k, x in options.items() if k != "betas"}
    for step in range(1, STEPS + 1):
        g = gradients(step, w)
        theirs.step(g)
        ops.lion_step_(w, g, m, lr=0.01, beta1=beta1, beta2=beta2, backend=backend, **ours)
    # A step rounds three numbers, each at most once more or once less.
    assert spacings(w, theirs.params) <= 1.5 * STEPS and spacings(m, theirs.state("exp_avg")) <= 2 * STEPS


@ON
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex(dtype: torch.dtype, backend: str) -> None:
    """Complex parameters are pairs of reals, as for torch.optim, in Adam's second moment too."""
    w = [torch.randn(500, dtype=dtype, generator=torch.Generator().manual_seed(0))]
    m, v = [torch.zeros_like(w[0])], [torch.zeros_like(w[0])]
    theirs = Torch(torch.optim.Adam, w, lr=0.01, foreach=False)
    for step in range(1, STEPS + 1):
        g = [torch.randn(500, dtype=dtype, generator=torch.Generator().manual_seed(step))]
        theirs.step(g)
        ops.adam_step_(w, g, m, v, step=step, lr=0.01, backend=backend)
    assert math.isfinite(theirs.params[0].abs().sum().item())
    assert spacings([torch.view_as_real(w[0])], [torch.view_as_real(theirs.params[0])]) <= STEPS
