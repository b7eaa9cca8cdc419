"""master_weights="remainder": the float32 weights of bfloat16 parameters in 4 bytes, in the place of 6."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle_optimizer import BACKENDS, Problem, bits
from paths import every_executor, no_plans
from torch import nn

from rst_fused import RST, reference

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
BF16 = torch.bfloat16
STEPS = 30
PROBLEM = Problem([(33,), (5, 7), (0,), (), (300,)], 2 * STEPS)
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "lr": 0.02},
    "sgd-plain": {"lr": 0.02, "stochastic_rounding": False},
    "sgd-asam": {"momentum": 0.9, "nesterov": True, "lr": 0.02, "adaptive": True, "eta": 0.01},
    "adam-mixed": {"base": "adam", "gamma": 2.0},
    "amsgrad": {"base": "adamw", "amsgrad": True},
    "lion": {"base": "lion", "lr": 0.005},
    "adamw-state": {"base": "adamw", "state_dtype": BF16},
    "clipped": {"momentum": 0.9, "lr": 0.02, "max_grad_norm": 1.0},
    "released": {"base": "adamw", "release_gradients": True},
}
every_case = pytest.mark.parametrize("case", CASES)


def make(case: str, backend: str, masters: bool | str = "remainder", **more: Any) -> tuple[list[nn.Parameter], RST]:
    params = PROBLEM.parameters(BF16)
    params.append(nn.Parameter(torch.ones(7)))  # which needs no master
    options = {"lr": 0.01, "rho": 0.3, "schedule": 0.5, "seed": 3, **CASES[case], **more}
    return params, RST(params, backend=backend, master_weights=masters, **options)


def backward(params: list[nn.Parameter], t: int) -> None:
    PROBLEM.backward(params[:-1], t)
    params[-1].grad = None
    (params[-1].square().sum() / 2).backward()


def train(params: list[nn.Parameter], opt: RST, steps: range) -> None:
    for t in steps:
        backward(params, t)
        if opt.perturb():
            backward(params, t + STEPS)
        opt.step()
        if opt.master_weights is True:  # its ties are at even numbers
            with torch.no_grad():
                for p in params:
                    if "master" in opt.state[p]:
                        p.copy_(reference.split(opt.state[p]["master"])[0])


def weights(params: list[nn.Parameter], opt: RST) -> list[torch.Tensor]:
    """In float32."""
    found = []
    for p in params:
        remainder, copy = opt.state[p].get("remainder"), opt.state[p].get("master", p.detach())
        assert remainder is None or (remainder.dtype == torch.int16 and copy.dtype == BF16)
        found.append(copy if remainder is None else reference.join(p.detach(), remainder))
    return found


@every_case
@every_executor
def test_the_run_of_copies(executor: str, case: str) -> None:
    """The same weights, bit for bit."""
    runs = []
    for masters in ("remainder", True):
        params, opt = make(case, executor.split()[0], masters)
        if executor.endswith("ops"):
            with no_plans():
                train(params, opt, range(STEPS))
        else:
            train(params, opt, range(STEPS))
        runs.append((bits(weights(params, opt)), bits(params), opt.sam_steps))
    assert runs[0] == runs[1] and 0 < runs[0][2] < STEPS


@every_backend
def test_what_it_keeps(backend: str) -> None:
    params, opt = make("sgd", backend, schedule=1.0)
    train(params, opt, range(2))
    elements = sum(p.numel() for p in params[:-1])
    assert [opt.state[p]["remainder"].dtype for p in params[:-1]] == [torch.int16] * (len(params) - 1)
    assert set(opt.state[params[-1]]) == {"momentum_buffer"}
    memory = opt.memory()
    assert (memory.masters, memory.backups) == (2 * elements, 0)
    assert memory.state == {"momentum_buffer": 4 * (elements + 7)}
    backward(params, 2)
    assert opt.perturb()
    assert opt.memory().weights_in_gradients == 2 * elements + 4 * 7
    opt.restore()


@every_executor
def test_a_perturbation_that_is_abandoned(executor: str) -> None:
    params, opt = make("adam-mixed", executor.split()[0], schedule=1.0)
    train(params, opt, range(2))
    before, halves = bits(params), bits([opt.state[p]["remainder"] for p in params[:-1]])
    backward(params, 2)
    assert opt.perturb() and bits(params) != before
    opt.restore()
    assert bits(params) == before and bits([opt.state[p]["remainder"] for p in params[:-1]]) == halves


@every_backend
def test_what_is_written_into_a_parameter_counts(backend: str) -> None:
    for number in (3.0, 0.0, -0.0):
        params, opt = make("sgd", backend, schedule=0.0)
        train(params, opt, range(3))
        assert {bool(x) for x in opt.state[params[0]]["remainder"] < 0} == {False, True}
        opt.param_groups[0]["lr"] = 0.0
        with torch.no_grad():
            params[0].fill_(number)
        train(params, opt, range(3, 4))
        assert params[0].eq(number).all()


@every_backend
@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("masters", [True, "remainder"])
def test_checkpoints_of_the_other_kind(masters: bool | str, first: str, backend: str) -> None:
    """The run goes on with the same weights. A copy rounds ties to even, and then a remainder is one too small."""
    other = True if masters == "remainder" else "remainder"
    params, opt = make("amsgrad", backend, masters)
    train(params, opt, range(5))
    tied = [0x3F808000, 0x3F818000, 0x3F828000, 0xBF808000]
    w = torch.tensor([1.00390625, 1.01171875, 1.01953125, -1.00390625])
    assert [x & 0xFFFFFFFF for x in w.view(torch.int32).tolist()] == tied
    with torch.no_grad():
        if masters is True:
            opt.state[params[0]]["master"][:4] = w
            params[0][:4] = w.to(BF16)
        else:
            for half, whole in zip((params[0], opt.state[params[0]]["remainder"]), reference.split(w), strict=True):
                half[:4] = whole
    others, loaded = make("amsgrad", backend, other)
    if first == "model":
        load_weights(others, params)
    loaded.load_state_dict(opt.state_dict())
    load_weights(others, params)
    backward(others, 9)
    assert loaded.perturb(fire=True)
    loaded.restore()
    assert not any({"master", "remainder"} <= state.keys() for state in loaded.state.values())
    off = [
        (a.view(torch.int32) - b.view(torch.int32)).abs()
        for a, b in zip(weights(params, opt), weights(others, loaded), strict=True)
    ]
    assert off[0].tolist()[:4] == ([1, 0, 1, 1] if masters is True else [0] * 4)
    off[0][:4] = 0
    assert not any(x.any() for x in off)
    train(others, loaded, range(5, 8))
    assert all(p.isfinite().all() for p in others)


def load_weights(params: list[nn.Parameter], others: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            p.copy_(q)


@pytest.mark.parametrize("masters", [True, "remainder"])
@pytest.mark.parametrize("back", [True, "remainder"])
def test_torch_optim_reads_its_checkpoints(back: bool | str, masters: bool | str) -> None:
    """And what it has trained since is not undone: by less than half of a spacing, which a remainder may hold."""
    params, opt = make("amsgrad", "cpu", masters)
    train(params, opt, range(3))
    plain = torch.optim.AdamW(params, amsgrad=True, lr=0.05)
    plain.load_state_dict(opt.state_dict())
    backward(params, 3)
    plain.step()
    assert [float(plain.state[p]["step"]) for p in params] == [4.0] * len(params)
    others, again = make("amsgrad", "cpu", back)
    load_weights(others, params)
    again.load_state_dict(plain.state_dict())
    backward(others, 4)
    again.perturb(fire=True)
    again.restore()
    for p, w in zip(params, weights(others, again), strict=True):
        assert torch.allclose(w, p.float(), rtol=2**-8, atol=0)


def test_checkpoints_have_numbers_of_the_parameters_dtype() -> None:
    """The same memory: what torch.distributed.checkpoint loads into it is loaded."""
    params, opt = make("sgd", "cpu")
    train(params, opt, range(2))
    saved = opt.state_dict()["state"]
    for i, p in enumerate(params[:-1]):
        assert saved[i]["remainder"].dtype == BF16
        assert saved[i]["remainder"].data_ptr() == opt.state[p]["remainder"].data_ptr()


def test_masters_that_nobody_would_write_are_not_loaded() -> None:
    params, opt = make("sgd", "cpu")
    train(params, opt, range(2))
    others, loaded = make("sgd", "cpu", masters=False)
    loaded.load_state_dict(opt.state_dict())
    assert not any({"master", "remainder"} & state.keys() for state in loaded.state.values())


def test_errors() -> None:
    half = [nn.Parameter(torch.ones(3, dtype=torch.float16))]
    with pytest.raises(ValueError, match=r"params\[0\] is torch.float16, which has no remainder: expected bfloat16"):
        RST(half, lr=0.1, master_weights="remainder")
    with pytest.raises(ValueError, match="master_weights='rest': expected True or False, or 'remainder'"):
        RST(half, lr=0.1, master_weights="rest")
    base = torch.optim.SGD(half, lr=0.1)
    with pytest.raises(ValueError, match="master_weights='remainder' with an optimizer as base"):
        RST(base=base, master_weights="remainder")
    params, opt = make("sgd", "cpu")
    params[0].data = params[0].data.half()
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 is torch.float16, which has no remainder"):
        opt.step()
    params, opt = make("sgd", "cpu", schedule=1.0)
    train(params, opt, range(1))
    opt.state[params[0]]["remainder"] = opt.state[params[0]]["remainder"].float()
    backward(params, 1)
    with pytest.raises(RuntimeError, match="'remainder' of parameter 0 of group 0 is .*float32.* needs .*int16"):
        opt.perturb()


@every_backend
@pytest.mark.parametrize("masters", [True, "remainder"])
def test_a_master_does_not_outlive_the_dtype(masters: bool | str, backend: str) -> None:
    """What a parameter learns in float32 is not undone when it is bfloat16 again."""
    params, opt = make("sgd", backend, masters)
    train(params, opt, range(2))
    for dtype in (torch.float32, BF16):
        for p in params[:-1]:
            p.data, p.grad = p.detach().to(dtype), None
            del opt.state[p]["momentum_buffer"]
        before = [p.detach().float() for p in params]
        if dtype == torch.float32:
            with torch.no_grad():
                for p in params:
                    p.add_(1.0)
            train(params, opt, range(2, 5))
            assert not any({"master", "remainder"} & state.keys() for state in opt.state.values())
        else:
            opt.param_groups[0]["lr"] = 0.0
            train(params, opt, range(5, 6))
            for p, w in zip(params, before, strict=True):
                assert torch.equal(p.detach().float(), w)


@pytest.mark.parametrize("masters", [True, "remainder"])
def test_none_is_made_while_a_graph_is_captured(masters: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replay would make it again."""
    params, opt = make("sgd-plain", "cpu", masters, schedule=1.0)
    backward(params, 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    opt._on_gpu = True
    with pytest.raises(RuntimeError, match="would make the optimizer's state again at every replay"):
        opt.perturb(fire=True)
