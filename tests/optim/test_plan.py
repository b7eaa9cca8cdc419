"""Launch plans of the eager CPU path: what they keep from step to step must never outlive its truth.

Each test runs the same steps on the reference backend, which keeps nothing.
"""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rst_fused import RST
from rst_fused._backends import backends, plan_extension

pytestmark = pytest.mark.skipif(
    not next(b for b in backends() if b.name == "cpu").available, reason="the C++ extension is not built"
)

Step = Callable[[RST, list[torch.nn.Parameter], int], None]


def parameters(*specs: tuple[tuple[int, ...], torch.dtype]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape, dtype in specs]


def give_grads(params: list[torch.nn.Parameter], seed: int, missing: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if i in missing else grad


def both(specs: list[tuple[tuple[int, ...], torch.dtype]], step: Step, steps: int, **options: object) -> None:
    """Takes the steps on both backends and compares all weights and Adam counters after each."""
    ours, theirs = parameters(*specs), parameters(*specs)
    cpu, reference = (
        RST(params, backend=name, **copy.deepcopy(options))  # type: ignore[arg-type]
        for params, name in ((ours, "cpu"), (theirs, "reference"))
    )
    for t in range(steps):
        step(cpu, ours, t)
        step(reference, theirs, t)
        for p, q in zip(ours, theirs, strict=True):
            # One rounding of the 16-bit dtype where fp32 results straddle a boundary; fp32 to its last bits.
            tolerance = 2.0**-7 if p.element_size() == 2 else 1e-5
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
            if "step" in cpu.state.get(p, {}):
                assert cpu.state[p]["step"] == reference.state[q]["step"]


F32, BF16 = torch.float32, torch.bfloat16


def test_adam_counts_once_beside_master_weights() -> None:
    def step(opt: RST, params: list[torch.nn.Parameter], t: int) -> None:
        give_grads(params, t)
        opt.step()
        assert all(opt.state[p]["step"] == t + 1 for p in params)

    both([((5,), F32), ((6,), BF16)], step, 3, base="adam", lr=0.1, master_weights=True)


def test_adam_counters_after_a_gradient_went_missing_in_the_second_pass() -> None:
    def step(opt: RST, params: list[torch.nn.Parameter], t: int) -> None:
        give_grads(params, 2 * t)
        if opt.perturb(t == 1):
            give_grads(params, 2 * t + 1, missing=(1,))
        opt.step()

    both([((5,), F32), ((6,), F32)], step, 5, base="adamw", lr=0.1)


def test_conjugate_gradients() -> None:
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    opt = RST([p], lr=1.0, backend="cpu")
    for _ in range(2):
        p.grad = torch.tensor([1 + 2j, 3 - 1j]).conj()
        opt.step()
    assert torch.equal(p.detach(), torch.tensor([-2 + 4j, -6 - 2j]))


def test_state_that_was_replaced() -> None:
    def step(opt: RST, params: list[torch.nn.Parameter], t: int) -> None:
        give_grads(params, t)
        opt.step()
        if t == 1:
            opt.state[params[0]]["momentum_buffer"] = torch.zeros(5)
        if t == 2:
            opt.state[params[1]] = {}
        if t == 3:
            opt.state.clear()

    both([((5,), F32), ((6,), F32)], step, 6, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("split", [False, True], ids=["one call", "two calls"])
def test_asam_takes_its_norm_from_the_masters(split: bool) -> None:
    params = parameters(((5,), BF16), ((6,), BF16))
    groups = [{"params": [p], "nesterov": split and i == 1} for i, p in enumerate(params)]
    opt = RST(groups, lr=0.1, momentum=0.9, adaptive=True, master_weights=True, schedule=1.0, backend="cpu")
    give_grads(params, 0)
    opt.step()  # masters now differ from the rounded parameters
    masters = [opt.state[p]["master"].double() for p in params]
    give_grads(params, 1)
    expected = sum(((m.abs() * p.grad.double()) ** 2).sum() for m, p in zip(masters, params, strict=True)).sqrt()  # type: ignore[union-attr]
    assert opt.perturb()
    assert opt.last_grad_norm == pytest.approx(float(expected), rel=1e-12)
    opt.restore()


def test_master_that_moved() -> None:
    def step(opt: RST, params: list[torch.nn.Parameter], t: int) -> None:
        give_grads(params, 2 * t)
        if t == 2:
            master = opt.state[params[0]]["master"]
            master.data = master.data.clone() * 2
        if opt.perturb(True):
            give_grads(params, 2 * t + 1)
        opt.step()

    both([((50,), BF16)], step, 4, lr=0.1, momentum=0.9, master_weights=True)


def test_parameter_transposed_in_place() -> None:
    def step(opt: RST, params: list[torch.nn.Parameter], t: int) -> None:
        if t == 1:
            params[0].data = params[0].data.t()
        give_grads(params, t)
        opt.step()

    both([((4, 4), F32)], step, 3, lr=0.1)


def test_the_first_step_that_counts_is_not_dampened() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    opt = RST([p], lr=1.0, momentum=0.9, dampening=0.5, backend="cpu")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    p.grad = torch.full((3,), float("inf"))
    scaler.step(opt)
    scaler.update()
    p.grad = torch.full((3,), scaler.get_scale())
    scaler.step(opt)
    assert torch.equal(p.detach(), torch.full((3,), -1.0))


def test_interrupt_while_a_plan_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(((5,), F32), ((6,), F32))
    before = [p.detach().clone() for p in params]
    opt = RST(params, lr=0.1, backend="cpu")
    give_grads(params, 0)
    assert opt.perturb(True)
    give_grads(params, 1, missing=(1,))  # the plan does not fit, so it hands over

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rst_fused._step.dispatch.update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    assert all(torch.equal(p.detach(), w) for p, w in zip(params, before, strict=True))


def test_a_size_one_dimension_does_not_defeat_the_plan() -> None:
    params = parameters(((8, 3, 1, 1), F32), ((1, 5), F32))
    opt = RST(params, lr=0.1, backend="cpu")
    give_grads(params, 0)
    opt.step()
    plan = opt._plans._plan
    assert plan is not None
    give_grads(params, 1)
    opt.step()
    assert opt._plans._plan is plan


def test_plans_find_what_they_look_up_in_this_torch() -> None:
    assert plan_extension().can_plan()
    assert plan_extension().knows_impl_layout()  # else all is right, but each fact of a tensor is asked for


@pytest.mark.parametrize("shape", [(4,), (1,), (3, 2)])
def test_gradients_that_torch_negates_when_read(shape: tuple[int, ...]) -> None:
    def step(opt: RST, params: list[torch.nn.Parameter], t: int) -> None:
        value = torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(t))
        params[0].grad = value.imag if t == 0 else value.conj().imag  # the same strides, negated or not
        assert params[0].grad.is_neg() == (t > 0)
        opt.perturb(t == 2)
        if t == 2:
            params[0].grad = value.conj().imag
        opt.step()

    both([(shape, F32)], step, 4, lr=0.1)


def test_steps_without_plans_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(opt: RST, params: list[torch.nn.Parameter], t: int) -> None:
        give_grads(params, 2 * t)
        if opt.perturb():
            give_grads(params, 2 * t + 1)
        opt.step()
        assert opt.backend.name == "reference" or opt._plans._plan is None

    monkeypatch.setattr("rst_fused._step.plan.can_plan", lambda kind: False)
    both([((5,), F32), ((6, 2), BF16)], step, 4, lr=0.1, momentum=0.9, stochastic_rounding=False)


def test_a_perturbed_parameter_changes_its_version_and_loses_its_gradient() -> None:
    (p,) = parameters(((5,), F32))
    opt = RST([p], lr=0.1, backend="cpu")
    give_grads([p], 0)
    before = p._version
    assert opt.perturb(True)
    assert p.grad is None
    assert p._version > before
    give_grads([p], 1)
    before = p._version
    opt.step()
    assert p._version > before


def feel_the_weights(params: list[torch.nn.Parameter]) -> None:
    """Makes gradients depend on where the weights are, so that a wrong perturbation shows in the update."""
    for p in params:
        if p.grad is not None:
            p.grad += p.detach()


SGD = {"base": "sgd", "momentum": 0.9, "weight_decay": 0.01}
CHANGES = [
    pytest.param(SGD, lambda g, t: g.update(lr=0.1 / (t + 1)), id="lr"),
    pytest.param(SGD, lambda g, t: g.update(rho=0.1 * (t + 1)), id="rho"),
    pytest.param(SGD, lambda g, t: g.update(momentum=0.9 - 0.2 * t), id="momentum"),
    pytest.param(SGD, lambda g, t: g.update(momentum=0.9 * (t % 2)), id="momentum on and off"),
    pytest.param(SGD, lambda g, t: g.update(weight_decay=0.1 * t), id="weight decay"),
    pytest.param(SGD, lambda g, t: g.update(nesterov=t % 2 == 1), id="nesterov"),
    pytest.param(SGD, lambda g, t: g.update(maximize=t % 2 == 1), id="maximize"),
    pytest.param({**SGD, "lr": torch.tensor(0.1)}, lambda g, t: g["lr"].mul_(0.5), id="lr in a tensor"),
    pytest.param({**SGD, "rho": torch.tensor(0.1)}, lambda g, t: g["rho"].mul_(2), id="rho in a tensor"),
    pytest.param({"base": "adam"}, lambda g, t: g.update(betas=(0.9, 0.99 - 0.1 * t)), id="betas"),
    pytest.param({"base": "adam", "betas": [0.9, 0.99]}, lambda g, t: operator.setitem(g["betas"], 0, 0.8 - 0.1 * t),
                 id="betas in a list"),
    pytest.param({"base": "adamw"}, lambda g, t: g.update(eps=10.0**-t), id="eps"),
    pytest.param(SGD, lambda g, t: operator.setitem(g, "lr", g.pop("lr") / 2), id="lr in another place"),
    pytest.param(SGD, lambda g, t: g.update(weight_decay=g["momentum"], momentum=g["weight_decay"]), id="exchanged"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "change"), CHANGES)
@pytest.mark.parametrize("when", ["before both", "between the phases"])
def test_a_plan_sees_every_change_of_a_hyperparameter(
    options: dict[str, Any], change: Callable[[dict[str, Any], int], object], when: str
) -> None:
    """Also one that comes twice, or after steps without any."""

    def step(opt: RST, params: list[torch.nn.Parameter], t: int) -> None:
        changes = t in (2, 3, 6)
        if changes and when == "before both":
            change(opt.param_groups[-1], t)
        give_grads(params, 2 * t)
        opt.perturb(t % 3 != 1)
        if changes and when != "before both":
            change(opt.param_groups[-1], t)
        give_grads(params, 2 * t + 1)
        feel_the_weights(params)
        opt.step()

    both([((5,), F32), ((6, 2), F32)], step, 8, **{"lr": 0.1, **options})


def test_numbers_of_an_earlier_plan_are_not_taken_for_those_of_a_new_one() -> None:
    def step(opt: RST, params: list[torch.nn.Parameter], t: int) -> None:
        give_grads(params, t, missing=(1,) if t > 1 else ())  # a new plan at t = 2, whose first numbers are others
        if t == 2:
            opt.param_groups[0]["lr"] = 0.5
            opt.param_groups[0]["rho"] = 0.5
        opt.perturb(True)
        give_grads(params, 10 + t, missing=(1,) if t > 1 else ())
        feel_the_weights(params)
        opt.step()

    both([((5,), F32), ((6, 2), F32)], step, 4, lr=0.1)


class Asked(dict[str, Any]):
    """A parameter group that computes its learning rate when asked."""

    def __getitem__(self, name: str) -> Any:
        return 0.1 / (1 + self["asked"]) if name == "lr" else super().__getitem__(name)


@pytest.mark.parametrize("when", ["before both", "between the phases"])
@pytest.mark.parametrize("kind", [dict, Asked])
def test_a_plan_sees_that_a_group_was_replaced(kind: type[dict[str, Any]], when: str) -> None:
    def step(opt: RST, params: list[torch.nn.Parameter], t: int) -> None:
        def change() -> None:
            group = opt.param_groups[0]
            if kind is dict:
                opt.param_groups[0] = {**group, "lr": 0.1 / (t + 1), "rho": 0.1 * t}
            elif t == 1:
                opt.param_groups[0] = Asked(group, asked=t)
            else:
                group["asked"] = t

        give_grads(params, 2 * t)
        if t > 0 and when == "before both":
            change()
        opt.perturb(True)
        if t > 0 and when != "before both":
            change()
        give_grads(params, 2 * t + 1)
        feel_the_weights(params)
        opt.step()

    both([((5,), F32), ((6, 2), F32)], step, 5, lr=0.1, momentum=0.9)


def test_a_plan_sees_that_a_group_of_a_shared_optimizer_was_replaced() -> None:
    results = []
    for backend in ("cpu", "reference"):
        params = parameters(((5,), F32))
        base = torch.optim.SGD(params, lr=0.1)
        opt = RST(base=base, schedule=1.0, backend=backend)
        for t in range(3):
            if t == 2:
                base.param_groups[0] = {**base.param_groups[0], "rho": 2.0}
            give_grads(params, 2 * t)
            opt.perturb()
            give_grads(params, 2 * t + 1)
            feel_the_weights(params)
            opt.step()
        results.append(params[0].detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("way", ["saved and loaded", "pickled", "copied"])
def test_hyperparameters_are_known_again_after_a_resume(way: str) -> None:
    params = parameters(((5,), F32))
    opt = RST([("weight", params[0])], lr=0.1, backend="cpu")
    if way == "saved and loaded":
        opt.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))  # names that are not interned
    elif way == "pickled":
        opt = pickle.loads(pickle.dumps(opt))
    else:
        opt = copy.deepcopy(opt)
    versions = []
    for t in range(4):
        give_grads(opt.param_groups[0]["params"], t)
        opt.step()
        versions.append(opt._plans._cached.version)
    assert versions[1:] == [versions[0]] * 3


def test_a_schedule_may_load_a_state() -> None:
    def schedule(t: int) -> float:
        if t == 1:
            opt.load_state_dict(saved)
        return 1.0

    (p,) = parameters(((5,), F32))
    opt = RST([p], lr=0.1, schedule=schedule, backend="cpu")
    saved = opt.state_dict()
    before = p.detach().clone()
    give_grads([p], 0)
    opt.step()
    give_grads([p], 1)
    opt.perturb()
    with pytest.raises(RuntimeError, match="perturbed"):
        opt.state_dict()
    perturbed = p.detach().clone()
    opt.restore()
    assert not torch.equal(p.detach(), perturbed)
    assert not torch.equal(p.detach(), before)


def test_first_gradients_that_lie_otherwise_than_the_second_ones() -> None:
    def step(opt: RST, params: list[torch.nn.Parameter], t: int) -> None:
        for phase, finish in enumerate((opt.perturb, opt.step)):
            give_grads(params, 2 * t + phase)
            if t // (1 + phase) % 2:  # in one pass, in the other, in both, in none
                for p in params:
                    assert p.grad is not None
                    p.grad = p.grad.mT.contiguous().mT
            finish()

    both([((6, 5), F32), ((3, 4), BF16), ((8, 2), F32)], step, 8, gamma=2.0, schedule=0.7, lr=0.1, momentum=0.9)
