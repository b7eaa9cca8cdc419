"""A launch plan is a cache: with it and without it, all that a user can see is the same, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from paths import every_executor, has_plan, needs_plans, no_plans, observed
from torch import nn

from rst_fused import RST

pytestmark = pytest.mark.usefixtures("one_thread")
BASES: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "mixed": {"momentum": 0.9, "gamma": 2.0, "nesterov": True},
    "adam": {"base": "adam"},
    "amsgrad": {"base": "adamw", "amsgrad": True},
    "lion": {"base": "lion", "gamma": 2.0},
    "rounding": {"base": "adamw", "dtype": torch.bfloat16},
    "masters": {"base": "adamw", "dtype": torch.bfloat16, "master_weights": True},
    "bfloat16 state": {"base": "adamw", "amsgrad": True, "state_dtype": torch.bfloat16},
    "bfloat16 state beside masters": {
        "momentum": 0.9, "dtype": torch.float16, "master_weights": True, "state_dtype": torch.bfloat16, "gamma": 2.0,
    },
    "remainders": {
        "base": "adamw", "dtype": torch.bfloat16, "master_weights": "remainder", "state_dtype": torch.bfloat16,
    },
    "remainders of sgd": {"momentum": 0.9, "dtype": torch.bfloat16, "master_weights": "remainder", "gamma": 2.0},
    "masters of sgd": {"momentum": 0.9, "dtype": torch.float16, "master_weights": True, "gamma": 2.0},
}
every_base = pytest.mark.parametrize("base", BASES)
STEPS = 6


def make(base: str, backend: str = "cpu", **more: Any) -> tuple[list[nn.Parameter], RST]:
    options = {"lr": 0.05, "rho": 0.5, "schedule": 0.7, "seed": 9, "backend": backend, **BASES[base], **more}
    dtype, generator = options.pop("dtype", torch.float32), torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((6, 6), (33,))]
    return params, RST(params, **options)


def gradients(params: list[nn.Parameter], t: int, which: int = 0) -> None:
    """They depend on the weights, so that a wrong perturbation shows."""
    generator = torch.Generator().manual_seed(2 * t + which)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) + p.detach().float()).to(p.dtype)


Change = Callable[[list[nn.Parameter], RST], Any]


def names_of(opt: RST, p: nn.Parameter) -> list[str]:
    """The state of p that has its shape."""
    return [name for name, t in opt.state[p].items() if t.dim()]


def halved(t: torch.Tensor) -> torch.Tensor:
    return 0.5 * t if t.is_floating_point() else t // 2  # of the remainders


def replace_all(params: list[nn.Parameter], opt: RST) -> None:
    for p in params:
        for name in names_of(opt, p):
            opt.state[p][name] = halved(opt.state[p][name])


def move_all(params: list[nn.Parameter], opt: RST) -> None:
    for p in params:
        for name in names_of(opt, p):
            opt.state[p][name].data = halved(opt.state[p][name])


def write_all(params: list[nn.Parameter], opt: RST) -> None:
    for p in params:
        for name in names_of(opt, p):
            opt.state[p][name].copy_(halved(opt.state[p][name]))


def transpose(params: list[nn.Parameter], opt: RST) -> None:
    """The same addresses and sizes, other strides."""
    for name in names_of(opt, params[0]):
        opt.state[params[0]][name].t_()


def turn_parameter(params: list[nn.Parameter], opt: RST) -> None:
    params[0].data = params[0].data.t()


def forget(params: list[nn.Parameter], opt: RST) -> None:
    opt.state[params[1]] = {name: t for name, t in opt.state[params[1]].items() if name in ("master", "remainder")}


def move_parameter(params: list[nn.Parameter], opt: RST) -> None:
    params[1].data = params[1].data.clone()


def write_shared_count(params: list[nn.Parameter], opt: RST) -> None:
    for p in params:
        if "step" in opt.state[p]:
            opt.state[p]["step"].fill_(20)
            return


def own_count(params: list[nn.Parameter], opt: RST) -> None:
    if "step" in opt.state[params[1]]:
        opt.state[params[1]]["step"] = torch.tensor(30.0)


def common_count(params: list[nn.Parameter], opt: RST) -> None:
    if "step" in opt.state[params[1]]:
        opt.state[params[1]]["step"] = opt.state[params[0]]["step"]


CHANGES: dict[str, Change] = {
    "nothing": lambda params, opt: None,
    "state is replaced": replace_all,
    "data of state is replaced": move_all,
    "state is written": write_all,
    "state is transposed in place": transpose,
    "a parameter is transposed": turn_parameter,
    "a parameter moves": move_parameter,
    "state of one is deleted": forget,
    "a shared step count is written": write_shared_count,
    "a step count of its own": own_count,
    "a step count in common": common_count,
    "all state is cleared": lambda params, opt: opt.state.clear(),
    "gradients are kept": lambda params, opt: gradients(params, 99),
}


@needs_plans
@every_base
@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_steps(change: str, base: str) -> None:
    seen: list[list[Any]] = [[], []]
    for plans, found in zip((True, False), seen, strict=True):
        params, opt = make(base)
        with nullcontext() if plans else no_plans():
            for t in range(STEPS):
                if t in (2, 4):
                    CHANGES[change](params, opt)
                gradients(params, t)
                if opt.perturb():
                    found.append(observed(params, opt))
                    gradients(params, t, 1)
                opt.step()
                found.append(observed(params, opt))
        assert has_plan(opt) == plans
    assert seen[0] == seen[1]
    assert len(seen[0]) > STEPS


@every_executor
@every_base
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_abandoned_perturbation_creates_no_state(compiled: bool, base: str, served_by: str) -> None:
    """None but a master, which keeps the weights; a buffer would not start undampened afterwards."""
    params, opt = make(base, served_by)
    torch._dynamo.reset()
    perturb = torch.compile(opt.perturb, backend="eager") if compiled else opt.perturb
    for attempt in range(2):
        gradients(params, attempt)
        opt.draw()
        assert perturb(True)
        opt.restore()
        assert [set(opt.state.get(p, {})) - {"master", "remainder"} for p in params] == [set(), set()]
    torch._dynamo.reset()


@every_executor
@pytest.mark.parametrize("base", ["masters", "masters of sgd"])
@pytest.mark.parametrize("how", ["another tensor", "another tensor in all", "data"])
def test_a_master_replaced_between_the_passes(how: str, base: str, served_by: str) -> None:
    """It keeps the weights, so they would be lost: refused by name, and they are back."""
    params, opt = make(base, served_by, schedule=1.0)
    for t in range(2):
        gradients(params, t)
        opt.perturb()
        gradients(params, t, 1)
        opt.step()
    before, masters = observed(params, opt), [opt.state[p]["master"] for p in params]
    gradients(params, 2)
    opt.perturb()
    for p in params if "all" in how else params[1:]:
        if how == "data":  # other memory that holds the weights as well
            opt.state[p]["master"].data = opt.state[p]["master"].clone()
        else:
            opt.state[p]["master"] = 2 * opt.state[p]["master"]
    gradients(params, 2, 1)
    if how == "data":
        opt.step()
        others, twin = make(base, served_by, schedule=1.0)
        for t in range(3):
            gradients(others, t)
            twin.perturb()
            gradients(others, t, 1)
            twin.step()
        assert observed(params, opt) == observed(others, twin)
        return
    with pytest.raises(RuntimeError, match=r"master.*parameter [01] of group 0|parameter [01] of group 0.*master"):
        opt.step()
    for p, master in zip(params, masters, strict=True):
        opt.state[p]["master"] = master
    assert observed(params, opt) == before


# --- the draw -------------------------------------------------------------------------------------------------------
@every_executor
@pytest.mark.parametrize("form", ["two phases", "closure"])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_schedule_set_after_the_draw(p: float, form: str, served_by: str) -> None:
    params, opt = make("sgd", served_by, schedule=1 - p)
    others, twin = make("sgd", served_by, schedule=p)
    for t in range(3):
        opt.schedule = 1 - p
        assert opt.draw() == (p == 0)
        opt.schedule = p
        assert opt.draw() == (p == 1)
        for ps, o in ((params, opt), (others, twin)):
            if form == "closure":
                passes = iter(range(2))
                o.step(lambda ps=ps, passes=passes, t=t: gradients(ps, t, next(passes)))
                continue
            gradients(ps, t)
            if o.perturb():
                gradients(ps, t, 1)
            o.step()
        assert observed(params, opt) == observed(others, twin)
    assert opt.sam_steps == 3 * p


@every_executor
@pytest.mark.parametrize("when", ["after the draw", "between the passes"])
@pytest.mark.parametrize(("first", "second"), [(1.0, 2.0), (2.0, 1.0), (2.0, 3.0), (1.0, "match")])
def test_gamma_set_after_the_draw(first: Any, second: Any, when: str, served_by: str) -> None:
    """It holds for the step under way, unless that has been perturbed: then from the next one on."""
    params, opt = make("sgd", served_by, schedule=0.5)
    others, twin = make("sgd", served_by, schedule=0.5)
    for t in range(3):
        opt.gamma = first
        opt.draw()
        if when == "after the draw":
            opt.gamma = second
        twin.gamma = second if when == "after the draw" else first
        for ps, o in ((params, opt), (others, twin)):
            gradients(ps, t)
            assert o.perturb(True)
            if o is opt:
                opt.gamma = second
            gradients(ps, t, 1)
            o.step()
        assert observed(params, opt) == observed(others, twin)


# --- stochastic rounding --------------------------------------------------------------------------------------------
@every_executor
def test_random_bits_after_a_late_conversion(served_by: str) -> None:
    """Others at every step, and those of an optimizer that was made for bfloat16."""
    late, always = (nn.Parameter(torch.ones(4096, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    opts = [RST([p], lr=0.0, rho=1e-2, schedule=1.0, backend=served_by) for p in (late, always)]
    late.data = late.data.bfloat16()
    seen: list[list[torch.Tensor]] = [[], []]
    for _ in range(3):
        for p, opt, found in zip((late, always), opts, seen, strict=True):
            p.grad = None
            p.grad = torch.ones(4096, dtype=torch.bfloat16)
            opt.perturb()
            found.append(p.detach().clone())
            p.grad = torch.ones(4096, dtype=torch.bfloat16)
            opt.step()
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert not any(torch.equal(seen[0][i], seen[0][j]) for i, j in ((0, 1), (0, 2), (1, 2)))
