"""torch.distributed.checkpoint.state_dict: empty state is created without a step, and a resumed run goes on exactly."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from oracle_optimizer import bits
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from rst_fused import RST
from rst_fused._step.placeholders import tensors_of

FORMS = {
    "nested": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
}
every_form = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)

SGD = {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}
BASES: dict[str, Any] = {
    "momentum": ("sgd", SGD),
    "adamw": ("adamw", {}),
    "amsgrad": ("adam", {"amsgrad": True}),
    "lion": ("lion", {}),
    "masters": ("sgd", {**SGD, "master_weights": True}),
    "remainders": ("adamw", {"master_weights": "remainder"}),
    "instance of SGD": (lambda params: torch.optim.SGD(params, lr=0.1, **SGD), {}),
    "instance of AdamW": (lambda params: torch.optim.AdamW(params, lr=0.1), {}),
    "instance of RMSprop": (lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.9, weight_decay=0.1), {}),
}
every_base = pytest.mark.parametrize("name", BASES)
BASES_WITHOUT_STATE: dict[str, Any] = {"sgd": ("sgd", {})}


def make(name: str, seed: int = 7, weights: int = 0, **options: Any) -> tuple[torch.nn.Module, RST]:
    torch.manual_seed(weights)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    base, hyper = (BASES | BASES_WITHOUT_STATE)[name]
    if name in ("masters", "remainders"):
        model.bfloat16()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    options = {"seed": seed, "schedule": 0.5, "gamma": 1.5, "backend": "reference", **options}
    if isinstance(base, str):
        return model, RST(groups, base, lr=0.1, **options, **hyper)
    return model, RST(None, base(groups), **options)


def train(model: torch.nn.Module, opt: RST, steps: range) -> list[bool]:
    draws = []
    for t in steps:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(t)).to(model[0].weight.dtype)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            opt.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        before = opt.sam_steps
        opt.step(closure)
        draws.append(opt.sam_steps > before)
    return draws


def seen(model: torch.nn.Module, opt: RST) -> Any:
    state = [{k: bits([v]) for k, v in sorted(opt.state[p].items())} for p in model.parameters()]
    return bits(list(model.parameters())), state, opt.steps, opt.sam_steps, opt.seed


@every_form
@every_base
def test_a_resumed_run_goes_on_exactly(name, options):
    model, opt = make(name)
    train(model, opt, range(7))
    saved = deepcopy(get_optimizer_state_dict(model, opt, options=options))
    weights = deepcopy(model.state_dict())
    assert (opt.steps, opt.sam_steps > 0) == (7, True)

    other, resumed = make(name, seed=1, weights=1)
    other.load_state_dict(weights)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert (resumed.steps, resumed.sam_steps, resumed.seed) == (7, opt.sam_steps, 7)
    assert train(other, resumed, range(7, 19)) == train(model, opt, range(7, 19))
    assert seen(other, resumed) == seen(model, opt)


@every_form
@every_base
def test_saving_before_the_first_step_changes_nothing(name, options):
    model, opt = make(name)
    undisturbed = deepcopy((model, opt))
    before, lr = bits(list(model.parameters())), [group["lr"] for group in opt.param_groups]
    saved = get_optimizer_state_dict(model, opt, options=options)
    assert bits(list(model.parameters())) == before and [group["lr"] for group in opt.param_groups] == lr
    assert (opt.steps, opt.sam_steps) == (0, 0)
    assert not any(t.any() for t in tensors_of(opt.state, "master"))
    again, resumed = make(name, seed=1)
    set_optimizer_state_dict(again, resumed, deepcopy(saved), options=options)
    copied, copy = deepcopy((model, opt))
    train(*undisturbed, range(9))
    for trained in ((model, opt), (again, resumed), (copied, copy)):
        train(*trained, range(9))
        assert seen(*trained) == seen(*undisturbed)


@every_base
def test_every_parameter_with_a_gradient_gets_state(name):
    model, opt = make(name)
    model[0].bias.requires_grad_(False)
    get_optimizer_state_dict(model, opt)
    real, trained = make(name)
    real[0].bias.requires_grad_(False)
    train(real, trained, range(3))
    for p, q in zip(model.parameters(), real.parameters(), strict=True):
        assert {k: v.shape for k, v in opt.state.get(p, {}).items()} == {
            k: v.shape for k, v in trained.state.get(q, {}).items()
        }


@pytest.mark.parametrize("name", ["amsgrad", "instance of AdamW"])
def test_an_optimizer_that_was_loaded_loads_the_flattened_form_again(name):
    options = FORMS["flattened"]
    model, opt = make(name)
    train(model, opt, range(5))
    opt.load_state_dict(opt.state_dict())
    saved, weights = deepcopy(get_optimizer_state_dict(model, opt, options=options)), deepcopy(model.state_dict())
    sam_steps = opt.sam_steps
    train(model, opt, range(5, 9))
    model.load_state_dict(weights)
    set_optimizer_state_dict(model, opt, saved, options=options)
    assert (opt.steps, opt.sam_steps) == (5, sam_steps)


def test_stateless_sgd_resumes_too():
    for options in (FORMS["nested"], FORMS["flattened"]):  # torch asks for a tensor in the full form
        model, opt = make("sgd")
        get_optimizer_state_dict(model, opt, options=options)
        train(model, opt, range(7))
        other, resumed = make("sgd", seed=1)
        other.load_state_dict(model.state_dict())
        set_optimizer_state_dict(other, resumed, get_optimizer_state_dict(model, opt, options=options), options=options)
        assert train(other, resumed, range(7, 19)) == train(model, opt, range(7, 19))
        assert seen(other, resumed) == seen(model, opt)


@pytest.mark.parametrize("name", ["masters", "remainders"])
def test_masters_follow_weights_that_are_loaded_alone(name: str):
    model, opt = make(name, schedule=0.0)
    get_optimizer_state_dict(model, opt)
    other, fresh = make(name, weights=1, schedule=0.0)
    model.load_state_dict(other.state_dict())
    train(model, opt, range(2))
    train(other, fresh, range(2))
    assert seen(model, opt) == seen(other, fresh)


def test_a_learning_rate_that_is_a_tensor():
    model = torch.nn.Linear(3, 2)
    opt = RST(model.parameters(), "adamw", lr=torch.tensor(0.1))
    get_optimizer_state_dict(model, opt)
    assert opt.steps == 0 and float(opt.param_groups[0]["lr"]) == pytest.approx(0.1)


def test_a_step_count_starts_at_0():
    for name in ("adamw", "instance of AdamW"):
        model, opt = make(name)
        get_optimizer_state_dict(model, opt)
        assert [float(opt.state[p]["step"]) for p in model.parameters()] == [0.0] * 4


@pytest.mark.parametrize("name", ["momentum", "instance of SGD"])
def test_state_that_was_written_in_place_is_kept(name):
    """As torch.distributed.checkpoint.load does: the buffers are real, and the next step dampens."""
    model, opt = make(name, schedule=0.0)
    get_optimizer_state_dict(model, opt)
    for state in opt.state.values():
        state["momentum_buffer"].fill_(3.0)
    for group in opt.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    train(model, opt, range(1))
    for p in model.parameters():
        expected = 0.9 * torch.full_like(p, 3.0) + 0.5 * p.grad
        torch.testing.assert_close(opt.state[p]["momentum_buffer"], expected)


@every_base
def test_a_step_with_lr_0_is_counted_where_gradients_are_not_all_zero(name):
    model, opt = make(name, schedule=0.0)
    for group in opt.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    next(model.parameters()).grad[0] = 1.0
    opt.step()
    assert opt.steps == 1


def test_a_drawn_step_is_counted_whatever_its_gradients():
    model, opt = make("momentum", schedule=0.0)
    for group in opt.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.perturb()
    opt.step()
    assert opt.steps == 1


def test_a_base_that_fails_meanwhile_changes_no_weights():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.add_(1)
            raise RuntimeError("not today")

    p = torch.nn.Parameter(torch.ones(3))
    opt = RST(None, Failing([p], lr=0.0))
    p.grad = torch.zeros(3)
    with pytest.raises(RuntimeError, match="not today"):
        opt.step()
    assert p.tolist() == [1.0] * 3 and opt.steps == 0


def test_what_a_base_instance_saves_itself_has_no_counters():
    model, opt = make("instance of AdamW")
    train(model, opt, range(3))
    opt.load_state_dict(opt.base.state_dict())
    assert (opt.steps, opt.seed) == (0, 7)
    assert float(opt.state[next(model.parameters())]["step"]) == 3.0


def test_counters_are_no_part_of_what_is_shown():
    _, opt = make("momentum")
    assert "rst_steps" in opt.param_groups[0] and "rst_" not in repr(opt).replace("rst_fused", "")
