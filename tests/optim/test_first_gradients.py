"""G-RST keeps the first gradients between the passes: what becomes of memory that the second pass writes again."""

from __future__ import annotations

import pytest
import torch
from optimizer_cases import PROBLEM, every_backend, every_mode, everything, make
from oracle_optimizer import bits
from paths import needs_plans
from torch import nn

from rst_fused import RST

pytestmark = pytest.mark.usefixtures("one_thread")


@every_backend
@every_mode
@pytest.mark.parametrize("how", ["same tensor", "view"])
def test_second_gradient_in_the_memory_of_the_first(how: str, mode: str, backend: str) -> None:
    """Refused by name, for the first one is gone; weights come back, and separate gradients work afterwards."""
    params, opt = make(mode, backend, gamma=2.0)
    memory = [torch.ones_like(p) for p in params]
    before = bits(params)
    for p, g in zip(params, memory, strict=True):
        p.grad = g
    opt.perturb()
    for p, g in zip(params, memory, strict=True):
        p.grad = g.fill_(10.0) if how == "same tensor" else g.fill_(10.0).view_as(g)
    with pytest.raises(RuntimeError, match="the second gradient of parameter 0 of group 0 was written over the first"):
        opt.step()
    assert bits(params) == before and opt.steps == 0
    for attempt in (opt.perturb, opt.step):
        for p in params:
            p.grad = torch.ones_like(p)
        attempt()
    assert opt.steps == 1


@every_backend
def test_memory_may_be_reused_where_nothing_is_mixed(backend: str) -> None:
    p, buffer = nn.Parameter(torch.ones(3)), torch.ones(3)
    opt = RST([p], lr=1.0, rho=0.0, schedule=1.0, backend=backend)
    p.grad = buffer
    opt.perturb()
    p.grad = buffer.fill_(10.0)
    opt.step()
    assert p.tolist() == [-9.0] * 3


@every_backend
@every_mode
def test_hook_that_raises_between_the_passes(mode: str, backend: str) -> None:
    params, opt = make(mode, backend)

    def fails(*_: object) -> None:
        raise KeyError("in a hook")

    handle = opt.register_step_pre_hook(fails)
    for p in params:
        p.grad = torch.ones_like(p)
    before = bits(params)
    opt.perturb()
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(KeyError, match="in a hook"):
        opt.step()
    assert bits(params) == before and not opt._step_state.perturbed
    handle.remove()
    opt.step()
    assert bits(params) != before


@every_backend
@pytest.mark.parametrize("number", [int, float])
def test_step_counts_of_old_checkpoints(number: type, backend: str) -> None:
    """Plain numbers, which torch.optim takes too."""
    params, opt = make("adam-mixed", backend)
    others, twin = make("adam-mixed", backend)
    for ps, o, convert in ((params, opt, number), (others, twin, torch.tensor)):
        for p in ps:
            o.state[p] = {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p), "step": torch.tensor(3.0)}
        saved = o.state_dict()
        for state in saved["state"].values():
            state["step"] = convert(float(state["step"]))
        o.load_state_dict(saved)
        for phase in (o.perturb, o.step):
            for p in ps:
                p.grad = torch.ones_like(p)
            phase()
    assert everything(params, opt) == everything(others, twin)


@every_backend
def test_parameters_that_share_a_gradient(backend: str) -> None:
    """Around an optimizer instance gradients are mixed in place; elsewhere they are read alone."""
    for instance in (True, False):
        params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        options = {"base": torch.optim.SGD(params, lr=1.0)} if instance else {"params": params, "lr": 1.0}
        opt = RST(**options, rho=0.0, schedule=1.0, gamma=2.0, backend=backend)
        for value, finish in ((1.0, opt.perturb), (10.0, opt.step)):
            shared = torch.full((3,), value)
            for p in params:
                p.grad = shared
            if instance and finish == opt.step:
                with pytest.raises(RuntimeError, match="of parameter 0 of group 0 and parameter 1 of group 0 share"):
                    finish()
            else:
                finish()
        assert [p.tolist() for p in params] == [[1.0 if instance else -18.0] * 3] * 2


@every_backend
def test_a_gradient_that_only_the_second_pass_has(backend: str) -> None:
    """Taken as it is, beside one that is mixed and whose weights a master keeps."""
    mixed, alone = nn.Parameter(torch.ones(4, dtype=torch.bfloat16)), nn.Parameter(torch.ones(4))
    opt = RST([mixed, alone], lr=0.1, schedule=1.0, gamma=2.0, master_weights=True, backend=backend)
    mixed.grad = torch.ones_like(mixed)
    opt.perturb()
    mixed.grad, alone.grad = torch.full_like(mixed, 2.0), torch.ones_like(alone)
    opt.step()
    assert mixed.tolist() == torch.full((4,), 0.7).bfloat16().tolist()
    assert alone.tolist() == torch.full((4,), 0.9).tolist()


def perturbed() -> tuple[list[nn.Parameter], RST, list[torch.Tensor]]:
    """Parameters, their optimizer, which a plan has perturbed, and their first gradients."""
    params, opt = make("adam-mixed", "cpu")
    for t in range(2):  # from the second step on a plan has all state
        PROBLEM.backward(params, t)
        firsts = [p.grad for p in params if p.grad is not None]
        opt.perturb()
        if t == 0:
            PROBLEM.backward(params, t)
            opt.step()
    return params, opt, firsts


@needs_plans
@pytest.mark.parametrize("how", ["restore", "restore of other data", "step", "step of other gradients"])
def test_first_gradients_are_freed_with_the_step(how: str) -> None:
    params, opt, firsts = perturbed()
    counts = [g._use_count() for g in firsts]
    if how.endswith("other data"):
        params[0].data = params[0].data.clone()
    PROBLEM.backward(params, 1)
    if how.endswith("other gradients"):
        for p in params:
            p.grad = None if p.grad is None else torch.stack([p.grad, p.grad], -1)[..., 0]
    opt.restore() if how.startswith("restore") else opt.step()
    assert [g._use_count() for g in firsts] == [count - 1 for count in counts]


@needs_plans
def test_first_gradients_may_be_asked_for_twice() -> None:
    """As after an interrupt that comes before the answer is kept."""
    params, opt, firsts = perturbed()
    saved = opt._step_state.saved
    expected = dict(zip((p for p in params if p in saved), firsts, strict=True))
    for _ in range(2):
        found = opt._step_state.first_grads.as_list()
        assert [g.data_ptr() for g in found] == [expected[p].data_ptr() for p in saved]
    del found
    for p in params:
        p.grad = torch.ones_like(p).t().contiguous().t()
    opt.step()
    assert opt.sam_steps == 2


@needs_plans
def test_an_empty_view_does_not_defeat_the_plan() -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(10)[2:2])]
    opt = RST(params, lr=0.1, schedule=1.0, gamma=2.0, backend="cpu")
    plans = set()
    for _ in range(4):
        for call in (opt.perturb, opt.step):
            params[0].grad, params[1].grad = torch.ones(3), torch.zeros(7)[3:3]
            call()
            plans.add(id(opt._plans._plan))
    assert len(plans) == 1
