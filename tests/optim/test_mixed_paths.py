"""A step may change its path between any two of its calls: with a launch plan, through the ops, compiled.

The numbers are those of a run that is eager throughout, bit for bit; or the call is refused before it changes anything.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from paths import covering, needs_plans, no_plans, observed
from torch import nn
from torch._dynamo.exc import Unsupported
from torch.optim import lr_scheduler

from rst_fused import RST

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error:Detected call of .lr_scheduler.step:UserWarning"),
    needs_plans,
]
PATHS = ("plan", "ops", "compiled", "fullgraph")
COMPILED = ("compiled", "fullgraph")
STEPS, SEED = 5, 9  # which draws base, SAM, SAM, SAM, base
DTYPES: dict[str, dict[str, Any]] = {
    "fp32": {}, "bf16": {"dtype": torch.bfloat16}, "masters": {"dtype": torch.bfloat16, "master_weights": True},
    "remainders": {"dtype": torch.bfloat16, "master_weights": "remainder"}, "state": {"state_dtype": torch.bfloat16},
}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "sgd": {"base": "sgd", "momentum": 0.9, "weight_decay": 0.01}, "adamw": {"base": "adamw", "amsgrad": True},
    "lion": {"base": "lion"},
}  # fmt: skip
CASES = covering({
    "perturb": PATHS, "step": PATHS, "restore": PATHS,
    "rotating": (False, True),  # the next path at every step
    "dtype": tuple(DTYPES), "base": tuple(BASES), "gamma": (1.0, 2.0),
    "scheduler": (False, True),
    "closure": (False, True),  # in every second step, if the path of step is eager
}, together=3)  # fmt: skip
# A refusal names what to write instead.
REMEDY = r"outside|opt\.draw\(\)|opt\.restore\(\)|RST\.step\(opt\)"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    logging.getLogger("torch.__trace").propagate = False
    yield
    torch._dynamo.reset()


class Run:
    """An optimizer whose gradients depend on where the weights are, and its calls by every path."""

    def __init__(self, dtype: str, base: str, gamma: float, scheduler: bool) -> None:
        options = {"lr": 0.1, "rho": 0.5, "gamma": gamma, "schedule": 0.5, "seed": SEED, **BASES[base], **DTYPES[dtype]}
        generator = torch.Generator().manual_seed(0)
        kind = options.pop("dtype", torch.float32)
        self.params = [nn.Parameter(torch.randn(shape, generator=generator).to(kind)) for shape in ((7,), (3, 4))]
        self.opt = opt = RST(self.params, backend="cpu", **options)
        self.scheduler = lr_scheduler.LambdaLR(opt, lambda t: 0.9**t) if scheduler else None

        def compiled(call: Callable[..., Any], fullgraph: bool) -> Callable[..., Any]:
            return torch.compile(call, fullgraph=fullgraph, backend="eager")

        # Around opt.step a scheduler puts a wrapper that Dynamo cannot trace: a full graph calls what is within.
        self.calls: dict[str, dict[str, Callable[..., Any]]] = {
            "perturb": {how: compiled(opt.perturb, how == "fullgraph") for how in COMPILED},
            "step": {"compiled": compiled(opt.step, False), "fullgraph": compiled(lambda: RST.step(opt), True)},
            "restore": {how: compiled(opt.restore, how == "fullgraph") for how in COMPILED},
        }

    def gradients(self, t: int, which: int) -> None:
        generator = torch.Generator().manual_seed(2 * t + which)
        for p in self.params:
            p.grad = (torch.randn(p.shape, generator=generator) + p.detach().float()).to(p.dtype)

    def call(self, name: str, path: str, *args: Any) -> Any:
        if path in COMPILED:
            return self.calls[name][path](*args)
        with no_plans() if path == "ops" else nullcontext():
            return getattr(self.opt, name)(*args)

    def perturb(self, path: str) -> bool:
        fires = self.opt.draw()  # which an eager perturb() does itself, with the same outcome
        return self.call("perturb", path, fires) if path in COMPILED else self.call("perturb", path)

    def step(self, t: int, perturb: str, step: str, restore: str, closure: bool) -> None:
        """One step; every perturbation is abandoned once."""
        self.gradients(t, 0)
        if self.perturb(perturb):
            self.call("restore", restore)
            self.gradients(t, 0)
        if closure and step not in COMPILED and t % 2:
            passes = iter(range(2))
            self.call("step", step, lambda: self.gradients(t, next(passes)))
        else:
            if self.perturb(perturb):
                self.gradients(t, 1)
            self.call("step", step)


def name_of(case: dict[str, Any]) -> str:
    return "-".join(name if value is True else f"{value}" for name, value in case.items() if value is not False)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_same_bits_whatever_path_each_call_takes(case: dict[str, Any]) -> None:
    options = {name: case[name] for name in ("dtype", "base", "gamma", "scheduler")}
    eager, mixed = Run(**options), Run(**options)
    for t in range(STEPS):
        shift = t * case["rotating"]
        paths = [PATHS[(PATHS.index(case[name]) + shift) % len(PATHS)] for name in ("perturb", "step", "restore")]
        eager.step(t, "plan", "plan", "plan", case["closure"])
        before = observed(mixed.params, mixed.opt)
        try:
            mixed.step(t, *paths, closure=case["closure"])
        except (RuntimeError, Unsupported) as error:
            assert may_refuse(*paths), paths
            assert re.search(REMEDY, str(error).partition("from user code")[0]), error
            mixed.opt.restore()
            assert observed(mixed.params, mixed.opt) == before
            mixed.step(t, "plan", "plan", "plan", case["closure"])
        for run in (eager, mixed):
            if run.scheduler is not None:
                run.scheduler.step()
        assert observed(mixed.params, mixed.opt) == observed(eager.params, eager.opt), f"step {t}"
    assert 0 < mixed.opt.sam_steps < mixed.opt.steps == STEPS


def may_refuse(perturb: str, step: str, restore: str) -> bool:
    """What one side of torch.compile has perturbed may be out of reach of the other, and restore() of a full graph."""
    return len({path in COMPILED for path in (perturb, step, restore)}) == 2 or restore == "fullgraph"
