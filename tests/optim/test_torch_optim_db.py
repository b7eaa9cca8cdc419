"""torch's own tables of optimizers: what its tests give to SGD, Adam and AdamW, ours take, and do the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizer_cases import PROBLEM, every_backend
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from rst_fused import RST, SAM

pytestmark = pytest.mark.usefixtures("one_thread")
BASES = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}
# Ways to run it, which are the business of backends here.
IMPLEMENTATIONS = {"foreach", "fused", "differentiable"}
INFOS = [info for info in optim_db if info.optim_cls in BASES]
ROWS = [
    pytest.param(info.optim_cls, given.kwargs, id=f"{BASES[info.optim_cls]}-{given.desc}")
    for info in INFOS for given in info.optim_inputs_func(device="cpu")
    if not IMPLEMENTATIONS & {name for name, value in given.kwargs.items() if value}
]  # fmt: skip
ERRORS = [
    pytest.param(info.optim_cls, error.optimizer_error_input, id=f"{BASES[info.optim_cls]}-{i}")
    for info in INFOS
    for i, error in enumerate(info.optim_error_inputs_func(device="cpu", dtype=torch.float32))
    if error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR and not issubclass(error.error_type, Warning)
]
STEPS = 10


def test_all_three_have_rows() -> None:
    assert {info.optim_cls for info in INFOS} == set(BASES)
    assert len(ROWS) >= 19 and len(ERRORS) >= 10


def copied(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("cls", "kwargs"), ROWS)
def test_the_same_steps(cls: Any, kwargs: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    ours, theirs = (PROBLEM.parameters(dtype) for _ in range(2))
    opt = RST(ours, base=BASES[cls], schedule=0.0, backend=backend, **copied(kwargs))
    twin = cls(theirs, **copied(kwargs))
    for t in range(STEPS):
        opt.step(lambda t=t: PROBLEM.backward(ours, t))
        PROBLEM.backward(theirs, t)
        twin.step()
    tolerance = 20 * STEPS * torch.finfo(dtype).eps
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        kept = {name: value for name, value in twin.state[q].items() if value is not None}
        assert opt.state[p].keys() == kept.keys()
        for name, value in kept.items():
            torch.testing.assert_close(opt.state[p][name], value, rtol=tolerance, atol=tolerance)


@every_backend
@pytest.mark.parametrize(("cls", "kwargs"), ROWS)
def test_a_class_of_torch_becomes_the_fused_base(cls: Any, kwargs: dict[str, Any], backend: str) -> None:
    """SAM around the class, against SAM around an instance of it."""
    ours, theirs = (PROBLEM.parameters(torch.float64) for _ in range(2))
    opt = SAM(ours, cls, backend=backend, **copied(kwargs))
    wrapped = SAM(base=cls(theirs, **copied(kwargs)), backend=backend)
    assert opt.base is None and f"base={BASES[cls]}" in repr(opt)
    for t in range(STEPS):
        opt.step(lambda t=t: PROBLEM.backward(ours, t))
        wrapped.step(lambda t=t: PROBLEM.backward(theirs, t))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@every_backend
@pytest.mark.parametrize(("cls", "kwargs"), ROWS)
def test_states_go_both_ways(cls: Any, kwargs: dict[str, Any], backend: str) -> None:
    """A run that changes its optimizer in the middle, from torch's to ours and back."""
    ours, theirs = (PROBLEM.parameters(torch.float64) for _ in range(2))
    plain, twin = (cls(params, **copied(kwargs)) for params in (ours, theirs))
    opt = RST(ours, base=BASES[cls], schedule=0.0, backend=backend, **copied(kwargs))
    again = cls(ours, **copied(kwargs))
    for t in range(9):
        if t == 3:
            opt.load_state_dict(plain.state_dict())
        if t == 6:
            again.load_state_dict(opt.state_dict())
        for params, current in ((ours, (plain, opt, again)[t // 3]), (theirs, twin)):
            PROBLEM.backward(params, t)
            current.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("cls", "given"), ERRORS)
def test_what_torch_refuses_is_refused(cls: Any, given: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        cls(given.params, **given.kwargs)
    with pytest.raises((TypeError, ValueError)):
        RST(given.params, base=BASES[cls], **given.kwargs)
