"""Steps whose weights are kept in gradients have the bits of those whose weights are kept in backups."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from paths import EXECUTORS, covering, no_plans, observed
from torch import Tensor, nn

from rst_fused import RST

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = {"reference": 40}  # plain torch is slow
USUALLY = 500
BASES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.05}, "momentum": {"lr": 0.05, "momentum": 0.9},
    "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adam": {"base": "adam", "lr": 0.01}, "adamw": {"base": "adamw", "lr": 0.01},
    "amsgrad": {"base": "adamw", "lr": 0.01, "amsgrad": True}, "lion": {"base": "lion", "lr": 0.01},
    "remainders": {"lr": 0.05, "momentum": 0.9, "master_weights": "remainder"},
    "instance": {"lr": 0.05, "momentum": 0.9},
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "sam": {"schedule": 1.0}, "asam": {"schedule": 1.0, "adaptive": True, "eta": 0.01}, "rst": {"schedule": 0.5},
}  # fmt: skip
F32, F64, BF16, F16, C64 = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64
SHAPES = [(7,), (2, 3), (1,)]


def run(executor: str, base: str, dtype: torch.dtype, method: str, held: bool) -> Any:
    """All that a user sees at the end, after each gradient was ``held`` for the time of perturb(), or none."""
    backend, _, how = executor.partition(" ")
    generator = torch.Generator().manual_seed(0)

    def values(scale: float) -> list[Tensor]:
        return [scale * torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]

    params = [nn.Parameter(value) for value in values(1.0)]
    options = {"rho": 0.1, "seed": 1, "backend": backend, **BASES[base], **METHODS[method]}
    if base == "instance":
        numbers = {name: options.pop(name) for name in BASES[base]}
        opt = RST(base=torch.optim.SGD(params, **numbers), **options)
    else:
        opt = RST(params, stochastic_rounding=dtype in (BF16, F16), **options)
    noise = [values(1.0) for _ in range(11)]

    def gradients(t: int) -> list[Tensor]:
        for p, b in zip(params, noise[t % len(noise)], strict=True):
            p.grad = torch.add(b, p.detach(), alpha=0.5)
        return [p.grad for p in params if held and p.grad is not None]

    steps = STEPS.get(backend, USUALLY)
    with no_plans() if how == "ops" else nullcontext():
        for t in range(steps):
            kept = gradients(t)
            if opt.perturb():
                assert len(opt._step_state.backups) == (len(params) if held else 0)
                gradients(t + 5)
            kept.clear()
            opt.step()
            assert not opt._step_state.saved
    assert 0 < opt.sam_steps <= opt.steps == steps
    return observed(params, opt)


ROWS = [
    row for row in covering({"base": list(BASES), "dtype": [F32, F64, BF16, F16, C64], "method": list(METHODS),
                             "executor": EXECUTORS}, together=2)
    if (row["base"], row["dtype"]) not in {("lion", C64), ("remainders", F16)}
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(value).split(".")[-1] for value in row.values()))
def test_the_bits_of_steps_with_backups(row: dict[str, Any]) -> None:
    assert run(**row, held=False) == run(**row, held=True)
