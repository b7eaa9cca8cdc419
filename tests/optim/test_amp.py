"""Mixed precision: autocast, and GradScaler, whose overflows skip the update but never the restore."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle_optimizer import BACKENDS, Problem, bits
from torch import nn

from rst_fused import RST

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
PROBLEM = Problem([(5,), (3, 4), (0,), (33,)], 20)
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "lr": 0.05},
    "sgd-mixed": {"nesterov": True, "momentum": 0.9, "lr": 0.05, "gamma": "match"},
    "adamw": {"base": "adamw", "lr": 0.02},
    "adam-mixed": {"base": "adam", "lr": 0.02, "gamma": 2.0, "maximize": True},
    "amsgrad": {"base": "adam", "lr": 0.02, "amsgrad": True},
    "lion-mixed": {"base": "lion", "lr": 0.005, "gamma": 2.0},
    "masters": {"base": "adamw", "lr": 0.02, "master_weights": True, "dtype": torch.float16},
    "instance": {"instance": torch.optim.SGD, "gamma": "match"},
    "instance-adam": {"instance": torch.optim.Adam},
}
every_case = pytest.mark.parametrize("case", CASES)
SCALE = 1024.0  # a power of two: scaling and unscaling are exact


def make(case: str, backend: str, **more: Any) -> tuple[list[nn.Parameter], RST]:
    options = {"rho": 0.3, "seed": 1, "backend": backend, **CASES[case], **more}
    params = PROBLEM.parameters(options.pop("dtype", torch.float32))
    cls = options.pop("instance", None)
    return params, (RST(base=cls(params, lr=0.02), **options) if cls else RST(params, **options))


def scaled_backward(params: list[nn.Parameter], t: int, scaler: Any, overflow: bool = False) -> None:
    PROBLEM.backward(params, t)
    for p in params:
        p.grad *= scaler.get_scale()
    if overflow:
        params[1].grad[0, 0] = math.inf


def new_scaler(**options: Any) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=10**6, **options)
    scaler.scale(torch.ones(()))  # allocates its tensors
    return scaler


def everything(params: list[nn.Parameter], opt: RST) -> Any:
    return bits(params), [bits([v for _, v in sorted(opt.state.get(p, {}).items())]) for p in params]


@every_case
@every_backend
def test_scaled_run_is_the_unscaled_one(case: str, backend: str) -> None:
    """Bit for bit: the scale is a power of two, and the direction of a perturbation does not depend on it.

    Only the 1e-12 beside the norm is not scaled along, which float16 and float32 do not see at norms of about ten.
    """
    params, opt = make(case, backend)
    others, twin = make(case, backend)
    scaler, plans = new_scaler(), []
    for t in range(20):
        scaled_backward(params, t, scaler)
        if opt.perturb():
            scaled_backward(params, t, scaler)
        scaler.step(opt)
        scaler.update()
        PROBLEM.backward(others, t)
        if twin.perturb():
            PROBLEM.backward(others, t)
        twin.step()
        assert everything(params, opt) == everything(others, twin)
        assert not hasattr(opt, "found_inf") and not hasattr(opt, "grad_scale")
        plans.append(opt._plans._plan)
    if backend == "cpu" and opt.rule is not None:  # a step that AMP scales is served by the plan too
        assert plans[0] is not None and all(plan is plans[0] for plan in plans)
    assert (opt.steps, opt.sam_steps) == (20, twin.sam_steps)
    assert scaler.get_scale() == SCALE


@every_case
@every_backend
@pytest.mark.parametrize("fire", [False, True], ids=["base step", "SAM step"])
def test_overflow_restores_and_skips(fire: bool, case: str, backend: str) -> None:
    params, opt = make(case, backend)
    scaler = new_scaler()
    for t in range(3):
        scaled_backward(params, t, scaler)
        if opt.perturb(fire=True):
            scaled_backward(params, t, scaler)
        scaler.step(opt)
        scaler.update()
    before = everything(params, opt)
    scaled_backward(params, 3, scaler, overflow=not fire)
    if opt.perturb(fire=fire):
        assert bits(params) != before[0]
        scaled_backward(params, 3, scaler, overflow=True)
    scaler.step(opt)
    scaler.update()
    assert everything(params, opt) == before
    assert scaler.get_scale() == SCALE / 2
    assert opt.steps == 4 and not opt._step_state.perturbed
    scaled_backward(params, 4, scaler)
    scaler.step(opt)
    assert everything(params, opt) != before


@every_backend
@pytest.mark.parametrize("case", ["sgd-mixed", "adam-mixed", "instance"])
def test_overflow_of_the_first_pass_alone_counts_for_mixing(case: str, backend: str) -> None:
    """The scaler sees the second gradients only; the first ones would bring their inf into the update."""
    params, opt = make(case, backend)
    scaler = new_scaler()
    before = bits(params)
    scaled_backward(params, 0, scaler, overflow=True)
    assert opt.perturb(fire=True) and bits(params) == before
    scaled_backward(params, 0, scaler)
    scaler.step(opt)
    assert bits(params) == before and opt.non_finite_norms == 1


@pytest.mark.parametrize("case", [c for c in CASES if c != "masters"])  # torch refuses to unscale float16
@every_backend
def test_unscale_before_the_step_to_clip(case: str, backend: str) -> None:
    """RST: the gradients of the second pass are all that counts. G-RST: refused, as those of the first stay scaled."""
    params, opt = make(case, backend)
    others, twin = make(case, backend)
    scaler = new_scaler()
    before = bits(params)
    scaled_backward(params, 0, scaler)
    opt.perturb(fire=True)
    scaled_backward(params, 0, scaler)
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(params, 0.5)
    if "gamma" in CASES[case]:
        with pytest.raises(RuntimeError, match="unscale_.*gamma != 1.*leave the unscaling to scaler.step"):
            scaler.step(opt)
        assert bits(params) == before and not hasattr(opt, "found_inf")
        PROBLEM.backward(params, 0)
        opt.step()
        assert bits(params) != before
        return
    scaler.step(opt)
    PROBLEM.backward(others, 0)
    twin.perturb(fire=True)
    PROBLEM.backward(others, 0)
    nn.utils.clip_grad_norm_(others, 0.5)
    twin.step()
    assert everything(params, opt) == everything(others, twin)


@every_backend
@pytest.mark.parametrize("case", ["sgd", "instance"])
def test_closure_by_a_scaler_is_refused(case: str, backend: str) -> None:
    """GradScaler refuses a keyword itself; a positional closure it would let run on scaled gradients."""
    params, opt = make(case, backend, schedule=1.0)
    scaler = new_scaler()
    scaled_backward(params, 0, scaler)
    before = everything(params, opt)
    with pytest.raises(RuntimeError, match=r"step\(closure\) by a GradScaler.*perturb\(\) and scaler.step"):
        scaler.step(opt, lambda: scaled_backward(params, 0, scaler))
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(opt, closure=lambda: scaled_backward(params, 0, scaler))
    assert everything(params, opt) == before
    opt.step(lambda: PROBLEM.backward(params, 0))  # no scaler: fine, and nothing of it is left
    assert opt.sam_steps == 1 and everything(params, opt) != before


@every_backend
@pytest.mark.parametrize("case", ["sgd-mixed", "instance", "adamw"])
def test_disabled_scaler_and_no_gradients(case: str, backend: str) -> None:
    params, opt = make(case, backend, schedule=1.0)
    others, twin = make(case, backend, schedule=1.0)
    off = torch.amp.GradScaler("cpu", enabled=False)
    for ps, o, step in ((params, opt, lambda: off.step(opt)), (others, twin, lambda: twin.step())):
        PROBLEM.backward(ps, 0)
        o.perturb()
        PROBLEM.backward(ps, 0)
        step()
    assert everything(params, opt) == everything(others, twin)
    before = bits(params)
    scaler = new_scaler()
    scaled_backward(params, 1, scaler)
    opt.perturb()
    opt.zero_grad()
    scaler.step(opt)  # no gradient at all in the second pass
    assert bits(params) == before and opt.steps == 2


@every_backend
@pytest.mark.parametrize("gamma", [1.0, "match"])
def test_autocast_bfloat16(gamma: Any, backend: str) -> None:
    """Weights and gradients are float32, so a run on autocast trains, and both forms agree."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    results = []
    for closure in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        opt = RST(model.parameters(), lr=0.1, momentum=0.9, gamma=gamma, model=model, backend=backend)

        def backward(model: nn.Module = model, opt: RST = opt) -> torch.Tensor:
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
                loss = nn.functional.cross_entropy(out, y)
            assert out.dtype == torch.bfloat16
            loss.backward()
            return loss.detach()

        losses = []
        for _ in range(30):
            if closure:
                losses.append(opt.step(backward))
                continue
            losses.append(backward())
            if opt.perturb():
                with opt.second_pass():
                    backward()
            opt.step()
        assert losses[-1] < 0.7 * losses[0]
        assert all(p.dtype == torch.float32 for p in model.parameters())
        results.append((bits(list(model.parameters())), bits(losses), int(model[1].num_batches_tracked)))
    assert results[0] == results[1] and results[0][2] == 30


@every_backend
@pytest.mark.parametrize("after", ["perturb", "step", "restore"])
def test_one_autocast_around_everything(after: str, backend: str) -> None:
    """autocast keeps its copies of the weights until its outermost block ends: a forward after the weights have moved
    must not meet those of before."""
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    opt = RST(model.parameters(), lr=0.1, rho=0.5, schedule=1.0, backend=backend)
    x = torch.randn(64, 8)

    def forward_and_backward() -> torch.Tensor:
        opt.zero_grad()
        out = model(x)
        nn.functional.cross_entropy(out, torch.zeros(64, dtype=torch.long)).backward()
        return out.detach()

    for _ in range(3):  # new plans first, then those that are there
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [forward_and_backward()]
            assert opt.perturb()
            if after != "perturb":
                forward_and_backward()
                opt.step() if after == "step" else opt.restore()
            outputs.append(model(x).detach())
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(x).detach()
        assert bits(outputs[1:]) == bits([expected])
        assert after == "restore" or bits(outputs[:1]) != bits([expected])
        opt.restore()


@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_forward_within_the_step_of_the_base(p: float, gamma: float) -> None:
    """Under autocast it leaves copies of weights that the base is about to change."""
    torch.manual_seed(0)
    model, x = nn.Linear(8, 3), torch.randn(64, 8)
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    base.register_step_pre_hook(lambda *_: (model(x), None)[1])
    opt = RST(base=base, schedule=p, rho=0.5, gamma=gamma)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.zeros(64, dtype=torch.long))
        loss.backward()
        return loss.detach()

    with torch.autocast("cpu", torch.bfloat16):
        opt.step(closure)
        found = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert bits([found]) == bits([model(x)])
