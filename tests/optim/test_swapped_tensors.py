"""Parameters that become others while the optimizer knows them: torch.utils.swap_tensors, and memory in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle_optimizer import bits
from paths import every_executor
from torch import nn

from rst_fused import RST

pytestmark = pytest.mark.usefixtures("one_thread")
BASES: dict[str, tuple[dict[str, Any], Callable[..., torch.optim.Optimizer]]] = {
    "plain": ({}, torch.optim.SGD),
    "sgd": ({"momentum": 0.9}, torch.optim.SGD),
    "adam": ({}, torch.optim.Adam),
}
every_base = pytest.mark.parametrize("base", BASES)


# --- swap_tensors ---------------------------------------------------------------------------------------------------
@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def load(model: nn.Module) -> None:
    model.load_state_dict({key: 0.5 * value for key, value in model.state_dict().items()})


def there_and_back(model: nn.Module) -> None:
    model.to(torch.float64)
    model.to(torch.float32)


CONVERSIONS: dict[str, Callable[[nn.Module], Any]] = {
    "load_state_dict": load,
    "to float64 and back": there_and_back,
    "to another memory format": lambda model: model.to(memory_format=torch.channels_last),
    "to float64": lambda model: model.to(torch.float64),
    "to bfloat16": lambda model: model.to(torch.bfloat16),
}


def backward(model: nn.Module, t: int) -> None:
    model.zero_grad()
    x = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(t))
    model(x.to(next(model.parameters()).dtype)).square().mean().backward()


@every_executor
@every_base
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("sam", [False, True], ids=["base step", "SAM step"])
@pytest.mark.usefixtures("swapping")
def test_modules_that_swap_their_parameters(sam: bool, conversion: str, base: str, served_by: str) -> None:
    """As with torch.optim. With rho = 0 a SAM step is one of the base optimizer."""
    hyper, torchs = BASES[base]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2)))
    name = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam"}[torchs]
    opt = RST(models[0].parameters(), name, lr=0.05, rho=0.0, schedule=float(sam), backend=served_by, **hyper)
    twin = torchs(models[1].parameters(), lr=0.05, **hyper)
    for t in range(5):
        if t == 3:
            for model in models:
                model.zero_grad()
                CONVERSIONS[conversion](model)
        try:
            backward(models[0], t)
            if opt.perturb():
                backward(models[0], t)
            opt.step()
        except RuntimeError as error:  # torch takes state of any dtype
            dtype = next(models[0].parameters()).dtype
            assert dtype != torch.float32 and base != "plain" and "of group 0" in str(error), error
            return
        backward(models[1], t)
        twin.step()
    tolerance = 2.0**-7 if conversion == "to bfloat16" else 1e-5
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    assert opt.steps == 5


@every_executor
@every_base
def test_a_parameter_swapped_with_one_without_memory(base: str, served_by: str) -> None:
    params = [nn.Parameter(torch.ones(8)) for _ in range(2)]
    opt = RST(params, {torch.optim.SGD: "sgd", torch.optim.Adam: "adam"}[BASES[base][1]], lr=0.1, schedule=1.0,
              backend=served_by, **BASES[base][0])  # fmt: skip
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(8)
        if not opt.draw() or not opt.perturb():
            continue
        for p in params:
            p.grad = torch.ones(8)
        opt.step()
    before = bits(params[:1])
    for p in params:
        p.grad = None
    torch.utils.swap_tensors(params[1], nn.Parameter(torch.empty(8, device="meta")))
    params[0].grad, params[1].grad = torch.ones(8), torch.ones(8, device="meta")
    for call in (opt.perturb, opt.step):
        with pytest.raises((RuntimeError, ValueError), match="parameter 1 of group 0"):
            call()
        assert bits(params[:1]) == before


# --- memory in common -----------------------------------------------------------------------------------------------
def whole(params: list[nn.Parameter]) -> None:
    params[2].data = params[0].data


def part(params: list[nn.Parameter]) -> None:
    params[2].data = params[0].data[16:48]


def column(params: list[nn.Parameter]) -> None:
    params[2].data = params[0].data.view(8, 8)[:, 3]


TIES = {"whole": whole, "part": part, "column": column}


@every_executor
@every_base
@pytest.mark.parametrize("after", [0, 2], ids=["before the first step", "after two steps"])
@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("end", ["restore", "step"])
def test_parameters_that_come_to_share_memory(end: str, tie: str, after: int, base: str, served_by: str) -> None:
    """Perturbed twice, the weights could be lost: refused with both named, or restored exactly."""
    params = [nn.Parameter(torch.linspace(0, 1, n)) for n in (64, 5, 64)]
    hyper, torchs = BASES[base]
    options: dict[str, Any] = {"base": "sgd" if torchs is torch.optim.SGD else "adam", "rho": 1.0, "schedule": 1.0}
    opt = RST(params, lr=0.1, backend=served_by, **options, **hyper)

    def gradients() -> None:
        for p in params:
            p.grad = torch.ones_like(p)

    for _ in range(after):
        gradients()
        opt.perturb()
        gradients()
        opt.step()
    opt.state.clear()  # of another shape than what is shared
    opt.param_groups[0]["lr"] = 0.0 if end == "step" else 0.1
    for p in params:
        p.grad = None
    TIES[tie](params)
    before, steps = bits(params), opt.steps
    try:
        gradients()
        opt.perturb()
        if end == "restore":
            opt.restore()
        else:
            gradients()
            opt.step()
    except RuntimeError as error:
        assert "parameter 0 of group 0" in str(error) and "parameter 2 of group 0" in str(error), error
        assert opt.steps == steps
    assert bits(params) == before


@every_executor
@pytest.mark.parametrize("tie", TIES)
def test_base_steps_of_parameters_that_share_memory(tie: str, served_by: str) -> None:
    """One after the other, as torch.optim has it, or refused with both named."""
    params, others = ([nn.Parameter(torch.linspace(0, 1, n)) for n in (64, 5, 64)] for _ in range(2))
    opt, twin = RST(params, lr=0.1, schedule=0.0, backend=served_by), torch.optim.SGD(others, lr=0.1, foreach=False)
    for ps, o in ((params, opt), (others, twin)):
        TIES[tie](ps)
        for p in ps:
            p.grad = torch.ones_like(p)
        before = bits(ps)
        try:
            o.step()
        except RuntimeError as error:
            assert "parameter 0 of group 0" in str(error) and "parameter 2 of group 0" in str(error), error
            assert bits(ps) == before
            return
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)
